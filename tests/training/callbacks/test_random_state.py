"""Random numbers of a run that goes on are the uninterrupted run's, whatever others draw in between.

That each of several ranks gets its own back is tested with all else that a resumed run has, in test_resume.py.
"""

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.training.callbacks.random_state import RandomState, restore_random_state
from fuyu_e2e.training.module import FuyuModule


def draw() -> tuple[float, ...]:
    """Not from Python's generator, from which the checks of types draw that pytest puts into our functions."""
    return float(np.random.randn()), float(torch.rand(()))


class Draw(Callback):
    """Draws in each step, and at other times; saves at the end of each micro-batch, and of each validation."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.drawn: list[tuple[float, ...]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.drawn.append(draw())

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, "batch")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        draw()
        self.save(trainer, "validation")

    def on_train_start(self, *_: Any) -> None:
        draw()

    def on_validation_start(self, *_: Any) -> None:
        draw()

    def save(self, trainer: pl.Trainer, after: str) -> None:
        if self.folder:
            trainer.save_checkpoint(self.folder / f"{after}-{len(self.drawn)}.ckpt")


@pytest.fixture
def fit(config: FuyuConfig, question_data: Callable[..., FuyuDataModule], tmp_path: Path) -> Callable[..., Any]:
    """Trains four steps of two micro-batches, with a validation after every third of these; gives what was drawn."""

    def fit(draw: Draw, *, resume: str | None = None, workers: int = 0, validate: bool = True) -> Any:
        np.random.seed(3)
        torch.manual_seed(3)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=4,
            accumulate_grad_batches=2,
            val_check_interval=3,
            check_val_every_n_epoch=None,
            limit_val_batches=1.0 if validate else 0,
            num_sanity_val_steps=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[RandomState(), draw],
        )
        data = question_data(workers=workers, val=str(tmp_path / "val.tar"))
        trainer.fit(FuyuModule(config), data, ckpt_path=tmp_path / f"{resume}.ckpt" if resume else None)
        return draw.drawn

    return fit


def test_a_resumed_run_draws_what_the_uninterrupted_one_drew(fit: Callable[..., Any], tmp_path: Path) -> None:
    """From every checkpoint: of a step's end, of one micro-batch in two, of a validation within and after a step."""
    whole = fit(Draw(tmp_path))
    assert len(set(whole)) == 8
    saved = sorted(path.stem for path in tmp_path.glob("*.ckpt"))
    assert saved == [*(f"batch-{n}" for n in range(1, 9)), "validation-3", "validation-6"]
    for name in saved:
        steps = int(name[-1]) // 2
        assert fit(Draw(), resume=name) == whole[2 * steps :], name


def test_validation_and_workers_leave_training_its_random_numbers(fit: Callable[..., Any]) -> None:
    whole = fit(Draw())
    assert fit(Draw(), validate=False) == whole
    assert fit(Draw(), workers=1) == whole


def test_a_state_comes_back_from_a_checkpoint_as_it_was() -> None:
    """Python and numpy make normal numbers in pairs, and keep the second one for later."""
    drawn = []
    random.gauss()
    np.random.randn()
    file = io.BytesIO()
    torch.save(RandomState().state_dict()["ranks"][0], file)
    for _ in range(2):
        file.seek(0)
        restore_random_state(torch.load(file, weights_only=True))  # noqa: TID251
        drawn.append((random.gauss(), random.random(), np.random.randn(), np.random.rand(), *torch.rand(2).tolist()))
    assert drawn[0] == drawn[1]
