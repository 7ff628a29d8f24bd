"""Under every strategy a run is the run of one process, and goes on under any other, on any number of processes."""

import atexit
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy, StrategyRegistry
from torch._subclasses.fake_tensor import FakeTensorMode

from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.errors import UserError
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.parallel import _check_heads
from fuyu_e2e.training.callbacks import heartbeat as hosts
from fuyu_e2e.training.callbacks.evaluation import EvaluationInTraining
from fuyu_e2e.training.callbacks.watchdog import Watchdog
from fuyu_e2e.training.checkpoint_io import BackgroundCheckpointIO
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.optimizers import MuonAdamW
from fuyu_e2e.training.strategies import Sharded, check_strategy

SCRIPT = Path(__file__).with_name("sharded_runs.py")
STRATEGIES: dict[str, tuple[int, Any]] = {
    "one process": (1, None),
    "ddp": (2, None),
    "fsdp2": (2, {}),
    "hsdp": (2, {"replicas": 2}),
    "tensor parallel": (2, {"tensor_parallel": 2}),
    "fsdp2 and tensor parallel": (4, {"tensor_parallel": 2}),
    "hsdp of four": (4, {"replicas": 2}),
}
"""Processes and settings."""
USUAL = {"routed": True, "optimizer": "muon", "clip": 0.5}


def run(folder: Path, *runs: dict[str, Any]) -> None:
    """Does runs, each with the `under` of `STRATEGIES`; earlier numbers of processes first."""
    phases: list[tuple[int, list[dict[str, Any]]]] = []
    for wanted in runs:
        processes, strategy = STRATEGIES[wanted["under"]]
        if not phases or phases[-1][0] != processes:
            phases.append((processes, []))
        phases[-1][1].append(USUAL | wanted | {"strategy": strategy})
    # Tests before this one may have seeded through Lightning, which leaves its seed to processes that it starts.
    environment = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), json.dumps(phases)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def losses(folder: Path, name: str, figure: str = "train/loss") -> torch.Tensor:
    return torch.tensor(json.loads((folder / f"{name}.json").read_text())[figure])


def tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Weights, buffers and the optimizer's state, whole."""
    return torch.load(folder / f"{name}.pt", weights_only=True)  # noqa: TID251


def assert_same_run(folder: Path, name: str, reference: str, atol: float = 5e-6) -> None:
    """Losses to `atol`; gradient norms, which are larger than 10 at first, to 5e-6 of themselves too."""
    for figure, rtol in {"train/loss": 0.0, "train/gradient_norm": 5e-6, "tokens": 0.0, "val/loss": 0.0}.items():
        told, wanted = (losses(folder, each, figure) for each in (name, reference))
        torch.testing.assert_close(told, wanted, atol=atol, rtol=rtol, msg=f"{name}: {figure}")


def settled(weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """All but the histogram of scores, in which a score on the edge of a bin falls to either side."""
    return ((name, tensor) for name, tensor in weights.items() if not name.endswith(".history"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, the same under three strategies, and runs that go on from them under others."""
    folder = tmp_path_factory.mktemp("strategies")
    usual: dict[str, Any] = {"steps": 8, "validate": 8, "text_rows": True}
    selective, full = ({"activation_checkpointing": kind} for kind in ("selective", "full"))
    run(
        folder,
        {"name": "alone", "under": "one process", **usual, "validate": 16},
        {"name": "ddp", "under": "ddp", "steps": 8, "text_rows": True},
        {"name": "fsdp2", "under": "fsdp2", **usual, "model": selective},
        {"name": "tp", "under": "tensor parallel", **usual, "validate": 16, "model": full},
        {"name": "fsdp2-ddp", "under": "ddp", "resume": "fsdp2", "steps": 8},
        {"name": "alone-fsdp2", "under": "fsdp2", "resume": "alone", "steps": 8},
        {"name": "fsdp2-tp", "under": "tensor parallel", "resume": "fsdp2", "steps": 8},
        {"name": "tp-alone", "under": "one process", "resume": "tp", "steps": 8},
        {"name": "fsdp2-four", "under": "fsdp2 and tensor parallel", "resume": "fsdp2", "steps": 8},
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("name", ["fsdp2", "tp"])
def test_a_run_in_parts_is_the_run_of_one_process(folder: Path, name: str) -> None:
    """One rank of two has text alone, blocks are routed, gradients clipped, and activations recomputed.

    Ranks have unequal numbers of validation rows, and go through as many all the same.
    """
    assert_same_run(folder, name, "alone")
    alone = tensors(folder, "alone")
    for weight, tensor in settled(tensors(folder, name)):
        torch.testing.assert_close(tensor, alone[weight], atol=1e-5, rtol=1e-4, msg=f"{name}: {weight}")


def test_two_processes_of_two_rows_have_the_losses_of_one_of_four(folder: Path) -> None:
    """To 1e-6, though one's rows have fewer supervised tokens than the other's."""
    torch.testing.assert_close(losses(folder, "ddp"), losses(folder, "alone"), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["fsdp2-ddp", "alone-fsdp2", "fsdp2-tp", "tp-alone", "fsdp2-four"])
def test_every_tensor_is_the_same_under_another_strategy(folder: Path, name: str) -> None:
    before, after = tensors(folder, name.split("-")[0]), tensors(folder, name)
    assert before.keys() == after.keys()
    assert any(".momentum" in entry for entry in before)
    assert any(".exp_avg_sq" in entry for entry in before)
    for entry, tensor in before.items():
        assert torch.equal(tensor, after[entry]), entry


@pytest.mark.slow
@pytest.mark.parametrize("connector", [None, "fuyu_e2e.model.images.mlp.MLPConfig"])
def test_what_images_pass_is_the_same_in_parts(tmp_path: Path, connector: str | None) -> None:
    """With every option, on ranks of which some have text alone; also under masks by depth."""
    decoder: dict[str, Any] = {"image_norm": True, "grid_embeddings": 8, "rotary": "2d"}
    decoder["patch_masking"] = {"images": 1.0, "share": 1.0}
    if connector is not None:
        decoder["connector"] = {"class_path": connector, "init_args": {"hidden": 24}}
        decoder["masks"] = [{"window": 9, "sinks": 1}, {"images": "bidirectional"}, {"window": 20}]
    places = ["one process", "ddp", "fsdp2", "tensor parallel"]
    run(tmp_path, *({"name": place, "under": place, "text_rows": True, "decoder": decoder} for place in places))
    alone = tensors(tmp_path, "one process")
    for name in ("grid_embeddings.rows", "masked_patches.embedding"):
        assert alone[f"decoder.{name}"].abs().sum() > 0
    for place in places[1:]:
        torch.testing.assert_close(losses(tmp_path, place), losses(tmp_path, places[0]), atol=5e-6, rtol=0)
        for weight, tensor in settled(tensors(tmp_path, place)):
            torch.testing.assert_close(tensor, alone[weight], atol=1e-5, rtol=1e-4, msg=f"{place}: {weight}")


@pytest.mark.slow
def test_fifty_steps_under_every_strategy_give_the_losses_of_one_process(tmp_path: Path) -> None:
    """To 5 decimals, with AdamW and with Muon, dense and routed."""
    kinds: dict[str, dict[str, Any]] = {
        "muon": {"routed": False},
        "adamw": {"optimizer": "adamw", "decoder": {"tie_embeddings": True}},
    }
    runs = [
        {"name": f"{under}, {kind}", "under": under, "steps": 50, **settings}
        for under in STRATEGIES
        for kind, settings in kinds.items()
    ]
    run(tmp_path, *runs)
    for wanted in runs:
        assert_same_run(tmp_path, wanted["name"], f"one process, {wanted['name'].split(', ')[1]}")


@pytest.mark.slow
def test_any_strategy_goes_on_from_any_other(tmp_path: Path) -> None:
    """Bitwise where it begins, and to 5 decimals as the run of one process."""
    first = [{"name": under, "under": under} for under in STRATEGIES]
    pairs = [(source, under) for under in STRATEGIES for source in STRATEGIES]
    loaded = [{"name": f"{source} to {under}", "under": under, "resume": source} for source, under in pairs]
    on = [{"name": f"on to {under}", "under": under, "resume": "fsdp2", "steps": 12} for under in STRATEGIES]
    alone = {"name": "alone", "under": "one process", "resume": "one process", "steps": 12}
    run(tmp_path, *first, *loaded, *on, alone)
    for wanted in loaded:
        before, after = tensors(tmp_path, wanted["resume"]), tensors(tmp_path, wanted["name"])
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[entry]) for entry, tensor in before.items()), wanted["name"]
    for wanted in on:
        assert_same_run(tmp_path, wanted["name"], "alone")


@pytest.mark.parametrize(
    "named", ["fsdp", "deepspeed_stage_2", {"class_path": "lightning.pytorch.strategies.FSDPStrategy"}]
)
def test_a_strategy_that_hides_weights_is_refused(named: Any) -> None:
    with pytest.raises(UserError, match="say ddp, fsdp2, hsdp or tensor_parallel"):
        check_strategy(named)
    for good in (None, "auto", "ddp", "fsdp2", {"class_path": "fuyu_e2e.training.strategies.Sharded"}):
        check_strategy(good)


@pytest.fixture(scope="module")
def guarded(guarded_runs: Callable[..., tuple[Path, dict[str, Any]]]) -> tuple[Path, dict[str, Any]]:
    """Runs in parts on two processes that hear signals and meet NaN."""
    runs: list[dict[str, Any]] = [
        {"name": "whole"},
        {"name": "stopped", "signal": "SIGTERM", "ranks": [1], "row": 8},
        {"name": "validating", "signal": "SIGTERM", "ranks": [0], "validate": 9, "when": "validating"},
        {"name": "stopped-resumed", "resume": "stopped"},
        {"name": "validating-resumed", "resume": "validating"},
        {"name": "nan", "nan": "gradient", "ranks": [1], "steps": [2]},
    ]
    return guarded_runs(*(wanted | {"sharded": True} for wanted in runs))


@pytest.mark.parametrize("name", ["stopped", "validating"])
def test_a_signal_to_one_rank_ends_all_and_the_run_goes_on_bitwise(
    guarded: tuple[Path, dict[str, Any]], name: str
) -> None:
    folder, results = guarded
    assert results[name]["codes"] == [143, 143], (folder / name / "0.log").read_text()
    assert results[f"{name}-resumed"]["codes"] == [0, 0], (folder / f"{name}-resumed" / "0.log").read_text()
    for rank in range(2):
        whole, resumed = (
            json.loads((folder / run / f"{rank}.json").read_text()) for run in ("whole", f"{name}-resumed")
        )
        assert 0 < len(resumed["losses"]) < 8
        for kind in ("after_step", "losses", "rows"):
            assert resumed[kind] == whole[kind][-len(resumed[kind]) :], kind
        assert len(set(whole["after_step"])) == 9


def test_nan_in_the_part_of_one_rank_skips_the_step_on_all(guarded: tuple[Path, dict[str, Any]]) -> None:
    folder, results = guarded
    assert results["nan"]["codes"] == [0, 0], (folder / "nan" / "0.log").read_text()
    for rank in range(2):
        after = json.loads((folder / "nan" / f"{rank}.json").read_text())["after_step"]
        assert [step for step in range(8) if after[step] == after[step + 1]] == [2]


def test_heads_that_cannot_be_shared_out_are_refused(config: FuyuConfig) -> None:
    with pytest.raises(UserError, match="4 heads, which 3 tensor parallel devices can't share out"):
        _check_heads(config, 3)
    with pytest.raises(UserError, match="2 kv_heads, which 4 tensor"):
        _check_heads(config, 4)
    _check_heads(config, 2)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "hsdp", "tensor_parallel"])
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_processes_wait_for_each_other_as_long_as_is_said(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    """The first one evaluates while the others wait in a barrier of all."""
    asked: list[timedelta] = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, timeout, **__: asked.append(timeout))
    monkeypatch.setattr(atexit, "register", lambda _: None)
    strategy = StrategyRegistry.get(name)
    strategy.parallel_devices = [torch.device("cpu")]
    strategy.cluster_environment = LightningEnvironment()
    strategy.accelerator = CPUAccelerator()
    strategy._process_group_backend = backend
    with patch.dict(os.environ):
        strategy.setup_distributed() if name == "ddp" else strategy._setup_distributed()
    [timeout] = asked
    said = f"{timeout // timedelta(minutes=1)} minutes"
    for text in (hosts.__doc__, EvaluationInTraining.__doc__, (repository / "docs" / "evaluation.md").read_text()):
        assert said in " ".join((text or "").split())
    assert timeout.total_seconds() < (Watchdog().limit or 0)


@pytest.mark.parametrize("name", ["one device", "ddp", "fsdp2"])
def test_a_seed_draws_the_same_weights_whatever_device_a_strategy_makes_them_on(name: str, config: FuyuConfig) -> None:
    torch.manual_seed(0)
    expected = Decoder(config).state_dict()
    # Draws nothing, in the place of a GPU.
    device = torch.device("meta")
    strategies: dict[str, Strategy] = {
        "one device": SingleDeviceStrategy(device),
        "ddp": DDPStrategy(parallel_devices=[device], cluster_environment=LightningEnvironment()),
        "fsdp2": Sharded(),
    }
    torch.manual_seed(0)
    module = FuyuModule(config)
    with strategies[name].tensor_init_context():
        module.configure_model()
    torch.testing.assert_close(module.decoder.state_dict(), expected, rtol=0, atol=0)


def test_what_the_optimizer_keeps_is_left_to_who_copies_checkpoints() -> None:
    """A copy to the host for each tensor would make it wait for each."""
    layer = torch.nn.Linear(2, 2)
    optimizer = MuonAdamW([{"params": [layer.weight], "kind": "muon", "lr": 0.1, "momentum": 0.9, "weight_decay": 0}])
    strategy = Sharded()
    strategy._lightning_module = layer  # type: ignore[assignment]
    with FakeTensorMode():
        momentum = torch.empty(2, 2, device="cuda")
    optimizer.state[layer.weight]["momentum"] = momentum
    state = strategy.optimizer_state(optimizer)["state"]
    assert state["weight"]["momentum"] is momentum
    optimizer.state[layer.weight]["momentum"] = None
    assert state["weight"]["momentum"] is momentum


def test_a_run_in_parts_ends_behind_its_last_checkpoint() -> None:
    """Lightning's strategy for parts doesn't wait: the run would name the checkpoint before as its last."""
    strategy = Sharded()
    strategy.accelerator, strategy.cluster_environment = CPUAccelerator(), LightningEnvironment()
    strategy.checkpoint_io = writer = BackgroundCheckpointIO()
    written: list[Any] = []

    def slowly(checkpoint: dict[str, Any], path: Any, storage_options: Any) -> None:
        time.sleep(0.2)
        written.append(path)

    with patch.object(writer.checkpoint_io, "save_checkpoint", slowly):
        writer.save_checkpoint({}, "last.ckpt")
        strategy.teardown()
    assert written == ["last.ckpt"]


def test_weights_in_parts_are_not_averaged(config: FuyuConfig, question_data: Callable[..., FuyuDataModule]) -> None:
    """Lightning would copy the model, which torch refuses with an assertion."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=Sharded(),
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        callbacks=[EMAWeightAveraging()],
    )
    try:
        # Lightning leaves in the environment which rank this is, to whatever comes after.
        with (
            patch.dict(os.environ),
            pytest.raises(UserError, match=r"leave that callback out, or say --trainer.strategy ddp"),
        ):
            trainer.fit(FuyuModule(config), question_data())
    finally:
        dist.destroy_process_group()
