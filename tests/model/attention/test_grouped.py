"""The planned attention against its definition in float64, forward and backward."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.model.attention.grouped import GroupedRow, MaskedAttention
from fuyu_e2e.model.attention.interface import Places, reference_attention
from fuyu_e2e.model.attention.mask import CAUSAL
from fuyu_e2e.model.rope import rotary, rotate
from fuyu_e2e.model.routing.block import gather_passing

lengths = st.lists(st.integers(1, 70), min_size=1, max_size=12)


@given(lengths=lengths, heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (3, 3)]), seed=st.integers(0, 100))
def test_planned_attention_is_the_reference(lengths: list[int], heads: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(sum(lengths), count, 8, generator=generator, dtype=torch.float64)

    queries, keys, values = draw(heads[0]), draw(heads[1]), draw(heads[1])
    direction = draw(heads[0])
    for tensor in (queries, keys, values):
        tensor.requires_grad_()
    expected = reference_attention(queries, keys, values, tuple(lengths))
    expected_gradients = torch.autograd.grad((expected * direction).sum(), [queries, keys, values])
    fast = [tensor.detach().float().requires_grad_() for tensor in (queries, keys, values)]
    planned = GroupedRow.of(tuple(lengths), torch.device("cpu"))(*fast)
    gradients = torch.autograd.grad((planned * direction.float()).sum(), fast)
    torch.testing.assert_close(planned, expected.float(), atol=1e-5, rtol=1e-4)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted.float(), atol=1e-4, rtol=1e-4)


@given(lengths=lengths)
def test_a_row_costs_its_documents_squares_not_its_own(lengths: list[int]) -> None:
    plan = GroupedRow.of(tuple(lengths), torch.device("cpu"))
    paid = sum(documents * length**2 for documents, length in plan.groups)
    assert paid <= sum((length + 15) ** 2 for length in lengths)
    assert sum(documents for documents, _ in plan.groups) == len(lengths)


@given(lengths=lengths, seed=st.integers(0, 1_000), skipped=st.sampled_from(["nothing", "keys"]))
def test_attention_of_passing_tokens_is_the_reference(lengths: list[int], seed: int, skipped: str) -> None:
    """As planned on the CPU and as masked elsewhere, against the whole row with a mask over its keys."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    queries, keys, values = (torch.randn(total, heads, 8, generator=generator) for heads in (4, 2, 2))
    passes = torch.rand(total, generator=generator) < torch.rand(1, generator=generator)
    capacity = min(total, int(passes.sum()) + 3)
    passing = gather_passing(passes, capacity) if capacity else gather_passing(passes, None)
    known = passes if skipped == "nothing" else torch.ones_like(passes)
    expected = reference_attention(queries, keys, values, tuple(lengths), known)[passes]
    plan = GroupedRow.of(tuple(lengths), torch.device("cpu"))
    asked = queries[passing.index]
    places = Places.of(tuple(lengths), ()).on(queries.device)
    own = places.take(passing.index)
    if skipped == "nothing":
        own = own._replace(document=passing.documents(places.document, -1))
        given = (asked, keys[passing.index], values[passing.index])
        contenders = [plan.select(passing), MaskedAttention.of(CAUSAL, own, own)]
    else:
        given = (asked, keys, values)
        contenders = [plan.cross(passing), MaskedAttention.of(CAUSAL, own, places)]
    for attend in contenders:
        attended = attend(*given)
        assert attended.shape == asked.shape
        assert attended.isfinite().all()
        torch.testing.assert_close(attended[passing.valid], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "planned_heads"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_gpu_is_asked_for_kernels_that_serve_it(
    dtype: torch.dtype, planned_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU in the place of one: cuDNN is left out, and keys are repeated where kernels know no sharing."""
    queries, keys, values = (torch.randn(50, heads, 8, dtype=dtype) for heads in (4, 2, 2))
    attend = torch.nn.functional.scaled_dot_product_attention
    asked: list[tuple[int, bool]] = []

    def look(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **options: Any) -> torch.Tensor:
        asked.append((keys.shape[1], torch.backends.cuda.cudnn_sdp_enabled()))
        return attend(queries, keys, values, **options)

    expected = reference_attention(queries.float(), keys.float(), values.float(), (30, 20))
    plan = GroupedRow.of((30, 20), torch.device("cpu"))
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", look)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    planned = plan(queries, keys, values)
    assert asked == [(planned_heads, False)]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    places = Places.of((30, 20), ()).on(queries.device)
    masked = MaskedAttention.of(CAUSAL, places, places)(queries, keys, values)
    assert asked[1][0] == 4
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for found in (planned, masked):
        torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


def test_rotary_scores_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 16)

    def score(query_at: int, key_at: int) -> float:
        turned = [rotate(x, *rotary(torch.tensor([at]), 16, 10_000.0)) for x, at in ((query, query_at), (key, key_at))]
        return float((turned[0] * turned[1]).sum())

    assert abs(score(5, 2) - score(105, 102)) < 1e-4
    assert abs(score(5, 2) - score(5, 3)) > 1e-3
