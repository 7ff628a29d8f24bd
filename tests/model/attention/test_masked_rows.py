"""A decoder whose blocks have masks by depth reads a packed row as its documents alone, and learns from it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fuyu_e2e.data.document import Document
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.model.attention.interface import Attend, Passing, RowAttention
from fuyu_e2e.model.attention.mask import CAUSAL, AttentionMask
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.decoder import Decoder

from .test_mask import EvenDistance, by_definition, visible

LARGEST = 54
"""Tokens of the largest image of `random_document`."""
PATTERNS = {
    "window": (AttentionMask(window=5),),
    "sinks": (AttentionMask(window=5, sinks=2), CAUSAL),
    "bidirectional": (AttentionMask(window=5), AttentionMask(window=LARGEST, images="bidirectional"), CAUSAL),
    "own": (EvenDistance(window=7, sinks=3), CAUSAL),
}
patterns = pytest.mark.parametrize("masks", PATTERNS.values(), ids=PATTERNS)


@dataclass(frozen=True)
class Definition(RowAttention):
    """Attention by what each token sees."""

    shown: list[list[int]]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_definition(q, k, v, self.shown)

    def select(self, passing: Passing) -> Attend:
        raise NotImplementedError

    def cross(self, passing: Passing) -> Attend:
        raise NotImplementedError


@pytest.fixture
def make(decoder: Decoder) -> Callable[..., Decoder]:
    """Makes a decoder with the same weights under other masks."""

    def make(masks: tuple[AttentionMask, ...], dtype: torch.dtype = torch.float32) -> Decoder:
        made = Decoder(replace(decoder.config, masks=masks)).to(dtype)
        made.load_state_dict(decoder.state_dict())
        return made

    return make


@pytest.fixture
def row(builder: SequenceBuilder, random_document: Callable[[int], Document]) -> PackedBatch:
    """Documents of all kinds, with images of several sizes."""
    return pack_row([builder.build(random_document(seed)) for seed in (4, 0, 6, 3)])


def gradients(decoder: Decoder, loss: Tensor) -> dict[str, Tensor]:
    decoder.zero_grad()
    loss.backward()
    return {name: weight.grad for name, weight in decoder.named_parameters() if weight.grad is not None}


@torch.no_grad()
@patterns
def test_a_packed_row_is_each_document_alone(
    masks: tuple[AttentionMask, ...],
    make: Callable[..., Decoder],
    builder: SequenceBuilder,
    random_document: Callable[[int], Document],
) -> None:
    reader = make(masks)
    sequences = [builder.build(random_document(seed)) for seed in range(10)]
    together = reader.logits(pack_row(sequences)).split([len(sequence) for sequence in sequences])
    for sequence, logits in zip(sequences, together, strict=True):
        torch.testing.assert_close(logits, reader.logits(pack_row([sequence])), atol=1e-4, rtol=1e-4)


@patterns
def test_each_block_sees_and_learns_by_its_own_mask_of_the_pattern(
    masks: tuple[AttentionMask, ...], make: Callable[..., Decoder], row: PackedBatch
) -> None:
    """Against the definition in float64: losses, and the gradient of every weight."""
    reader = make(masks, torch.float64)
    attends = [
        Definition(visible(masks[block % len(masks)], row.document_lengths, row.image_bounds))
        for block in range(reader.config.layers)
    ]
    wanted = reader.loss(row, reader.row_of(row.positions, attends))
    loss = reader.loss(row)
    torch.testing.assert_close(loss, wanted)
    expected, found = gradients(reader, wanted), gradients(reader, loss)
    assert len(found) == len(list(reader.parameters()))
    for name, gradient in expected.items():
        # The chunks' losses are float32, whatever the weights are.
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


@patterns
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_what_is_computed_anew_gives_the_same_gradients(
    kind: Any, masks: tuple[AttentionMask, ...], make: Callable[..., Decoder], row: PackedBatch
) -> None:
    reader = make(masks).train()
    expected = gradients(reader, reader.loss(row))
    reader.recompute(kind)
    found = gradients(reader, reader.loss(row))
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
