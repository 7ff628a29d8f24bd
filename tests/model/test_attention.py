"""The planned attention against its definition in float64, forward and backward."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.model.attention import AttentionPlan, reference_attention, rotary, rotate

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
    planned = AttentionPlan.of(tuple(lengths), torch.device("cpu"))(0, *fast)
    gradients = torch.autograd.grad((planned * direction.float()).sum(), fast)
    torch.testing.assert_close(planned, expected.float(), atol=1e-5, rtol=1e-4)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted.float(), atol=1e-4, rtol=1e-4)


@given(lengths=lengths)
def test_a_row_costs_its_documents_squares_not_its_own(lengths: list[int]) -> None:
    plan = AttentionPlan.of(tuple(lengths), torch.device("cpu"))
    paid = sum(documents * length**2 for documents, length in plan.groups)
    assert paid <= sum((length + 15) ** 2 for length in lengths)
    assert sum(documents for documents, _ in plan.groups) == len(lengths)


def test_rotary_scores_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 16)

    def score(query_at: int, key_at: int) -> float:
        turned = [rotate(x, *rotary(torch.tensor([at]), 16, 10_000.0)) for x, at in ((query, query_at), (key, key_at))]
        return float((turned[0] * turned[1]).sum())

    assert abs(score(5, 2) - score(105, 102)) < 1e-4
    assert abs(score(5, 2) - score(5, 3)) > 1e-3
