"""What goes from the host to a device, seen on any machine: `meta` is a device whose tensors have no values."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode

from fuyu_e2e.data.document import Document
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.model import row
from fuyu_e2e.model.attention import grouped as attention_plans
from fuyu_e2e.model.attention import kernels as attention_kernels
from fuyu_e2e.model.attention.grouped import GroupedRow
from fuyu_e2e.model.attention.kernels import FlexRow, VarlenRow
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.device_copy import to_device
from fuyu_e2e.model.row import TokenInfo, TrainingProgress

META = torch.device("meta")
LENGTHS = (3_000, 0, 5_000, 200)


class Copies(TorchDispatchMode):
    """Notes how many values are copied to the device, and by `to_device` those that nothing waits for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.all: list[int] = []
        self.unawaited: list[int] = []

        def noted(tensor: Tensor, device: torch.device) -> Tensor:
            self.unawaited.append(tensor.numel())
            return to_device(tensor, device)

        for module in (attention_kernels, attention_plans, row):
            monkeypatch.setattr(module, "to_device", noted)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten._to_copy.default and args[0].device != result.device:
            self.all.append(result.numel())
        return result


@pytest.mark.parametrize("kind", [VarlenRow, FlexRow])
def test_a_row_copies_where_documents_start_and_nothing_waits(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "_block_mask", lambda *_: object.__new__(BlockMask))
    with Copies(monkeypatch) as copies:
        row = kind.of(LENGTHS, META, *([lambda *_: _[0]] if kind is VarlenRow else []))
    assert row.places.document.device == META
    assert row.places.document.shape == (sum(LENGTHS),)
    assert copies.all == copies.unawaited == [len(LENGTHS) + 1]


def test_documents_are_planned_in_one_copy_for_which_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    with Copies(monkeypatch) as copies:
        GroupedRow.of(LENGTHS, META)
    assert copies.all == copies.unawaited
    assert len(copies.all) == 1


def test_token_info_copies_little_and_nothing_waits(
    routed_decoder: Callable[..., Decoder],
    builder: SequenceBuilder,
    random_document: Callable[[int], Document],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = routed_decoder(share=0.5).config
    row = pack_row([builder.build(random_document(seed)) for seed in range(20)], 4_096)
    expected = TokenInfo.of(row, config.layers, TrainingProgress(3, 0.5), training=True)
    ends = torch.tensor(row.document_lengths).cumsum(0)
    assert len(expected.seed[: ends[-1]].unique()) == len(ends)
    assert (expected.seed[ends[-1] :] == 0).all()
    assert len(row.images) > 1
    assert torch.equal(expected.patch_image.bincount(), torch.tensor([span.patches for span in row.images]))
    with Copies(monkeypatch) as copies:
        info = TokenInfo.of(row.to("meta"), config.layers, TrainingProgress(3, 0.5), training=True)
    for field in fields(info):
        if isinstance(tensor := getattr(info, field.name), Tensor):
            assert tensor.device == META
            assert tensor.shape == getattr(expected, field.name).shape
    of_the_row = [tensor.numel() for tensor in vars(row).values() if isinstance(tensor, Tensor)]
    assert sorted(copies.all) == sorted(of_the_row + copies.unawaited)
    assert sorted(copies.unawaited) == sorted([2 * (len(ends) + 1), len(row.images)])


def test_a_copy_to_a_gpu_is_made_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, pinned = torch.arange(4), torch.arange(4)
    assert to_device(tensor, torch.device("cpu")) is tensor, "on a CPU nothing is copied"
    asked: list[tuple] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda _: pinned)
    monkeypatch.setattr(Tensor, "to", lambda *given, **named: asked.append((*given, named)) or given[0])
    assert to_device(tensor, torch.device("cuda")) is pinned
    assert asked[0][1:] == (torch.device("cuda"), {"non_blocking": True})
