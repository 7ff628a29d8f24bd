"""Two processes that the command line starts train as one does on the same global batches."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fuyu_e2e.checkpoint.lightning_io import read_checkpoint
from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.shipped import shipped

COMMAND = Path(sys.executable).parent / "fuyu-e2e"


def fuyu_e2e(folder: Path, *arguments: str) -> str:
    done = subprocess.run([COMMAND, *arguments], cwd=folder, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def fit(question_data: Callable[..., FuyuDataModule], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Trains the quickstart's model, with a routed block, for four steps; gives its checkpoint."""
    data = question_data()

    def fit(name: str, *settings: str) -> dict[str, Any]:
        fuyu_e2e(
            tmp_path,
            "fit",
            f"--config={shipped('recipes/quickstart.yaml')}",
            f"--data.train={data.patterns['train']}",
            f"--data.tokenizer={data.tokenizer_path}",
            "--data.budget=96",
            "--data.shuffle=4",
            "--model.decoder.routing.share=0.3",
            "--model.decoder.routing.anneal=0.5",
            "--trainer.max_steps=4",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={tmp_path / name}",
            *settings,
        )
        return read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt", optimizer=True)

    return fit


def assert_same_weights(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert other["fuyu_e2e"]["tokens_seen"] == one["fuyu_e2e"]["tokens_seen"] > 4 * 96
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], weight, atol=1e-5, rtol=1e-4, msg=name)


def test_two_processes_give_the_weights_of_one_with_twice_the_micro_batches(
    fit: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Rank r takes every second row, and loss is divided by the supervised tokens of both ranks.

    Thresholds of routed blocks come from the scores of both. With weights in parts, the first process writes sample
    generations with a whole copy of them; `checkpoint consolidate` makes one file of their checkpoint.
    """
    one = fit("one", "--trainer.accumulate_grad_batches=4")
    thresholds = [weight for name, weight in one["state_dict"].items() if name.endswith(".threshold")]
    assert len(thresholds) == 1
    assert thresholds[0].isfinite()
    two = ["--trainer.devices=2", "--rows_per_step=4"]
    assert_same_weights(one, fit("two", "--trainer.strategy=ddp", *two))
    validation = [f"--data.val={tmp_path}/val.tar", "--trainer.val_check_interval=4"]
    parts = fit("parts", "--trainer.strategy=fsdp2", *two, *validation)
    assert_same_weights(one, parts)
    events = EventAccumulator(str(tmp_path / "parts" / "tensorboard"))
    events.Reload()
    assert "samples/0/text_summary" in events.Tags()["tensors"]
    assert "routing/0" in events.Tags()["images"]
    assert "step 4" in fuyu_e2e(tmp_path, "checkpoint", "consolidate", "parts", "--out", "whole.ckpt")
    whole = torch.load(tmp_path / "whole.ckpt" / "checkpoint.pt", weights_only=True)  # noqa: TID251
    for name, weight in parts["state_dict"].items():
        assert torch.equal(whole["state_dict"][name], weight)
    assert whole["optimizer_states"][0]["param_groups"] == parts["optimizer_states"][0]["param_groups"]
    assert "every byte is right" in fuyu_e2e(tmp_path, "checkpoint", "verify", "whole.ckpt")
    fit("parts", "--trainer.accumulate_grad_batches=4", "--ckpt_path=last", "--trainer.max_steps=5")
