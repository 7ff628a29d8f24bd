"""Means agree with torchmetrics', and a document counts as read if greedy generation gives its answer."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torchmetrics.text import Perplexity as TheirPerplexity

from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.inference.generation import generate
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.training.metrics import Mean, Perplexity, evaluation_sums


def test_perplexity_over_unequal_batches_is_torchmetrics() -> None:
    torch.manual_seed(0)
    ours, loss, theirs = Perplexity(), Mean(), TheirPerplexity()
    for tokens in (3, 50, 1, 17):
        logits, targets = torch.randn(tokens, 11) * 2, torch.randint(0, 11, (tokens,))
        summed = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        ours.update(summed, tokens)
        loss.update(summed, tokens)
        theirs.update(logits[None], targets[None])
    torch.testing.assert_close(ours.compute(), theirs.compute())
    torch.testing.assert_close(loss.compute(), theirs.compute().log())


def test_a_document_is_matched_if_greedy_generation_gives_it(
    decoder: Decoder, builder: SequenceBuilder, make_png: Callable[..., bytes]
) -> None:
    """Six documents, answered by the decoder itself; of the second and the last, one token is another."""
    asked = [Document(f"{n}", (Image(make_png(5 + n, 9, seed=n)), Text("What is it?", loss=False))) for n in range(6)]
    prompts = [builder.prompt(document) for document in asked]
    written = [np.array(ids) for ids in generate(decoder, prompts, max_new_tokens=4, eos_id=-1)]
    written[1][0], written[5][3] = (written[1][0] + 1) % 300, (written[5][3] + 1) % 300
    answered = [
        replace(prompt, tokens=np.concatenate([prompt.tokens, ids]), loss=np.append(prompt.loss, np.ones(4, bool)))
        for prompt, ids in zip(prompts, written, strict=True)
    ]
    row = pack_row(answered, budget=sum(map(len, answered)) + 7)
    sums = evaluation_sums(decoder.eval().score_tokens(row), row)
    assert (int(sums["exact_match"][0]), sums["exact_match"][1]) == (4, 6)
    right, tokens = int(sums["token_accuracy"][0]), sums["token_accuracy"][1]
    assert tokens == 24
    assert 18 <= right <= 22, "the tokens after an exchanged one may change"
    torch.testing.assert_close(sums["loss"][0], decoder.loss(row))
