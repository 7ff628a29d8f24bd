"""Which weights decay, who updates them, and what the updates are."""

import pytest
import torch

from fuyu_e2e.errors import UserError
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.training.optimizers import MuonAdamW, OptimizerConfig, build_optimizer, orthogonalize
from fuyu_e2e.training.schedule import Schedule


def names(decoder: Decoder, group: dict) -> set[str]:
    held = {id(weight) for weight in group["params"]}
    return {name for name, weight in decoder.named_parameters() if id(weight) in held}


def test_only_matrices_decay_and_muon_takes_those_of_the_blocks(decoder: Decoder) -> None:
    matrices, vectors = build_optimizer(decoder, OptimizerConfig()).param_groups
    assert vectors["weight_decay"] == 0
    assert names(decoder, vectors) == {name for name, weight in decoder.named_parameters() if weight.ndim == 1}
    everything = names(decoder, matrices) | names(decoder, vectors)
    assert everything == {name for name, _ in decoder.named_parameters()}
    *_, muon = build_optimizer(decoder, OptimizerConfig(name="muon")).param_groups
    assert names(decoder, muon) == {
        n for n, w in decoder.named_parameters() if n.startswith("blocks.") and w.ndim == 2
    }


def test_adamw_updates_are_torchs() -> None:
    ours, theirs = (torch.nn.Linear(7, 5) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8}
    optimizers = [
        MuonAdamW([{"params": list(ours.parameters()), "kind": "adamw", **options}]),
        torch.optim.AdamW(theirs.parameters(), **options),
    ]
    for _ in range(5):
        x = torch.randn(3, 7)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


@pytest.mark.parametrize("shape", [(12, 12), (24, 8), (8, 24)])
def test_muon_updates_are_torchs_up_to_its_bfloat16(shape: tuple[int, int]) -> None:
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    options = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    optimizers = [
        MuonAdamW([{"params": [ours], "kind": "muon", **options}]),
        torch.optim.Muon([theirs], nesterov=True, **options),
    ]
    for step in range(4):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    assert (ours - 1).abs().mean() > 0.005
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_orthogonalized_matrices_keep_their_directions() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 16, 40)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    turned = left.mT @ orthogonalize(matrices) @ right.mT
    values = turned.diagonal(dim1=-2, dim2=-1)
    assert (values > 0.5).all()
    assert (values < 1.3).all()
    assert (turned - torch.diag_embed(values)).abs().max() < 1e-3


@pytest.mark.parametrize("shape", ["cosine", "wsd"])
def test_the_rate_rises_stays_and_falls(shape: str) -> None:
    schedule, steps = Schedule(shape=shape, warmup=0.1, decay=0.5, final=0.1), 200  # type: ignore[arg-type]
    factors = [schedule.factor(step, steps) for step in range(steps)]
    assert 0 < factors[0] <= 0.05
    assert factors[19] == 1.0
    assert factors[:20] == sorted(factors[:20])
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert factors[-1] == pytest.approx(0.1, abs=0.01)
    if shape == "wsd":
        assert set(factors[20:100]) == {1.0}
        assert factors[150] == pytest.approx(0.55, abs=0.01)


@pytest.mark.parametrize(
    "wrong", [{"lr": 0.0}, {"muon_lr": -1.0}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}, {"muon_momentum": 1.0}]
)
def test_impossible_rates_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        OptimizerConfig(**wrong)


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(UserError, match=r"schedule\.warmup is 1\.5"):
        Schedule(warmup=1.5)
    with pytest.raises(UserError, match="add up to more"):
        Schedule(warmup=0.6, decay=0.6)
