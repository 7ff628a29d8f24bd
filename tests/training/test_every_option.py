"""Every option of `fit`, with what Lightning's documentation or ours allows: it does what is said, or is refused.

The options are those of the parser, so that a new one of a later Lightning fails here until something is said of it.
"""

import io
import math
import os
import shlex
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fuyu_e2e.checkpoint.lightning_io import read_checkpoint
from fuyu_e2e.checkpoint.run_checkpoints import find_checkpoint
from fuyu_e2e.cli import main
from fuyu_e2e.data.shards.mixture import Climb, Source
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.routing.config import RoutingConfig
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.settings.recipe import FuyuCLI

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]
RECIPE: dict[str, Any] = {
    "trainer": {
        "max_steps": 2, "accelerator": "cpu", "val_check_interval": 1, "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0, "log_every_n_steps": 1,
    },
    "model": {
        "decoder": {"vocab_size": 320, "patch_size": 4, "layers": 4, "width": 32, "heads": 2, "kv_heads": 1,
                    "head_size": 16, "feed_forward": 48},
        "schedule": {"shape": "wsd", "warmup": 0.0, "decay": 0.0},
        "max_new_tokens": 2,
    },
    "data": {"tokenizer": "tokenizer.model", "train": "train.tar", "val": "val.tar", "budget": 128, "lanes": 2,
             "shuffle": 4},
}  # fmt: skip
LADDER = "--data.train null --data.mixture '{a: {shards: train.tar, weight: {0: 2, 1: 1}}, b: {shards: test.tar}}'"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one start of `fit` did."""

    folder: Path
    """Its directory."""
    code: int
    said: str
    cli: FuyuCLI | None
    """None where it was refused before anything was built."""
    seen: dict[str, Any] = field(default_factory=dict)
    """What was looked at while it ran."""
    plain: "Run | None" = None
    """The same start without the option."""

    @property
    def trainer(self) -> Any:
        assert self.cli is not None
        return self.cli.trainer

    @property
    def model(self) -> FuyuModule:
        assert self.cli is not None
        return self.cli.model

    @property
    def data(self) -> Any:
        assert self.cli is not None
        return self.cli.datamodule

    @property
    def step(self) -> int:
        return self.trainer.global_step

    def scalars(self, tag: str, folder: str = "tensorboard") -> list[tuple[int, float]]:
        """The curve of a figure: steps from 0, and values."""
        events = EventAccumulator(str(self.folder / folder)).Reload()
        return [(one.step, one.value) for one in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []

    def steps(self, tag: str) -> list[int]:
        return [step for step, _ in self.scalars(tag)]

    def last(self, tag: str) -> float:
        return self.scalars(tag)[-1][1]

    def other(self, tag: str = "val/loss") -> bool:
        """Whether the last value of a curve is another one than without the option."""
        assert self.plain is not None
        return not math.isclose(self.last(tag), self.plain.last(tag), abs_tol=1e-6)

    def same(self, tag: str = "val/loss") -> bool:
        """Whether it is the same."""
        return not self.other(tag)

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("*.ckpt"))

    @property
    def saved_steps(self) -> list[int]:
        """The steps whose checkpoints are kept."""
        kept = [path for path in (self.folder / "checkpoints").glob("*.ckpt") if not path.is_symlink()]
        return sorted({read_checkpoint(path)["global_step"] for path in kept})

    @property
    def checkpoint(self) -> dict[str, Any]:
        return read_checkpoint(find_checkpoint(self.folder))

    @property
    def recipe(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "config.yaml").read_text())

    def files(self, pattern: str) -> list[str]:
        """Files in its directory or beside it, by a pattern from there on."""
        return sorted(str(path) for path in self.folder.parent.glob(pattern))

    def has(self, callback: str) -> bool:
        return any(type(one).__name__ == callback for one in self.trainer.callbacks)

    def rows(self) -> int:
        """Training rows that were read."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed


Check = Callable[[Run], Any]
Use = tuple[str, Check | str]
"""What follows the option on the command line, and what then holds, or a part of the sentence that refuses it."""

EPOCHS = "--trainer.limit_train_batches 1 --trainer.val_check_interval 1.0 --trainer.check_val_every_n_epoch 1"
ALL = "--checkpoint.save_top_k -1"
UNVALIDATED = "--data.val null --checkpoint.save_top_k -1"


def works(run: Run) -> bool:
    """It trains; nothing else can be seen of the option on one CPU."""
    return run.step == 2


def unchanged(run: Run) -> bool:
    """It trains bit for bit as without, which is what is said of the option."""
    return run.step == 2 and run.same()


def changed(run: Run) -> bool:
    """It trains otherwise than without."""
    return run.step == 2 and run.other()


def shown(word: str) -> Check:
    """Help is printed, and nothing is built."""
    return lambda run: word in run.said and run.cli is None


def with_callback(name: str) -> Check:
    return lambda run: run.step == 2 and run.has(name)


OPTIONS: dict[str, list[Use]] = {
    "help": [("", lambda run: "--trainer.max_steps" in run.said)],
    "config": [("recipe.yaml", unchanged), ("gone.yaml", "The recipe gone.yaml can't be read")],
    "print_config": [("", lambda run: "max_steps: 2" in run.said and not run.folder.exists())],
    "seed_everything": [
        ("7", lambda run: changed(run) and run.recipe["seed_everything"] == 7),
        ("0", unchanged),
        ("true", "must be a whole number"),
    ],
    "rows_per_step": [("3", lambda run: run.rows() == 6 and run.step == 2)],
    "ckpt_path": [
        ("earlier/checkpoints/last.ckpt --trainer.max_steps 3",
         lambda run: run.step == 3 and run.steps("val/loss") == [2]),
        ("last", lambda run: "the run begins at step 0" in run.said and unchanged(run)),
    ],
    # Trainer
    "trainer": [("'{max_steps: 1}'", lambda run: run.step == 1)],
    "trainer.accelerator.help": [("CPUAccelerator", shown("CPUAccelerator"))],
    "trainer.accelerator": [("cpu", unchanged), ("auto", works), ("gpu", "this machine doesn't have")],
    "trainer.strategy.help": [("DDPStrategy", shown("find_unused"))],
    "trainer.strategy": [
        ("auto", unchanged),
        ("ddp", lambda run: unchanged(run) and type(run.trainer.strategy).__name__ == "DDPStrategy"),
        ("SingleDeviceStrategy --trainer.strategy.device cpu", unchanged),
        ("deepspeed", "doesn't work here"),
    ],
    "trainer.devices": [("1", unchanged), ("auto", works), ("[0]", "devices")],
    "trainer.num_nodes": [("1", unchanged), ("0", "num_nodes")],
    "trainer.precision": [
        ("32", unchanged),
        ("bf16", lambda run: changed(run) and run.trainer.precision == "bf16-mixed"),
        ("64-true", "trainer.precision 64-true doesn't work here"),
    ],
    "trainer.logger.help": [("CSVLogger", shown("save_dir"))],
    "trainer.logger": [
        ("false", lambda run: run.step == 2 and not run.files("run/tensorboard/*")),
        ("true", lambda run: run.files("run/lightning_logs/version_0/events*")),
        ("CSVLogger --trainer.logger.save_dir run", lambda run: run.files("run/lightning_logs/version_0/metrics.csv")),
        ("TensorBoardLogger --trainer.logger.save_dir run --trainer.logger.name own",
         lambda run: [step for step, _ in run.scalars("val/loss", "own/version_0")] == [0, 1]),
        ("MLFlowLogger", "a package is missing, which pip install 'mlflow"),
    ],
    "trainer.callbacks.help": [("EarlyStopping", shown("patience"))],
    "trainer.callbacks": [
        ("LearningRateMonitor", lambda run: works(run) and run.scalars("lr-MuonAdamW/pg1")),
        ("EarlyStopping --trainer.callbacks.monitor val/loss --trainer.callbacks.stopping_threshold 9",
         lambda run: run.step == 1 and "stopped  early" in run.said),
        ("'[{class_path: RichModelSummary}, {class_path: EMAWeightAveraging}]'",
         lambda run: changed(run) and run.has("RichModelSummary")),
        ("ModelCheckpoint --trainer.callbacks.dirpath run/own --trainer.callbacks.every_n_train_steps 1 "
         "--trainer.callbacks.save_top_k -1", lambda run: len(run.files("run/own/*.ckpt")) == 2),
        ("OnExceptionCheckpoint --trainer.callbacks.dirpath run/own", with_callback("OnExceptionCheckpoint")),
        ("TQDMProgressBar", with_callback("TQDMProgressBar")),
        ("Timer", "doesn't work here"),
    ],
    "trainer.fast_dev_run": [
        ("true", lambda run: run.step == 1 and not run.folder.exists()),
        ("2", lambda run: run.step == 2 and not run.folder.exists()),
        ("false", unchanged),
    ],
    "trainer.max_epochs": [
        (f"1 {EPOCHS}", lambda run: run.step == 1),
        ("-1", unchanged),
        ("0", "trainer.max_epochs is 0, and nothing is left to fit"),
    ],
    "trainer.min_epochs": [
        (f"2 {EPOCHS} --trainer.callbacks EarlyStopping --trainer.callbacks.monitor val/loss "
         "--trainer.callbacks.stopping_threshold 9", lambda run: run.step == 2 and run.trainer.current_epoch == 2),
    ],
    "trainer.max_steps": [("1", lambda run: run.step == 1), ("-1", "trainer.max_steps is -1, not a number of steps")],
    "trainer.min_steps": [
        ("2 --trainer.callbacks EarlyStopping --trainer.callbacks.monitor val/loss "
         "--trainer.callbacks.stopping_threshold 9", works),
    ],
    "trainer.max_time": [
        ("00:00:00:00", lambda run: run.code == 6 and run.saved_steps == [1]),
        ("'{minutes: 9}'", unchanged),
        ("soon", "trainer.max_time is 'soon'"),
    ],
    "trainer.limit_train_batches": [
        ("1", lambda run: run.step == 2 and run.trainer.current_epoch == 2),
        ("1.0", unchanged),
        ("0", "trainer.limit_train_batches is 0"),
        ("0.5", "a share of rows"),
    ],
    "trainer.limit_val_batches": [
        ("1", lambda run: changed(run) and run.seen["validated"] == 2),
        ("0", lambda run: run.step == 2 and not run.scalars("val/loss")),
    ],
    "trainer.limit_test_batches": [("1", unchanged)],
    "trainer.limit_predict_batches": [("1", unchanged)],
    "trainer.overfit_batches": [("1", lambda run: run.step == 2 and run.seen["trained"][0] == run.seen["trained"][1])],
    "trainer.val_check_interval": [
        ("2", lambda run: run.steps("val/loss") == [1]),
        ("1.0", lambda run: run.steps("val/loss") and "trainer.val_check_interval is not set" in run.said),
        ("00:00:00:00", lambda run: run.steps("val/loss") == [0, 1]),
        ("'{hours: 1}'", lambda run: run.step == 2 and not run.steps("val/loss")),
        ("soon", "val_check_interval"),
    ],
    "trainer.check_val_every_n_epoch": [
        ("2 --trainer.limit_train_batches 1 --trainer.val_check_interval 1.0",
         lambda run: run.steps("val/loss") == [1]),
        ("2", "but training data are a stream without epochs"),
        ("null", unchanged),
    ],
    "trainer.num_sanity_val_steps": [
        ("1", lambda run: unchanged(run) and run.seen["sanity"] == 1),
        ("-1", lambda run: unchanged(run) and run.seen["sanity"] == run.seen["validated"] / 2),
    ],
    "trainer.log_every_n_steps": [
        ("2", lambda run: run.steps("train/loss") == [1]),
        ("0", lambda run: run.steps("val/loss") == [0, 1] and not run.scalars("train/loss")),
    ],
    "trainer.enable_checkpointing": [
        ("false", lambda run: run.step == 2 and not run.checkpoints),
        ("true", unchanged),
    ],
    "trainer.enable_progress_bar": [
        ("false", lambda run: unchanged(run) and "step 2/2" not in run.said),
        ("true", lambda run: unchanged(run) and "step 2/2" in run.said),
    ],
    "trainer.enable_model_summary": [
        ("false", lambda run: unchanged(run) and "Decoder of" not in run.said),
        ("true", lambda run: unchanged(run) and "Decoder of" in run.said),
    ],
    "trainer.accumulate_grad_batches": [("3", lambda run: run.rows() == 6 and run.step == 2)],
    "trainer.gradient_clip_val": [
        ("1e-12 --model.optimizer.weight_decay 0",
         lambda run: math.isclose(*(value for _, value in run.scalars("val/loss")), rel_tol=1e-5)),
    ],
    "trainer.gradient_clip_algorithm": [
        ("value --trainer.gradient_clip_val 1e-12 --model.optimizer.weight_decay 0",
         lambda run: math.isclose(*(value for _, value in run.scalars("val/loss")), rel_tol=1e-5)),
        ("norm", unchanged),
    ],
    "trainer.deterministic": [
        ("true", lambda run: unchanged(run) and run.seen["deterministic"] == (True, False)),
        ("warn", lambda run: unchanged(run) and run.seen["deterministic"] == (True, True)),
    ],
    "trainer.benchmark": [("true", lambda run: unchanged(run) and run.seen["benchmark"])],
    "trainer.inference_mode": [
        ("true", lambda run: unchanged(run) and run.trainer.validate_loop.inference_mode),
        ("false", lambda run: unchanged(run) and not run.trainer.validate_loop.inference_mode),
    ],
    "trainer.use_distributed_sampler": [("false", unchanged), ("false --trainer.strategy ddp", unchanged)],
    "trainer.profiler.help": [("SimpleProfiler", shown("dirpath"))],
    "trainer.profiler": [
        ("simple", lambda run: unchanged(run) and "Profiler Report" in run.said and "run_training_batch" in run.said),
        ("advanced", lambda run: unchanged(run) and "Profile stats for" in run.said),
        ("pytorch", lambda run: works(run) and run.files("run/tensorboard/*.pt.trace.json")),
        ("SimpleProfiler --trainer.profiler.dirpath run --trainer.profiler.filename times",
         lambda run: run.files("run/fit-times.txt")),
        ("xla", "a package is missing, which pip install 'torch_xla"),
    ],
    "trainer.detect_anomaly": [("true", lambda run: unchanged(run) and run.seen["anomaly"])],
    "trainer.barebones": [("true", "trainer.barebones doesn't work here")],
    "trainer.plugins.help": [("MixedPrecision", shown("scaler"))],
    "trainer.plugins": [
        ("LightningEnvironment", unchanged),
        ("MixedPrecision --trainer.plugins.precision bf16-mixed --trainer.plugins.device cpu --trainer.precision null",
         changed),
        ("TorchSyncBatchNorm", unchanged),
        ("AsyncCheckpointIO", "trainer.plugins names AsyncCheckpointIO, which doesn't work here"),
    ],
    "trainer.sync_batchnorm": [("true", unchanged)],
    "trainer.reload_dataloaders_every_n_epochs": [("1", "would restart the stream of training data")],
    "trainer.default_root_dir": [
        ("run/inner", lambda run: run.files("run/inner/config.yaml") and run.files("run/inner/checkpoints/last.ckpt")),
    ],
    "trainer.enable_autolog_hparams": [("false", unchanged)],
    "trainer.model_registry": [("mine", "trainer.model_registry doesn't work here")],
    # Checkpoints
    "checkpoint": [("'{save_top_k: -1}'", lambda run: run.saved_steps == [1, 2])],
    "checkpoint.filename": [
        ("'own-{epoch}-{val/loss:.1f}'", lambda run: "own-epoch=0-val_loss=5.6-step=2.ckpt" in run.checkpoints
         or any(name.startswith("own-epoch=0-val_loss=") for name in run.checkpoints)),
        ("'{train/los}'", "did you mean train/loss?"),
    ],
    "checkpoint.monitor": [
        ("val/perplexity", lambda run: any("val_perplexity=" in name for name in run.checkpoints)),
        ("train/loss", lambda run: run.checkpoint["fuyu_e2e"]["monitored"]["name"] == "train/loss"),
        ("val_loss", "did you mean val/loss?"),
    ],
    "checkpoint.verbose": [("true", lambda run: "Step 2, val/loss" in run.said)],
    "checkpoint.save_last": [
        ("true", lambda run: "last.ckpt" in run.checkpoints),
        ("link", lambda run: (run.folder / "checkpoints" / "last.ckpt").is_symlink()),
        ("false", lambda run: run.saved_steps == [2] and "last.ckpt" not in run.checkpoints),
    ],
    "checkpoint.save_top_k": [
        ("-1", lambda run: run.saved_steps == [1, 2]),
        ("2 --trainer.max_steps 3", lambda run: run.saved_steps == [2, 3]),
        ("0", lambda run: run.saved_steps == [2]),
        ("2 --data.val null", "nothing tells the best"),
        ("-2", "save_top_k=-2"),
    ],
    "checkpoint.save_on_exception": [
        ("true", unchanged),
        ("true --model.optimizer.lr 1e36 --bad_steps.in_a_row 1", lambda run: run.code == 3),
    ],
    "checkpoint.save_weights_only": [
        ("true", lambda run: "optimizer_states" not in run.checkpoint and unchanged(run)),
    ],
    "checkpoint.mode": [
        ("max --checkpoint.monitor val/loss --trainer.max_steps 3",
         lambda run: run.saved_steps == [1, 3] and run.checkpoint["fuyu_e2e"]["monitored"]["mode"] == "max"),
        ("min", unchanged),
        ("max", "checkpoint.mode is max, but no checkpoint.monitor"),
    ],
    "checkpoint.auto_insert_metric_name": [
        ("false --checkpoint.filename 'at-{step}'", lambda run: "at-2.ckpt" in run.checkpoints),
    ],
    "checkpoint.every_n_train_steps": [
        (f"1 {UNVALIDATED}", lambda run: run.saved_steps == [1, 2]),
        (f"2 {UNVALIDATED}", lambda run: run.saved_steps == [2]),
        ("-1", "every_n_train_steps=-1"),
    ],
    "checkpoint.train_time_interval": [
        (f"00:00:00 {UNVALIDATED}", lambda run: run.saved_steps == [1, 2]),
        (f"01:00:00 {UNVALIDATED}", lambda run: run.saved_steps == [2]),
    ],
    "checkpoint.every_n_epochs": [
        (f"1 {UNVALIDATED} {EPOCHS}", lambda run: run.saved_steps == [1, 2]),
        (f"2 {UNVALIDATED} {EPOCHS}", lambda run: run.saved_steps == [2]),
        (f"1 {UNVALIDATED}", "every_n_epochs would save nothing"),
    ],
    "checkpoint.save_on_train_epoch_end": [
        (f"true {ALL} {EPOCHS}", lambda run: run.saved_steps == [1, 2]),
        (f"false {ALL} {EPOCHS}", lambda run: run.saved_steps == [1, 2]),
    ],
    "checkpoint.enable_version_counter": [("true", "checkpoint.enable_version_counter doesn't work here")],
    # Guards
    "bad_steps": [("'{in_a_row: 1}'", lambda run: unchanged(run))],
    "bad_steps.in_a_row": [
        ("1 --model.optimizer.lr 1e36", lambda run: run.code == 3 and "1 steps in a row were skipped" in run.said),
        ("0", "bad_steps.in_a_row is 0"),
    ],
    "bad_steps.deviations": [("6", unchanged), ("0", "bad_steps.deviations is 0.0")],
    "watchdog": [("'{limit: 60}'", unchanged)],
    "watchdog.limit": [("null", unchanged), ("60", unchanged), ("0", "watchdog.limit is 0.0 seconds")],
    "hosts": [("'{limit: 60}'", unchanged)],
    "hosts.limit": [("null", unchanged), ("60", unchanged), ("0", "hosts.limit is 0.0 seconds")],
    "evaluate": [("'{limit: 1}'", unchanged)],
    "evaluate.tasks": [
        ("[own.yaml]", lambda run: unchanged(run) and not run.scalars("eval/own/exact_match")),
        ("[nothing]", "The task nothing is no file"),
    ],
    "evaluate.every_n_steps": [
        ("2 --evaluate.tasks [own.yaml]", lambda run: unchanged(run) and run.steps("eval/own/exact_match") == [2]),
        ("0", "evaluate.every_n_steps is 0"),
    ],
    "evaluate.limit": [
        ("1 --evaluate.tasks [own.yaml] --evaluate.every_n_steps 2 --evaluate.batch_tokens 1",
         lambda run: run.last("eval/own/unusable") == 1),
    ],
    "evaluate.data": [
        ("'{own.yaml: {shards: train.tar}}' --evaluate.tasks [own.yaml] --evaluate.every_n_steps 2",
         lambda run: run.steps("eval/own/exact_match") == [2]),
        ("'{own: {shards: train.tar}}' --evaluate.tasks [own.yaml]", "is for the task own, which is not evaluated"),
    ],
    "evaluate.batch_tokens": [
        ("1 --evaluate.tasks [own.yaml] --evaluate.every_n_steps 2", lambda run: run.last("eval/own/unusable") == 8),
    ],
    # Model
    "model": [("'{z_loss: 0.1}'", changed)],
    "model.decoder.help": [("fuyu_e2e.model.config.FuyuConfig", shown("kv_heads"))],
    "model.decoder": [("1m", lambda run: run.model.config.width == 96), ("3m", "1m, 10m")],
    "model.decoder.vocab_size": [("320", unchanged), ("321", "but the decoder is made for 321")],
    "model.decoder.patch_size": [("8", lambda run: changed(run) and run.data.images.patch_size == 8)],
    "model.decoder.layers": [("3", lambda run: changed(run) and len(run.model.decoder.blocks) == 3)],
    "model.decoder.width": [("48", changed)],
    "model.decoder.heads": [("4", changed)],
    "model.decoder.kv_heads": [("2", changed), ("3", "set kv_heads to a divisor of 2")],
    "model.decoder.head_size": [("8", changed), ("7", "make it even")],
    "model.decoder.feed_forward": [("32", changed)],
    "model.decoder.rope_theta": [("100", changed), ("1", "decoder.rope_theta is 1.0")],
    "model.decoder.norm_eps": [("0.1", changed), ("0", "decoder.norm_eps is 0.0")],
    "model.decoder.tie_embeddings": [("true", lambda run: changed(run) and run.model.config.tie_embeddings)],
    "model.decoder.dialect": [("fuyu --model.decoder.kv_heads 2", changed), ("fuyu", "set kv_heads to 2")],
    "model.decoder.routing": [("'{share: 0.5}'", lambda run: run.scalars("routing/block2/all"))],
    "model.decoder.masks": [
        ("'[{window: 4, sinks: 1}, {window: null}]'", changed),
        ("'[{window: 0}]'", "decoder.masks holds a window of 0"),
    ],
    "model.decoder.blocks": [
        ("'[{class_path: fuyu_e2e.model.blocks.dense.DenseConfig}]'", unchanged),
        ("'[{class_path: fuyu_e2e.model.blocks.block.NoConfig}]'", "NoConfig"),
    ],
    "model.decoder.connector": [
        ("MLPConfig", changed),
        ("MLPConfig --model.decoder.connector.hidden 0", "hidden is 0"),
    ],
    "model.decoder.image_norm": [  # a new block norms once more
        ("true", lambda run: works(run) and "decoder.image_norm.weight" in run.checkpoint["state_dict"]),
    ],
    "model.decoder.grid_embeddings": [
        ("8", lambda run: works(run) and bool(run.checkpoint["state_dict"]["decoder.grid_embeddings.rows"].any())),
        ("0", "decoder.grid_embeddings is 0"),
    ],
    "model.decoder.rotary": [
        ("2d", changed),
        ("2d --model.decoder.head_size 6", "make it a multiple of 4, or leave rotary at '1d'"),
        ("3d", "must be 1d or 2d"),
    ],
    "model.decoder.patch_masking": [
        ("'{images: 1, share: 1}'", changed),
        ("'{images: 0}'", "decoder.patch_masking.images is 0.0"),
    ],
    "model.routing.help": [("fuyu_e2e.model.routing.config.RoutingConfig", shown("anneal"))],
    "model.routing": [("'{share: 0.5}'", lambda run: run.scalars("routing/block2/all"))],
    "model.routing.rule": [("topk", changed), ("best", "must be threshold, topk")],
    "model.routing.share": [("0.5 --model.routing.anneal 0", changed), ("0", "above 0 and at most 1")],
    "model.routing.text_share": [("0.9 --model.routing.anneal 0", changed)],
    "model.routing.blocks": [("[1]", lambda run: run.model.config.routed == (1,)), ("[9]", "routing.blocks holds 9")],
    "model.routing.skipped": [("keys --model.routing.anneal 0", changed)],
    "model.routing.keep_starts": [("true --model.routing.anneal 0", changed)],
    "model.routing.keep_newlines": [("true --model.routing.anneal 0", changed)],
    "model.routing.anneal": [("0", changed), ("2", "routing.anneal is 2.0")],
    "model.routing.explore": [("1 --model.routing.anneal 0", changed), ("-1", "routing.explore is -1.0")],
    "model.routing.slack": [("9 --model.routing.anneal 0", works), ("-1", "routing.slack is -1.0")],
    "model.optimizer": [("'{lr: 0.1}'", changed)],
    "model.optimizer.name": [("muon", lambda run: changed(run) and run.scalars("lr/muon")), ("sgd", "adamw or muon")],
    "model.optimizer.lr": [("0.1", lambda run: math.isclose(run.last("lr/adamw"), 0.1, abs_tol=1e-6))],
    "model.optimizer.betas": [("[0.5,0.5]", changed), ("[1,2]", "optimizer.betas holds 1.0")],
    "model.optimizer.weight_decay": [("9", changed), ("-1", "optimizer.weight_decay is -1.0")],
    "model.optimizer.muon_lr": [("0.5 --model.optimizer.name muon", changed)],
    "model.optimizer.muon_momentum": [("0.1 --model.optimizer.name muon", changed), ("1", "muon_momentum is 1.0")],
    "model.optimizer.muon_weight_decay": [("9 --model.optimizer.name muon", changed)],
    "model.schedule": [("'{warmup: 1, decay: 0}'", changed)],
    "model.schedule.shape": [("cosine", changed)],
    "model.schedule.warmup": [("1", lambda run: next(value for _, value in run.scalars("lr/adamw")) < 2e-4)],
    "model.schedule.decay": [("1", lambda run: run.last("lr/adamw") < 2e-4)],
    "model.schedule.final": [("0.5 --model.schedule.decay 1", lambda run: 2e-4 < run.last("lr/adamw") < 2.9e-4)],
    "model.max_new_tokens": [("4", unchanged), ("0", "model.max_new_tokens is 0")],
    "model.weights": [
        ("earlier", lambda run: run.step == 2 and run.scalars("val/loss")[0][1] < run.plain.scalars("val/loss")[0][1]),
        ("nowhere", "nowhere is no checkpoint"),
    ],
    "model.z_loss": [("0.1", changed), ("-1", "model.z_loss is -1.0")],
    "model.activation_checkpointing": [
        ("selective", unchanged), ("full", unchanged), ("half", "none, selective or full"),
    ],
    "model.compile": [("true", lambda run: works(run) and run.seen["compiled"] == 4)],
    "model.attention": [("documents", unchanged), ("flex", "model.attention flex needs a CUDA device")],
    "model.fp8": [("true", "model.fp8 needs torchao")],
    # Data
    "data": [("'{workers: 1}'", unchanged)],
    "data.tokenizer": [("copied.model", unchanged), ("gone.model", "gone.model can't be read")],
    "data.layout.help": [("MLPConfig", shown("--data.layout.hidden"))],
    "data.train": [("[train.tar,test.tar]", changed), ("'t*n.tar'", unchanged)],
    "data.mixture.help": [("fuyu_e2e.data.shards.mixture.Source", shown("weight"))],
    "data.mixture": [
        ("'{a: {shards: train.tar}, b: {shards: test.tar}}' --data.train null",
         lambda run: run.step == 2 and run.last("data/share_asked/a") == 0.5),
    ],
    "data.mixture.shards": [
        ("--data.train null --data.mixture '{a: {shards: [train.tar]}}'", works),
        ("--data.train null --data.mixture '{a: {shards: gone.tar}}'", "data.mixture: 'gone.tar' matches no shard"),
    ],
    "data.mixture.weight": [
        ("--data.train null --data.mixture '{a: {shards: train.tar, weight: 3}, b: {shards: test.tar}}'",
         lambda run: run.last("data/share_asked/a") == 0.75),
        ("--data.train null --data.mixture '{a: {shards: train.tar, weight: -1}}'", "weight of a source is -1"),
    ],
    "data.climb.help": [("fuyu_e2e.data.shards.mixture.Climb", shown("monitor"))],
    "data.climb": [
        (f"'{{monitor: val/loss, at: [99]}}' {LADDER}",
         lambda run: "climbs from rung 0 to 1" in run.said and run.last("data/rung") == 1),
        ("'{monitor: val/loss, at: [99]}'", "no data.mixture whose weights could climb"),
    ],
    "data.climb.monitor": [
        (f"val/exact_match --data.climb.at [1] {LADDER}", lambda run: "since val/exact_match is" in run.said),
        (f"val/los --data.climb.at [1] {LADDER}", "data.climb.monitor is val/los, which is not logged: did you mean"),
    ],
    "data.climb.at": [
        (f"[0] --data.climb.monitor val/loss {LADDER}", lambda run: run.step == 2 and "climbs" not in run.said),
        (f"[] --data.climb.monitor val/loss {LADDER}", "data.climb.at is []"),
    ],
    "data.climb.mode": [
        (f"max --data.climb.monitor val/loss --data.climb.at [0] {LADDER}", lambda run: "climbs" in run.said),
        ("up --data.climb.monitor val/loss --data.climb.at [0]", "must be min or max"),
    ],
    "data.val": [
        ("null", lambda run: run.step == 2 and not run.scalars("val/loss")),
        ("[val.tar]", unchanged),
        ("train.tar", "both hold train.tar"),
    ],
    "data.test": [("test.tar", unchanged), ("train.tar", "both hold train.tar")],
    "data.predict": [("test.tar", unchanged)],
    "data.budget": [("64", lambda run: run.step == 2 and run.data.budget == 64), ("0", "data.budget is 0")],
    "data.long_documents": [
        ("cut --data.train test.tar", lambda run: "tokens cut" in run.said),
        ("skip --data.train test.tar", lambda run: "longer-than-row" in run.said),
        ("chop", "must be skip or cut"),
    ],
    "data.max_patches": [("4", changed), ("0", "max_patches is 0")],
    "data.max_size": [("[8,8]", changed), ("[5,5]", "must be two multiples of the patch size 4")],
    "data.lanes": [("4", changed), ("0", "data.lanes is 0")],
    "data.shuffle": [("1", changed), ("0", "data.shuffle is 0")],
    "data.mix_by": [("documents", works), ("bytes", "must be tokens or documents")],
    "data.workers": [("2", unchanged), ("-1", "data.workers is -1")],
    "data.cache_dir": [("run/cache", lambda run: unchanged(run) and run.data.cache.folder == Path("run/cache"))],
    "data.cache_gigabytes": [("1", lambda run: run.data.cache.max_bytes == 10**9), ("-1", "cache_gigabytes is -1.0")],
    "data.allow_pipe": [
        ("true --data.train 'pipe:cat train.tar' --data.cache_dir cache", lambda run: run.step == 2),
        ("false --data.train 'pipe:cat train.tar'", "would run a command of your shell"),
    ],
}  # fmt: skip
"""By option, its uses."""


class _FoundParserError(Exception):
    """Ends the command line's class once it has built its parser."""


class ParserOnly(FuyuCLI):
    """Builds the parser of `fit`, and no more."""

    found: LightningArgumentParser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Keeps it."""
        assert parser._subcommands_action is not None
        type(self).found = parser._subcommands_action._name_parser_map["fit"]
        raise _FoundParserError


def options() -> set[str]:
    """All options of `fit`, with the settings of classes of ours that it doesn't list one by one."""
    with pytest.raises(_FoundParserError):
        ParserOnly(["fit"])
    words = {word for action in ParserOnly.found._actions for word in action.option_strings}
    names = {word.removeprefix("--") for word in words if word.startswith("--") and not word.endswith("+")}
    within = {"model.decoder": FuyuConfig, "model.routing": RoutingConfig, "data.mixture": Source, "data.climb": Climb}
    return names | {f"{group}.{entry.name}" for group, kind in within.items() for entry in fields(kind)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, make_png: Callable[..., bytes]) -> Path:
    """A working folder with shards, a recipe, a task, and a run of two steps."""
    folder = tmp_path_factory.mktemp("options")
    for name in ("tokenizer.model", "copied.model"):
        tokenizer.save(folder / name)
    for name, numbers in (("train.tar", range(8)), ("val.tar", range(8, 16)), ("test.tar", range(16, 20))):
        with tarfile.open(folder / name, "w") as tar:
            members = {}
            for number in numbers:
                members |= {f"{number}.png": make_png(8 + number, 20), f"{number}.txt": f"{number * 37}".encode()}
            if name == "test.tar":
                members["long.txt"] = b"What is it? " * 40
            for path, content in members.items():
                member = tarfile.TarInfo(path)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    task = {"format": "shards", "data": {"shards": "val.tar"}, "max_new_tokens": 2, "metrics": ["exact_match"]}
    (folder / "own.yaml").write_text(yaml.safe_dump(task))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for arguments in (
            ["shards", "index", "train.tar", "val.tar", "test.tar"],
            ["shards", "index", "pipe:cat train.tar", "--allow-pipe", "--cache-dir", "cache"],
            ["fit", "--config", "recipe.yaml", "--trainer.default_root_dir", "earlier"],
        ):
            patch.setattr(sys, "argv", ["fuyu-e2e", *arguments])
            assert main() == 0
    return folder


@pytest.fixture
def as_before() -> Iterator[None]:
    """Puts back what options set for the whole process."""
    environment, benchmark = dict(os.environ), torch.backends.cudnn.benchmark
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark
    os.environ.clear()
    os.environ.update(environment)


Start = Callable[[str], Run]


@pytest.fixture
def start(
    folder: Path,
    as_before: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Start:
    """Starts `fit` in that folder with more arguments, into an empty directory."""
    monkeypatch.chdir(folder)
    caplog.set_level("INFO")
    seen: dict[str, Any] = {"validated": 0, "sanity": 0, "trained": [], "compiled": 0}
    built: list[FuyuCLI] = []

    def look(module: FuyuModule, batch: Any, batch_idx: int) -> Any:
        seen["trained"].append(batch.document_ids)
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        seen["deterministic"] = (torch.are_deterministic_algorithms_enabled(), warns)
        seen["benchmark"], seen["anomaly"] = torch.backends.cudnn.benchmark, torch.is_anomaly_enabled()
        return training_step(module, batch, batch_idx)

    def count(module: FuyuModule, batch: Any, batch_idx: int) -> Any:
        seen["sanity" if module.trainer.sanity_checking else "validated"] += 1
        return validation_step(module, batch, batch_idx)

    def not_compile(module: torch.nn.Module) -> None:
        seen["compiled"] += 1  # which would take a minute, and meet the checks of annotations under the tests

    def keep(cli: FuyuCLI) -> None:
        built.append(cli)
        before_fit(cli)

    training_step, validation_step = FuyuModule.training_step, FuyuModule.validation_step
    before_fit = FuyuCLI.before_fit
    monkeypatch.setattr(FuyuModule, "training_step", look)
    monkeypatch.setattr(FuyuModule, "validation_step", count)
    monkeypatch.setattr(torch.nn.Module, "compile", not_compile)
    monkeypatch.setattr(FuyuCLI, "before_fit", keep)

    def start(arguments: str) -> Run:
        shutil.rmtree(folder / "run", ignore_errors=True)
        line = f"fuyu-e2e fit --config recipe.yaml --trainer.default_root_dir run {arguments}"
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        capfd.readouterr()
        caplog.clear()
        try:
            code = main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        printed = capfd.readouterr()
        said = caplog.text + printed.out + printed.err
        return Run(folder=folder / "run", code=code, said=said, cli=built[-1] if built else None, seen=seen)

    return start


@pytest.fixture
def plain(folder: Path) -> Run:
    """The same without the option: the run that was made with the folder."""
    return Run(folder=folder / "earlier", code=0, said="", cli=None)


def test_every_option_has_its_uses_here() -> None:
    assert options() == set(OPTIONS)


@pytest.mark.parametrize(
    ("option", "number"), [(name, number) for name, uses in OPTIONS.items() for number in range(len(uses))]
)
def test_an_option_does_what_is_said_or_is_refused(option: str, number: int, start: Start, plain: Run) -> None:
    given, expected = OPTIONS[option][number]
    run = start(given if given.startswith("--") else f"--{option} {given}")
    if isinstance(expected, str):
        assert run.code == 2, run.said
        assert "Traceback" not in run.said
        [sentence] = [line for line in run.said.splitlines() if line.startswith("fuyu-e2e: ")]
        assert expected in sentence
        assert not run.folder.exists()
        return
    assert run.code in (0, 3, 6), run.said
    assert "Traceback" not in run.said
    assert expected(replace(run, plain=plain)), run.said
