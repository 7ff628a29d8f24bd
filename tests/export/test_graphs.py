"""Exported graphs say what the decoder says, on prompts that they were not exported with."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fuyu_e2e.document import Document, Image, Text
from fuyu_e2e.errors import UserError
from fuyu_e2e.export.graphs import export_decode_step, export_prefill
from fuyu_e2e.inference.generation import generate
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.packing import pack_row
from fuyu_e2e.sequence import SequenceBuilder, TokenSequence


def question(builder: SequenceBuilder, png: bytes) -> TokenSequence:
    return builder.prompt(Document("key", (Image(png), Text("What is it?", loss=False))))


@torch.no_grad()
def test_saved_graphs_continue_a_prompt_as_the_decoder_does(
    decoder: Decoder, builder: SequenceBuilder, make_png: Callable[..., bytes], tmp_path: Path
) -> None:
    """Of several pictures of one shape, written with nothing but the two saved files."""
    prompts = [question(builder, make_png(8, 16, seed=seed)) for seed in range(3)]
    tokens, patches, capacity = len(prompts[0]), len(prompts[0].patches), len(prompts[0]) + 6
    torch.export.save(export_prefill(decoder, tokens=tokens, patches=patches, capacity=capacity), tmp_path / "a.pt2")
    torch.export.save(export_decode_step(decoder, sequences=1, capacity=capacity), tmp_path / "b.pt2")
    prefill, step = (torch.export.load(tmp_path / name).module() for name in ("a.pt2", "b.pt2"))
    for prompt in prompts:
        row = pack_row([prompt])
        logits, keys, values = prefill(row.tokens, row.patches, row.patch_positions)
        torch.testing.assert_close(logits, decoder.logits(row)[-1:], atol=1e-4, rtol=1e-5)
        written = [int(logits.argmax())]
        for length in range(tokens, tokens + 5):
            logits, keys, values = step(torch.tensor(written[-1:]), torch.tensor([length]), keys, values)
            written.append(int(logits.argmax()))
        assert [written] == generate(decoder, [prompt], max_new_tokens=6, eos_id=-1)


@torch.no_grad()
def test_what_has_no_graph_is_refused(decoder: Decoder, routed_decoder: Callable[..., Decoder]) -> None:
    routed = routed_decoder(share=0.4)
    with pytest.raises(UserError, match="routed blocks"):
        export_prefill(routed, tokens=9, patches=4, capacity=9)
    with pytest.raises(UserError, match="routed blocks"):
        export_decode_step(routed, sequences=1, capacity=9)
    with pytest.raises(UserError, match="doesn't hold"):
        export_prefill(decoder, tokens=9, patches=4, capacity=8)
