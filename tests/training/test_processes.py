"""Two processes train as one does on the same global batches."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fuyu_e2e.checkpoint.training_files import read_checkpoint
from fuyu_e2e.datamodule import FuyuDataModule
from fuyu_e2e.shipped import shipped

COMMAND = Path(sys.executable).parent / "fuyu-e2e"


@pytest.mark.parametrize("routing", [[], ["--model.decoder.routing.share=0.3", "--model.decoder.routing.anneal=0.5"]])
def test_two_processes_give_the_weights_of_one_with_twice_the_micro_batches(
    question_data: Callable[..., FuyuDataModule], tmp_path: Path, routing: list[str]
) -> None:
    """Rank r takes every second row, and loss is divided by the supervised tokens of both ranks.

    Thresholds of routed blocks come from the scores of both.
    """
    data = question_data()
    weights = []
    for name, settings in {
        "one": ["--trainer.accumulate_grad_batches=4"],
        "two": ["--trainer.devices=2", "--trainer.strategy=ddp", "--rows_per_step=4"],
    }.items():
        arguments = [
            "fit",
            f"--config={shipped('recipes/quickstart.yaml')}",
            f"--data.train={data.patterns['train']}",
            f"--data.tokenizer={data.tokenizer_path}",
            "--data.budget=96",
            "--data.shuffle=4",
            "--trainer.max_steps=4",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={tmp_path / name}",
            *routing,
            *settings,
        ]
        done = subprocess.run([COMMAND, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        checkpoint = read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")
        weights.append(checkpoint["state_dict"])
        assert checkpoint["fuyu_e2e"]["tokens_seen"] > 4 * 96
    one, two = weights
    thresholds = [name for name in one if name.endswith(".threshold")]
    assert len(thresholds) == (1 if routing else 0)
    assert all(one[name].isfinite() for name in thresholds)
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], atol=1e-5, rtol=1e-4)
