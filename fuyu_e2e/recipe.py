"""From a recipe to a run: LightningCLI with our module, data and callbacks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from fuyu_e2e.checkpoint.description import Description
from fuyu_e2e.checkpoint.training_files import read_checkpoint
from fuyu_e2e.checkpoint.whole import is_whole, whole_checkpoints
from fuyu_e2e.datamodule import FuyuDataModule
from fuyu_e2e.errors import UserError
from fuyu_e2e.training.checkpoint_io import BackgroundCheckpointIO
from fuyu_e2e.training.checkpoints import Checkpoints
from fuyu_e2e.training.data_report import DataReport
from fuyu_e2e.training.last_checkpoint import LastCheckpoint
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.progress import Progress
from fuyu_e2e.training.routing_report import RoutingReport
from fuyu_e2e.training.samples import SampleGenerations
from fuyu_e2e.training.throughput import Throughput

INTERRUPTED = 130
"""Exit code of a run that Ctrl-C ended: 128 + SIGINT, as shells give it."""


class SaveRecipe(SaveConfigCallback):
    """Writes the whole recipe, defaults included, as `config.yaml` into the directory of a run that trains."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Writes it, over that of the same run before it was resumed."""
        if stage == "fit":
            root = Path(trainer.default_root_dir)
            root.mkdir(parents=True, exist_ok=True)
            recipe = self.config.clone()
            for key in ("ckpt_path", "weights_only"):  # of this start, not of the run
                recipe.pop(key, None)
            self.parser.save(recipe, root / self.config_filename, skip_none=False, overwrite=True)


class WritePredictions(BasePredictionWriter):
    """Writes what `predict` generated as `predictions.jsonl` into the run's directory, one line a document."""

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins an empty file."""
        self._path(trainer).parent.mkdir(parents=True, exist_ok=True)
        self._path(trainer).write_text("")

    def write_on_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, prediction: Any, *_: Any) -> None:
        """Appends a batch."""
        with self._path(trainer).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in prediction)

    @staticmethod
    def _path(trainer: pl.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "predictions.jsonl"


class FuyuCLI(LightningCLI):
    """LightningCLI with our module and data, one directory a run, and the callbacks that every run has.

    A run's directory is `trainer.default_root_dir`: `config.yaml`, `checkpoints/` and `tensorboard/` stand in it.
    """

    def __init__(self, args: Sequence[str], run: bool = True) -> None:
        self.last_checkpoint = LastCheckpoint()
        self.throughput = Throughput()
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__init__(
            FuyuModule,
            FuyuDataModule,
            save_config_callback=SaveRecipe,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            trainer_defaults={
                "default_root_dir": "runs/default",
                "precision": "bf16-mixed" if bf16 else "32-true",
                "callbacks": [
                    self.throughput,
                    DataReport(),
                    SampleGenerations(),
                    RoutingReport(),
                    WritePredictions(),
                    self.last_checkpoint,
                ],
            },
            parser_kwargs={"prog": "fuyu-e2e"},
            auto_configure_optimizers=False,
            args=list(args),
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the checkpoint settings, and derives what a user would otherwise have to say twice."""
        parser.link_arguments(
            "model.config", "data.patch_size", compute_fn=lambda config: config.patch_size, apply_on="instantiate"
        )
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        # `last.ckpt` is a link to the newest; a run that goes on writes over the names that it had.
        parser.set_defaults({"checkpoint.save_last": "link", "checkpoint.enable_version_counter": False})
        parser.link_arguments(
            "trainer.default_root_dir", "checkpoint.dirpath", compute_fn=lambda root: str(Path(root) / "checkpoints")
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, and reads the checkpoint that was named before Lightning does, whose errors are tracebacks.

        `last` becomes the folder of the run's checkpoints, of which the newest that is right is read.
        """
        self.config = parser.parse_args(args)
        key = f"{self.config.get('subcommand')}.ckpt_path"
        named = self.config.get(key)
        if named == "last":
            root = self.config[f"{self.config.subcommand}.trainer.default_root_dir"]
            folder = Path(root) / "checkpoints"
            if not whole_checkpoints(folder):
                raise UserError(f"{folder} holds no checkpoint to go on from: leave --ckpt_path out to begin the run.")
            self.config[key] = str(folder)
        elif named and named not in ("best", "hpc", "registry"):
            if not Path(named).is_file() and not is_whole(Path(named)):
                raise UserError(
                    f"--ckpt_path {named} is no checkpoint; `last` continues the run of trainer.default_root_dir."
                )
            Description.of(read_checkpoint(Path(named)), named)

    def instantiate_classes(self) -> None:
        """Builds module, data and trainer.

        Raises:
            UserError: A setting was refused; jsonargparse wraps what a setting's own type says of it.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Builds the trainer, with TensorBoard in the run's directory unless the recipe names another logger."""
        settings = self._get(self.config_init, "trainer")
        if settings["logger"] is None:
            kwargs["logger"] = TensorBoardLogger(settings["default_root_dir"], name="tensorboard", version="")
        if settings["enable_progress_bar"] is not False:
            kwargs["callbacks"] = [*(settings["callbacks"] or []), Progress()]
        kwargs["plugins"] = [*(settings["plugins"] or []), BackgroundCheckpointIO()]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Keeps a new run from mixing its files with an old one's.

        Raises:
            UserError: The run's directory has checkpoints, and the run is not told to go on from one.
        """
        root = Path(self.trainer.default_root_dir)
        if self.config.fit.ckpt_path is None and any(root.glob("checkpoints/*.ckpt")):
            raise UserError(
                f"{root} already holds a run: continue it with --ckpt_path last, or name another directory with "
                "--trainer.default_root_dir."
            )
