"""Exported graphs say what the decoder says, on prompts that they were not exported with."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sequence import SequenceBuilder, TokenSequence
from fuyu_e2e.errors import UserError
from fuyu_e2e.export.graphs import export_decode_step, export_prefill
from fuyu_e2e.inference.generation import generate
from fuyu_e2e.model.attention.mask import CAUSAL, AttentionMask
from fuyu_e2e.model.decoder import Decoder


def question(builder: SequenceBuilder, png: bytes) -> TokenSequence:
    return builder.prompt(Document("key", (Image(png), Text("What is it?", loss=False))))


@dataclass(frozen=True, kw_only=True)
class OwnMask(AttentionMask):
    """A user's own."""

    def sees(self, query: Any, key: Any, same_image: Any) -> Any:
        return super().sees(query, key, same_image) & (query - key != 1)


def masked(decoder: Decoder, *masks: AttentionMask) -> Decoder:
    """The same weights under other masks."""
    made = Decoder(replace(decoder.config, masks=masks))
    made.load_state_dict(decoder.state_dict())
    return made.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "masks",
    [(CAUSAL,), (AttentionMask(window=5), CAUSAL), (AttentionMask(window=20, sinks=2), AttentionMask(window=3))],
    ids=["causal", "window", "windows and sinks"],
)
def test_saved_graphs_continue_a_prompt_as_the_decoder_does(
    masks: tuple[AttentionMask, ...],
    decoder: Decoder,
    builder: SequenceBuilder,
    make_png: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    """Of several pictures of one shape, written with nothing but the two saved files."""
    decoder = masked(decoder, *masks)
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
    for mask, named in (
        (AttentionMask(images="bidirectional"), "images 'bidirectional' of AttentionMask"),
        (OwnMask(window=5), "images 'causal' of OwnMask"),
    ):
        with pytest.raises(UserError, match=rf"decoder\.masks .*{named}.* not given where images are"):
            export_prefill(masked(decoder, CAUSAL, mask), tokens=9, patches=4, capacity=9)
