"""Attention masks: each backend against loops over queries and keys in float64."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention

from fuyu_e2e.errors import UserError
from fuyu_e2e.model.attention import grouped as attention_plans
from fuyu_e2e.model.attention.grouped import MaskedAttention, TiledAttention, TiledRow
from fuyu_e2e.model.attention.interface import Places, RowAttention, reference_attention
from fuyu_e2e.model.attention.kernels import FlexRow, VarlenRow, _varlen_kernel
from fuyu_e2e.model.attention.mask import CAUSAL, AttentionMask
from fuyu_e2e.model.config import named_size
from fuyu_e2e.model.routing.block import gather_passing

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CPU = torch.device("cpu")
Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class EvenDistance(AttentionMask):
    """Shows tokens at an even distance: a mask of a user's own."""

    def sees(self, query: Any, key: Any, same_image: Any) -> Any:
        return super().sees(query, key, same_image) & ((query - key) % 2 == 0)


MASKS = [
    CAUSAL,
    AttentionMask(window=1),
    AttentionMask(window=20),
    AttentionMask(window=20, sinks=3),
    AttentionMask(images="bidirectional"),
    AttentionMask(window=40, sinks=2, images="bidirectional"),
    EvenDistance(),
    EvenDistance(window=12, sinks=1),
]
masks = st.sampled_from(MASKS)


@st.composite
def rows(draw: st.DrawFn) -> tuple[tuple[int, ...], Bounds]:
    """Lengths of documents, and images of up to 30 tokens in them."""
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    images, start = [], 0
    for length in lengths:
        at = start + draw(st.integers(0, 9))
        while at < start + length:
            stop = min(at + draw(st.integers(1, 30)), start + length)
            images.append((at, stop))
            at = stop + draw(st.integers(0, 25))
        start += length
    return tuple(lengths), tuple(images)


def visible(mask: AttentionMask, lengths: tuple[int, ...], images: Bounds) -> list[list[int]]:
    """The tokens that each token of a row sees, from what the settings of a mask mean."""
    bounds = [(sum(lengths[:number]), sum(lengths[: number + 1])) for number in range(len(lengths))]
    found = []
    for query in range(sum(lengths)):
        begin = next(begin for begin, end in bounds if begin <= query < end)
        image = next(((a, b) for a, b in images if a <= query < b), (query, query))
        shown = []
        for key in range(begin, max(query + 1, image[1])):
            near = mask.window is None or query - key < mask.window or key - begin < mask.sinks
            seen = key <= query and near
            seen |= mask.images == "bidirectional" and image[0] <= key < image[1]
            if isinstance(mask, EvenDistance):
                seen &= (query - key) % 2 == 0
            if seen:
                shown.append(key)
        found.append(shown)
    return found


def by_definition(q: Tensor, k: Tensor, v: Tensor, shown: list[list[int]]) -> Tensor:
    """Attention of each query to the keys that it is shown; of one that is shown none, 0."""
    allowed = torch.zeros(len(q), len(k), dtype=torch.bool)
    for token, keys in enumerate(shown):
        allowed[token, keys] = True
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = (torch.einsum("thk,shk->hts", q, k) / math.sqrt(q.shape[2])).exp() * allowed
    return torch.einsum("hts,shk->thk", scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-300), v)


def draw_inputs(total: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(total, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]


def varlen(mask: AttentionMask) -> list[AttentionMask]:
    return [mask] if type(mask) is AttentionMask and not mask.sinks and mask.images == "causal" else []


def kernel_of(mask: AttentionMask) -> Any:
    def kernel(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
        return reference_attention(q, k, v, tuple(starts.diff().tolist()), mask=mask)

    return kernel


def backends(mask: AttentionMask, lengths: tuple[int, ...], images: Bounds) -> list[RowAttention]:
    found: list[RowAttention] = [TiledRow.of(mask, lengths, images, CPU), FlexRow.of(lengths, CPU, mask, images)]
    return found + [VarlenRow.of(lengths, CPU, kernel_of(one), one) for one in varlen(mask)]


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    """So that documents of a test are cut, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_plans, "TILE", 16)
        patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # else it compiles each mask
        yield


@pytest.mark.parametrize("mask", MASKS, ids=str)
@settings(max_examples=settings.default.max_examples // 7)
@given(row=rows(), seed=st.integers(0, 100))
def test_backends_compute_what_the_mask_says(
    mask: AttentionMask, row: tuple[tuple[int, ...], Bounds], seed: int
) -> None:
    lengths, images = row
    inputs = draw_inputs(sum(lengths), seed)
    expected = by_definition(*inputs, visible(mask, lengths, images))
    torch.testing.assert_close(reference_attention(*inputs, lengths, mask=mask, images=images), expected)
    for attention in backends(mask, lengths, images):
        torch.testing.assert_close(attention(*inputs), expected)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@settings(max_examples=settings.default.max_examples // 7)
@given(row=rows(), seed=st.integers(0, 1_000), skipped=st.sampled_from(["nothing", "keys"]))
def test_passing_tokens_see_what_the_mask_says(
    mask: AttentionMask, row: tuple[tuple[int, ...], Bounds], seed: int, skipped: str
) -> None:
    """A window counts tokens of the document, also those that don't pass."""
    lengths, images = row
    queries, keys, values = draw_inputs(sum(lengths), seed)
    generator = torch.Generator().manual_seed(seed)
    passes = torch.rand(sum(lengths), generator=generator) < torch.rand(1, generator=generator)
    passing = gather_passing(passes, min(len(passes), int(passes.sum()) + 3))
    known = {*passes.nonzero()[:, 0].tolist()} if skipped == "nothing" else {*range(len(passes))}
    shown = [[key for key in keys if key in known] for keys in visible(mask, lengths, images)]
    expected = by_definition(queries, keys, values, shown)[passes]
    places = Places.of(lengths, images).on(CPU)
    own = places.take(passing.index)
    own_only = own._replace(document=passing.documents(places.document, -1))
    for row_attention in [*backends(mask, lengths, images), None]:
        asked = queries[passing.index]
        if skipped == "nothing":
            on_device = MaskedAttention.of(mask, own_only, own_only)
            attend = on_device if row_attention is None else row_attention.select(passing)
            attended = attend(asked, keys[passing.index], values[passing.index])
        else:
            on_device = MaskedAttention.of(mask, own, places)
            attend = on_device if row_attention is None else row_attention.cross(passing)
            attended = attend(asked, keys, values)
        assert attended.isfinite().all()
        torch.testing.assert_close(attended[passing.valid], expected)


def test_gradients_pass_through_tiles() -> None:
    lengths, images, mask = (70, 45), ((3, 20), (75, 100)), AttentionMask(window=25, sinks=2, images="bidirectional")
    inputs = [tensor.requires_grad_() for tensor in draw_inputs(115, 0)]
    direction = torch.randn_like(inputs[0])
    expected = by_definition(*inputs, visible(mask, lengths, images))
    wanted = torch.autograd.grad((expected * direction).sum(), inputs)
    found = torch.autograd.grad((TiledRow.of(mask, lengths, images, CPU)(*inputs) * direction).sum(), inputs)
    for gradient, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, right)


@given(lengths=st.lists(st.integers(1, 2_000), min_size=1, max_size=4))
def test_a_window_costs_its_own_width(lengths: list[int]) -> None:
    places = Places.of(tuple(lengths), ())
    plan = TiledAttention.of(AttentionMask(window=64, sinks=4), places, places, CPU)
    most = max(attention_plans.TILE, 64 // 2)
    assert all(keys <= 64 + 4 + most + 15 for _, _, keys in plan.groups)
    assert sum(tiles for tiles, _, _ in plan.groups) == sum(-(-length // most) for length in lengths)


def test_kernels_are_given_the_masks_that_they_know(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(q: Tensor, *_: Any, causal: bool, window_size: tuple[int, int]) -> Tensor:
        return torch.tensor(window_size)

    monkeypatch.setattr("fuyu_e2e.model.attention.kernels._flash_attention", lambda: kernel)
    _varlen_kernel.cache_clear()
    try:
        windows = []
        for mask in MASKS:
            found = _varlen_kernel("flash", mask)
            windows.append(None if found is None else tuple(found(*draw_inputs(3, 0), torch.zeros(2), 3).tolist()))
    finally:
        _varlen_kernel.cache_clear()
    assert windows == [(-1, 0), (0, 0), (19, 0), None, None, None, None, None]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"window": 0}, "holds a window of 0, .* set 1 or more"),
        ({"window": 8, "sinks": -1}, "holds -1 sinks, but it must be 0 or more"),
        ({"sinks": 4}, "holds 4 sinks without a window, .* set a window"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=rf"decoder\.masks {said}"):
        AttentionMask(**values)


def test_a_window_smaller_than_an_image_is_refused() -> None:
    mask = AttentionMask(window=64, images="bidirectional")
    mask.check_images(64)
    with pytest.raises(UserError, match=r"window of 64, but an image has up to 72 tokens: set the window to 72 or"):
        mask.check_images(72)


@dataclass(frozen=True, kw_only=True)
class Broken(AttentionMask):
    """Breaks in the way that `how` names."""

    how: str = ""

    def sees(self, query: Any, key: Any, same_image: Any) -> Any:
        seen = super().sees(query, key, same_image)
        return {
            "future": seen | (key == query + 3),
            "past": seen | (key == query - self.cache_slots) if self.cache_slots else seen,
            "self": seen & (query != key),
            "numbers": seen.long(),
            "shape": seen[:1],
            "nothing": None,
        }[self.how]


@dataclass(frozen=True, kw_only=True)
class Misspelt(AttentionMask):
    def see(self, query: Any, key: Any, same_image: Any) -> Any:
        return key > query


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (Broken(how="future"), r"Broken in decoder.masks shows position 3 to position 0, which .* hide: narrow"),
        (Broken(how="past", window=5, sinks=2), r"shows position \d+ to position \d+, which .* hide: narrow"),
        (Broken(how="self"), r"hides a token from itself: let `sees` be true where query == key"),
        (Broken(how="numbers"), r"must return a bool tensor of the shape .* not torch.int64 \[32, 32\]"),
        (Broken(how="shape"), r"must return a bool tensor of the shape .* not torch.bool \[1, 32\]"),
        (Broken(how="nothing"), r"must return a bool tensor of the shape .* not NoneType \[\]"),
        (Misspelt(), r"Misspelt in decoder.masks has no method `sees` of its own"),
    ],
    ids=repr,
)
def test_a_mask_that_would_leak_or_hide_too_much_is_refused(mask: AttentionMask, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        replace(named_size("1m"), masks=(mask,))


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_masks_that_narrow_are_taken(mask: AttentionMask) -> None:
    assert replace(named_size("1m"), masks=(mask,)).masks == (mask,)
