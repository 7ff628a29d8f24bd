"""Which weights decay, who updates them, and what the updates are."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fuyu_e2e.errors import UserError
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.training import optimizers as optimizers_module
from fuyu_e2e.training.optimizers import MuonAdamW, OptimizerConfig, build_optimizer, orthogonalize
from fuyu_e2e.training.schedule import Schedule


def names(decoder: Decoder, group: dict) -> set[str]:
    held = {id(weight) for weight in group["params"]}
    return {name for name, weight in decoder.named_parameters() if id(weight) in held}


ADAMW = {"kind": "adamw", "lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8}
MUON = {"kind": "muon", "lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}


class Watched(TorchDispatchMode):
    """Knows which operations ran, and the most bytes that tensors made by them took at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(str(func))
        given = {id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in {*given, *self._alive}:
                self._alive[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, id(storage))
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


def with_gradients(count: int, shape: tuple[int, int], device: str) -> list[torch.nn.Parameter]:
    weights = [torch.nn.Parameter(torch.randn(shape, device=device)) for _ in range(count)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return weights


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
    options = {name: value for name, value in ADAMW.items() if name != "kind"}
    optimizers = [
        MuonAdamW([{"params": list(ours.parameters()), **ADAMW}]),
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


@pytest.mark.parametrize("counted_on", ["cpu", "cuda:0"])
def test_adamw_is_fused_on_a_gpu_and_goes_on_there_from_any_device(counted_on: str) -> None:
    with FakeTensorMode():
        weights = with_gradients(2, (4, 4), "cuda")
        optimizer = MuonAdamW([{"params": weights, **ADAMW}])
        optimizer.step()
        saved = optimizer.state_dict()
        for kept in saved["state"].values():
            kept["step"] = kept["step"].to(counted_on)
        optimizer.load_state_dict(saved)
        with Watched() as watched:
            optimizer.step()
    assert watched.operations.count("aten._fused_adamw_.default") == 1
    assert {kept.device.type for weight in weights for kept in optimizer.state[weight].values()} == {"cuda"}


@pytest.mark.parametrize("shape", [(12, 12), (24, 8), (8, 24)])
def test_muon_updates_are_torchs_up_to_its_bfloat16(shape: tuple[int, int]) -> None:
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    options = {name: value for name, value in MUON.items() if name != "kind"}
    optimizers = [
        MuonAdamW([{"params": [ours], **MUON}]),
        torch.optim.Muon([theirs], nesterov=True, **options),
    ]
    for step in range(4):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    assert (ours - 1).abs().mean() > 0.005
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("group", [ADAMW, MUON], ids=["adamw", "muon"])
def test_a_step_that_is_to_change_nothing_changes_no_bit(group: dict[str, Any], value: float) -> None:
    """And one that is not to be skipped is that of an optimizer which doesn't look."""
    torch.manual_seed(0)
    weights = with_gradients(3, (12, 8), "cpu")
    optimizer, plain = (
        MuonAdamW([{"params": [torch.nn.Parameter(weight.detach().clone()) for weight in weights], **group}])
        for _ in range(2)
    )

    def step(one: MuonAdamW, spoiled: bool) -> list[torch.Tensor]:
        for weight, own in zip(weights, one.param_groups[0]["params"], strict=True):
            own.grad = weight.grad.clone()
        if spoiled:
            one.param_groups[0]["params"][1].grad[3, 2] = value
        one.step()
        kept = [tensor for state in one.state.values() for tensor in state.values()]
        return [tensor.detach().clone() for tensor in (*one.param_groups[0]["params"], *kept)]

    optimizer.found_inf = torch.zeros(())
    before = step(optimizer, spoiled=False)
    torch.testing.assert_close(before, step(plain, spoiled=False), rtol=0, atol=1e-7)
    optimizer.found_inf = torch.ones(())
    assert all(map(torch.equal, before, step(optimizer, spoiled=True)))
    optimizer.found_inf = torch.zeros(())
    torch.testing.assert_close(step(optimizer, spoiled=False), step(plain, spoiled=False), rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(2_048, 2_048), (1_024, 4_096), (4_096, 1_024)])
@pytest.mark.parametrize(("device", "copies", "guarded"), [("cuda", 3, False), ("cuda", 4, True), ("cpu", 5, False)])
def test_muon_takes_no_more_memory_for_more_matrices(
    shape: tuple[int, int], device: str, copies: int, guarded: bool
) -> None:
    with FakeTensorMode():  # 64 matrices of 16 MiB, where MUON_BYTES is 256 MiB
        optimizer = MuonAdamW([{"params": with_gradients(64, shape, device), **MUON}])
        if guarded:
            optimizer.found_inf = torch.zeros((), device=device)
        optimizer.step()  # makes the momenta
        with Watched() as watched:
            optimizer.step()
    single_numbers = 1_024
    assert optimizers_module.MUON_BYTES <= watched.peak <= copies * optimizers_module.MUON_BYTES + single_numbers


def test_muon_updates_matrices_in_parts_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for most in (2**28, 2 * 4 * 24 * 40):
        monkeypatch.setattr(optimizers_module, "MUON_BYTES", most)
        torch.manual_seed(0)
        weights = with_gradients(5, (24, 40), "cpu")
        optimizer = MuonAdamW([{"params": weights, **MUON}])
        with Watched() as watched:
            optimizer.step()
            optimizer.step()
        found.append((weights, watched.operations.count("aten.stack.default")))
    (together, once), (parted, often) = found
    assert (once, often) == (2, 6)
    torch.testing.assert_close(parted, together, rtol=0, atol=0)


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
