"""Runs with masks by depth, also with rows, columns and masked patches of images: by recipe, stopped and resumed.

They are refused where an image can't fit a mask.
"""

import io
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fuyu_e2e.checkpoint.lightning_io import read_checkpoint
from fuyu_e2e.checkpoint.loading import read_model
from fuyu_e2e.cli import main
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.model.attention.mask import CAUSAL, AttentionMask
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.images.masking import PatchMasking
from fuyu_e2e.training.module import FuyuModule

MASKS: list[dict[str, Any]] = [
    {"window": 9, "sinks": 2},
    {"window": 9},
    {"window": 160, "images": "bidirectional"},
    {"window": None},
]
RECIPE: dict[str, Any] = {
    "trainer": {"max_steps": 6, "accelerator": "cpu", "num_sanity_val_steps": 0, "log_every_n_steps": 1},
    "checkpoint": {"every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}"},
    "model": {
        "decoder": {"vocab_size": 320, "patch_size": 4, "layers": 5, "width": 32, "heads": 2, "kv_heads": 1,
                    "head_size": 16, "feed_forward": 48, "masks": MASKS},
        "optimizer": {"lr": 0.01},
    },
    "data": {"tokenizer": "tokenizer.model", "train": "train.tar", "budget": 128, "lanes": 2, "shuffle": 4,
             "max_patches": 80},
}  # fmt: skip


IMAGES = ("--model.decoder.rotary", "2d", "--model.decoder.patch_masking", '{"images": 0.5, "share": 0.5}')


@pytest.mark.parametrize("options", [(), IMAGES], ids=["masks", "images"])
def test_a_run_by_recipe_stops_and_goes_on_bitwise(
    options: tuple[str, ...],
    tmp_path: Path,
    tokenizer: Tokenizer,
    make_png: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer.save(tmp_path / "tokenizer.model")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for number in range(8):
            members = {
                "png": make_png(8 + 2 * number, 24, seed=number),
                "txt": f"{number * 37} is what it is".encode(),
            }
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    monkeypatch.chdir(tmp_path)

    def fit(name: str, *more: str) -> list[float]:
        arguments = ["fit", "--config", "recipe.yaml", "--trainer.default_root_dir", name, *options, *more]
        monkeypatch.setattr(sys, "argv", ["fuyu-e2e", *arguments])
        assert main() == 0
        events = EventAccumulator(str(tmp_path / name / "tensorboard")).Reload()
        return [one.value for one in events.Scalars("train/loss")]

    whole = fit("whole")
    assert len(whole) == 6
    assert whole[-1] < whole[0]
    resumed = fit("resumed", "--ckpt_path", "whole/checkpoints/step=3.ckpt")
    assert resumed == whole[3:]
    first, second = (read_checkpoint(tmp_path / run / "checkpoints" / "step=6.ckpt") for run in ("whole", "resumed"))
    assert first["state_dict"].keys() == second["state_dict"].keys()
    assert all(torch.equal(tensor, second["state_dict"][name]) for name, tensor in first["state_dict"].items())
    config = read_model(tmp_path / "resumed").metadata.config
    assert config.masks == tuple(AttentionMask(**mask) for mask in MASKS)
    if options:
        assert (config.rotary, config.patch_masking) == ("2d", PatchMasking(images=0.5, share=0.5))
        assert first["state_dict"]["decoder.masked_patches.embedding"].any()


@pytest.mark.parametrize("max_patches", [64, 20])
def test_a_budget_of_patches_beyond_the_window_of_images_is_refused_as_the_run_begins(
    max_patches: int, config: FuyuConfig, question_data: Any, tmp_path: Path
) -> None:
    """Before a row is read: newline tokens count, of the tallest image most."""

    def fit(window: int) -> None:
        masks = (CAUSAL, AttentionMask(window=window, images="bidirectional"))
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=tmp_path, max_steps=1,
        )  # fmt: skip
        trainer.fit(FuyuModule(replace(config, masks=masks)), question_data(max_patches=max_patches))

    most = 2 * max_patches  # of one column
    for window in (max_patches - 1, most - 1):
        with pytest.raises(
            UserError, match=rf"a window of {window}, .* up to {most} tokens.* lower data\.max_patches"
        ):
            fit(window)
    fit(most)
