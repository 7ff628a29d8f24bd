"""Backends for GPUs against the definition of attention in float64.

Kernels that need a GPU are replaced by their definition, so that what they are told is tested on any machine; marked
`gpu`, they run themselves.
"""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fuyu_e2e.errors import UserError
from fuyu_e2e.model.attention import kernels as attention_kernels
from fuyu_e2e.model.attention.grouped import GroupedRow
from fuyu_e2e.model.attention.interface import RowAttention, reference_attention
from fuyu_e2e.model.attention.kernels import (
    FlexRow,
    VarlenRow,
    _fastest,
    _flash_attention,
    _torch_varlen,
    plan_attention,
)
from fuyu_e2e.model.routing.block import gather_passing

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CPU = torch.device("cpu")
lengths = st.lists(st.integers(1, 70), min_size=1, max_size=12)
HEADS = [(1, 1), (4, 2), (6, 1)]


def by_definition(queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor, longest: int) -> Tensor:
    """What a kernel computes of documents that start there."""
    counts = starts.diff().tolist()
    assert starts.dtype == torch.int32
    assert starts[0] == 0
    assert starts[-1] == len(queries)
    assert max(counts) <= longest
    return reference_attention(queries, keys, values, tuple(counts))


def rows(lengths: list[int]) -> list[RowAttention]:
    return [VarlenRow.of(tuple(lengths), CPU, by_definition), FlexRow.of(tuple(lengths), CPU)]


def draw(lengths: list[int], heads: tuple[int, int], seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sum(lengths), n, 16, generator=generator, dtype=dtype) for n in (heads[0], heads[1], heads[1])]


@given(lengths=lengths, heads=st.sampled_from(HEADS), seed=st.integers(0, 100))
def test_rows_are_the_reference(lengths: list[int], heads: tuple[int, int], seed: int) -> None:
    inputs = draw(lengths, heads, seed)
    expected = reference_attention(*inputs, tuple(lengths))
    for row in rows([*lengths, 0]):  # no padding, as a last document that is empty
        torch.testing.assert_close(row(*inputs), expected)


@given(lengths=lengths, seed=st.integers(0, 1_000), skipped=st.sampled_from(["nothing", "keys"]))
def test_passing_tokens_are_the_reference(lengths: list[int], seed: int, skipped: str) -> None:
    queries, keys, values = draw(lengths, (4, 2), seed)
    generator = torch.Generator().manual_seed(seed)
    passes = torch.rand(sum(lengths), generator=generator) < torch.rand(1, generator=generator)
    passing = gather_passing(passes, min(len(passes), int(passes.sum()) + 3))
    known = passes if skipped == "nothing" else torch.ones_like(passes)
    expected = reference_attention(queries, keys, values, tuple(lengths), known)[passes]
    for row in rows(lengths):
        asked = queries[passing.index]
        if skipped == "nothing":
            attended = row.select(passing)(asked, keys[passing.index], values[passing.index])
        else:
            attended = row.cross(passing)(asked, keys, values)
        torch.testing.assert_close(attended[passing.valid], expected)


@pytest.mark.parametrize("knows", [{"window_size", "enable_gqa"}, {"is_causal"}])
def test_torchs_kernel_is_told_what_its_version_understands(knows: set[str]) -> None:
    """Since torch 2.12 it takes a window instead of `is_causal`, and shares keys among queries itself."""

    def kernel(queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor, *_: object, **options: object) -> Tensor:
        assert options.keys() == knows
        assert options.get("window_size", (-1, 0)) == (-1, 0)
        assert (keys.shape[1] == queries.shape[1]) == ("enable_gqa" not in knows)
        return by_definition(queries, keys, values, starts, 70)

    inputs = draw([7, 30], (4, 2), 0)
    starts = torch.tensor([0, 7, 37], dtype=torch.int32)
    attended = _torch_varlen(kernel, frozenset(knows), (-1, 0), *inputs, starts, 32)
    torch.testing.assert_close(attended, reference_attention(*inputs, (7, 30)))


def test_the_backend_fits_the_device() -> None:
    assert isinstance(plan_attention((5, 3), CPU, torch.float32, head_size=16), GroupedRow)
    assert isinstance(plan_attention((5, 3), CPU, torch.bfloat16, head_size=16), GroupedRow)
    with pytest.raises(UserError, match="varlen needs a CUDA device, and this is cpu"):
        plan_attention((5, 3), CPU, torch.bfloat16, "varlen", head_size=16)
    with pytest.raises(UserError, match=r"flash works in bfloat16 or float16, and this is torch.float32"):
        plan_attention((5, 3), torch.device("cuda"), torch.float32, "flash", head_size=16)


def test_the_backend_fits_the_size_of_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention_kernels, "_flash_attention", lambda: None)
    cuda = torch.device("cuda")
    found = [_fastest.__wrapped__(cuda, torch.bfloat16, size) for size in (64, 128, 256, 12, 264)]
    assert found == ["varlen"] * 3 + ["documents"] * 2
    for backend in ("varlen", "flash"):
        with pytest.raises(UserError, match=r"multiple of 8 values, 256 at most, and decoder.head_size is 12: leave"):
            plan_attention((5, 3), cuda, torch.bfloat16, backend, head_size=12)  # type: ignore[arg-type]


@pytest.mark.parametrize("whole", [False, True])
def test_a_package_with_the_newest_part_alone_is_not_flash_attention(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    if whole:
        (tmp_path / "flash_attn" / "__init__.py").write_text("def flash_attn_varlen_func(): ...")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    _flash_attention.cache_clear()
    try:
        fastest = _fastest.__wrapped__(torch.device("cuda"), torch.bfloat16, 64)
    finally:
        _flash_attention.cache_clear()
        sys.modules.pop("flash_attn", None)
    assert fastest == ("flash" if whole else "varlen")


def test_documents_of_tokens_are_found_from_where_they_start() -> None:
    """Also where some have none."""
    lengths = (0, 3, 0, 0, 2, 1, 0)
    row = VarlenRow.of(lengths, CPU, by_definition)
    assert row.starts.tolist() == [0, 0, 3, 3, 3, 5, 6, 6]
    assert row.places.document.tolist() == [1, 1, 1, 4, 4, 5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("backend", ["documents", "varlen", "flex"])
@pytest.mark.parametrize("seed", range(5))
def test_kernels_are_the_reference_forward_and_backward(backend: str, seed: int) -> None:
    """In bfloat16, whose rounding is 2^-9 of a value."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 300, (20,), generator=generator).tolist()
    inputs = [tensor.cuda().requires_grad_() for tensor in draw(lengths, HEADS[seed % 3], seed)]
    expected = reference_attention(*inputs, tuple(lengths))
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * direction).sum(), inputs)
    fast = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs]
    plan = plan_attention(tuple(lengths), torch.device("cuda"), torch.bfloat16, backend, head_size=16)  # type: ignore[arg-type]
    planned = plan(*fast)
    found = torch.autograd.grad((planned * direction.bfloat16()).sum(), fast)
    torch.testing.assert_close(planned.double(), expected, atol=3e-2, rtol=3e-2)
    for gradient, wanted in zip(found, gradients, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, atol=1e-1, rtol=5e-2)
