"""A run that stopped anywhere goes on bitwise, whatever its workers; on other processes it sees the same batches."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.shards.manifest import VERSION
from fuyu_e2e.errors import UserError
from fuyu_e2e.training.module import FuyuModule

SCRIPT = Path(__file__).with_name("resumed_runs.py")
spec = importlib.util.spec_from_file_location("resumed_runs", SCRIPT)
assert spec is not None
assert spec.loader is not None
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)
POSITIONS = [(name, workers) for name in runs.SAVED_BEHIND for workers in (0, 2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of one process, and its resumed ones."""
    folder = tmp_path_factory.mktemp("alone")
    runs.prepare(folder)
    runs.run(folder, "whole", 0, None)
    for name, workers in POSITIONS:
        runs.run(folder, f"{name}-{workers}", workers, name)
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of two processes."""
    folder = tmp_path_factory.mktemp("together")
    runs.prepare(folder)
    wanted = [{"name": "whole", "workers": 0, "resume": None}]
    wanted += [{"name": f"{name}-{workers}", "workers": workers, "resume": name} for name, workers in POSITIONS]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    # Tests before this one may have seeded through Lightning, which leaves its seed to processes that it starts.
    environment = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), json.dumps(wanted)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def described(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{name}-{rank}.json").read_text())


def checkpoint(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / f"{name}.ckpt", weights_only=True)  # noqa: TID251


def flat(state: Any, at: str = "") -> dict[str, Any]:
    if isinstance(state, dict):
        return {name: value for key, part in state.items() for name, value in flat(part, f"{at}.{key}").items()}
    if isinstance(state, list):
        return {name: value for key, part in enumerate(state) for name, value in flat(part, f"{at}.{key}").items()}
    return {at: state}


@pytest.mark.parametrize("processes", ["alone", "together"])
@pytest.mark.parametrize(("position", "workers"), POSITIONS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    request: pytest.FixtureRequest, processes: str, position: str, workers: int
) -> None:
    """Weights, thresholds, optimizer state, later losses, data counts: at a step's end, within a step, at an edge."""
    folder: Path = request.getfixturevalue(processes)
    name = f"{position}-{workers}"
    # What was gathered of a step that was not done is gathered again.
    steps = runs.SAVED_BEHIND[position] // runs.ROWS_PER_STEP
    ranks = 1 if processes == "alone" else 2
    for rank in range(ranks):
        whole, resumed = described(folder, "whole", rank), described(folder, name, rank)
        assert resumed["rows"] == whole["rows"][steps * runs.ROWS_PER_STEP // ranks :]
        assert resumed["losses"] == whole["losses"][steps:]
        for generator, drawn in whole["drawn"].items():
            # The checks of types that pytest puts into our functions draw from Python's generator in this process.
            if (processes, generator) != ("alone", "python"):
                assert resumed["drawn"][generator] == drawn[2 * steps * runs.ROWS_PER_STEP // ranks :]
        assert len(resumed["losses"]) == runs.STEPS - steps
        assert resumed["counts"] == whole["counts"]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        expected, found = flat(checkpoint(folder, "whole")[part]), flat(checkpoint(folder, name)[part])
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            same = torch.equal(value, found[key]) if isinstance(value, torch.Tensor) else value == found[key]
            assert same, key
    seen = [checkpoint(folder, one)["fuyu_e2e"]["tokens_seen"] for one in ("whole", name)]
    assert seen[0] == seen[1] > 0


def test_one_process_and_two_see_the_same_batches(alone: Path, together: Path) -> None:
    rows = described(alone, "whole")["rows"]
    assert described(together, "whole", 0)["rows"] == rows[0::2]
    assert described(together, "whole", 1)["rows"] == rows[1::2]
    assert described(together, "whole", 1)["drawn"] != described(together, "whole", 0)["drawn"]
    assert len(rows) == runs.STEPS * runs.ROWS_PER_STEP
    assert len(set(rows)) > len(rows) / 2


@pytest.mark.parametrize("position", runs.SAVED_BEHIND)
def test_a_run_may_stop_on_two_processes_and_go_on_in_one(alone: Path, together: Path, position: str) -> None:
    resumed = runs.run(together, f"{position}-on-one", 0, position)
    steps = runs.SAVED_BEHIND[position] // runs.ROWS_PER_STEP
    assert resumed.rows == described(alone, "whole")["rows"][steps * runs.ROWS_PER_STEP :]
    drawn = described(together, "whole")["drawn"]["numpy"]
    assert resumed.drawn["numpy"][:6] == drawn[steps * runs.ROWS_PER_STEP :][:6]
    whole, found = checkpoint(alone, "whole"), checkpoint(together, f"{position}-on-one")
    assert found["global_step"] == whole["global_step"] == runs.STEPS
    counts = whole["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert found["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"] == counts
    for name, weight in whole["state_dict"].items():
        torch.testing.assert_close(weight, found["state_dict"][name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"seed": 1}, r"other data: data\.seed \(seed_everything\) is not what it was \(0 there, 1 here\)"),
        ({"lanes": 6}, r"data\.lanes is not what it was"),
        ({"budget": 128}, r"data\.budget is not what it was"),
        ({"train": "{folder}/[01].tar"}, r"data\.train is not what it was"),
    ],
)
def test_other_data_is_refused_before_it_spoils_a_run(alone: Path, changed: dict, sentence: str) -> None:
    if "train" in changed:
        changed = {"train": changed["train"].format(folder=alone)}
    with pytest.raises(UserError, match=sentence):
        runs.run(alone, "refused", 0, "boundary", **changed)


def test_a_run_goes_on_under_the_rules_that_it_began_with(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuyu_e2e.data.row_loader.VERSION", VERSION + 1)
    said = rf"trained under rules {VERSION} .* and these are rules {VERSION + 1}: go on with the version"
    with pytest.raises(UserError, match=said):
        runs.run(alone, "refused", 0, "boundary")


def test_steps_of_another_size_are_refused(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "ROWS_PER_STEP", 4)
    with pytest.raises(UserError, match="saved after 18 rows, which steps of 4 rows"):
        runs.run(alone, "refused", 0, "boundary")


def test_to_evaluate_a_checkpoint_asks_nothing_of_steps(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other processes its rows need not make whole steps."""
    monkeypatch.setattr("fuyu_e2e.training.module.restore", None)
    val, cache = f"{alone}/val/*.tar", f"{alone}/cache"
    data = FuyuDataModule(f"{alone}/tokenizer.model", 4, val=val, budget=96, cache_dir=cache)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    [said] = trainer.validate(FuyuModule(runs.CONFIG), data, ckpt_path=alone / "whole.ckpt", verbose=False)
    assert said["val/loss"] > 0
