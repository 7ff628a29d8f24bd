"""Builds a run from a recipe: LightningCLI with our module, data and callbacks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fuyu_e2e.checkpoint.run_directory import CHECKPOINTS
from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.home import with_home
from fuyu_e2e.data.shards.cache import CACHE_FOLDER
from fuyu_e2e.errors import UserError
from fuyu_e2e.model.attention.kernels import check_device
from fuyu_e2e.model.attention.mask import AttentionMask
from fuyu_e2e.training.callbacks.bad_steps import BadSteps
from fuyu_e2e.training.callbacks.checkpoint_guard import CheckpointGuard
from fuyu_e2e.training.callbacks.checkpoints import Checkpoints
from fuyu_e2e.training.callbacks.climbing import Climbing
from fuyu_e2e.training.callbacks.data_report import DataReport
from fuyu_e2e.training.callbacks.ending import Ending
from fuyu_e2e.training.callbacks.evaluation import EvaluationInTraining
from fuyu_e2e.training.callbacks.garbage_collection import GarbageCollection
from fuyu_e2e.training.callbacks.heartbeat import Heartbeat
from fuyu_e2e.training.callbacks.last_checkpoint import LastCheckpoint
from fuyu_e2e.training.callbacks.predictions import WritePredictions
from fuyu_e2e.training.callbacks.progress_bar import progress
from fuyu_e2e.training.callbacks.random_state import RandomState
from fuyu_e2e.training.callbacks.routing_report import RoutingReport
from fuyu_e2e.training.callbacks.samples import SampleGenerations
from fuyu_e2e.training.callbacks.save_recipe import SaveRecipe
from fuyu_e2e.training.callbacks.signals import StopSignals
from fuyu_e2e.training.callbacks.summary import Summary
from fuyu_e2e.training.callbacks.throughput import Throughput
from fuyu_e2e.training.callbacks.time_limit import TimeLimit
from fuyu_e2e.training.callbacks.watchdog import Watchdog
from fuyu_e2e.training.checkpoint_choice import checkpoint_to_read
from fuyu_e2e.training.checkpoint_io import BackgroundCheckpointIO
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.no_profiler import NoProfiler
from fuyu_e2e.training.settings.allowed_imports import (
    ALLOWED,
    OPTION,
    DeniedImportError,
    RecipeParser,
    named_classes,
    names_outside,
    only_allowed_imports,
    take_allowed,
)
from fuyu_e2e.training.settings.arguments import values_of
from fuyu_e2e.training.settings.intervals import set_intervals
from fuyu_e2e.training.settings.launcher_environment import launched_processes
from fuyu_e2e.training.settings.lightning_settings import (
    check_devices,
    check_limits,
    check_plugins,
    check_settings,
    set_monitor,
)
from fuyu_e2e.training.settings.setting_errors import SettingError, is_of_others, reason, recipes_of, sentence
from fuyu_e2e.training.strategies import Sharded
from fuyu_e2e.training.tensorboard import Curves

# Lets recipes name subclasses of masks; for a dataclass, jsonargparse accepts only the class itself by default.
set_parsing_settings(subclasses_enabled=[AttentionMask])


class FuyuCLI(LightningCLI):
    """LightningCLI with our module and data, a directory for each run, and the callbacks that every run has.

    The run's directory is `trainer.default_root_dir`; it holds `config.yaml`, `checkpoints/` and `tensorboard/`.
    """

    def __init__(self, args: Sequence[str], run: bool = True) -> None:
        self.throughput = Throughput()
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        self.allowed, rest = take_allowed(args)
        # The texts of settings in dataclasses; finding them takes a second, so only help looks for them.
        set_parsing_settings(docstring_parse_attribute_docstrings=any(arg.endswith("help") for arg in args))
        with only_allowed_imports(self.allowed):
            super().__init__(
                FuyuModule,
                FuyuDataModule,
                save_config_callback=SaveRecipe,
                save_config_kwargs={"save_to_log_dir": False},
                parser_class=RecipeParser,
                seed_everything_default=0,
                trainer_defaults={
                    "default_root_dir": "runs/default",
                    "precision": "bf16-mixed" if bf16 else "32-true",
                },
                parser_kwargs={"prog": "fuyu-e2e", "allow_abbrev": False},
                auto_configure_optimizers=False,
                args=rest,
                run=run,
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the settings of checkpoints and guards, and links settings that follow from others."""
        parser.usage = "%(prog)s --config RECIPE [--SETTING VALUE ...]"
        parser.description = (
            "Settings go in the recipe, as `trainer:` and below it `max_steps: 100`, or after it on the command "
            "line, as `--trainer.max_steps 100`: the last one holds. data.train, data.tokenizer, trainer.max_steps "
            "and trainer.default_root_dir, the run's directory, are what most runs change."
        )
        parser.epilog = (
            f"{OPTION} PACKAGE[,PACKAGE] on the command line, never in a recipe, lets settings name classes of other "
            "packages than Lightning and fuyu-e2e."
        )
        parser.link_arguments(
            "model.config", "data.patch_size", compute_fn=lambda config: config.patch_size, apply_on="instantiate"
        )
        parser.link_arguments(
            "model.config", "data.layout", compute_fn=lambda config: config.connector, apply_on="instantiate"
        )
        parser.link_arguments("seed_everything", "data.seed")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        # `last.ckpt` is a link to the newest checkpoint; a resumed run overwrites the names that it had.
        parser.set_defaults({"checkpoint.save_last": "link", "checkpoint.enable_version_counter": False})
        parser.add_argument(
            "--rows_per_step",
            type=int | None,
            default=None,
            help="Rows of an optimizer step, all processes together: from it and their number follows "
            "trainer.accumulate_grad_batches, also where a run goes on with fewer or more of them.",
        )
        parser.add_lightning_class_args(BadSteps, "bad_steps")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.add_lightning_class_args(Heartbeat, "hosts")
        parser.add_lightning_class_args(EvaluationInTraining, "evaluate")
        parser.link_arguments(
            "trainer.default_root_dir", "checkpoint.dirpath", compute_fn=lambda root: str(Path(root) / CHECKPOINTS)
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the seed, which must be a number: Lightning's `true` draws one, and a resumed run needs the same."""
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=self.seed_everything_default,
            help="Seeds the weights, the order of the data, and all else that is drawn.",
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Returns Lightning's commands, without the setting that would make them unpickle checkpoints."""
        return {name: {*skipped, "weights_only"} for name, skipped in LightningCLI.subcommands().items()}

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning would read settings, class paths included, from a checkpoint's hyperparameters."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the command line, and refuses what Lightning would refuse with a traceback or misread.

        Raises:
            UserError: A setting is wrong; the recipe names a class that is not allowed, or asks for something that
                only a command line may ask for; or the checkpoint is missing or can't be read.
        """
        try:
            # The default cache is in the home of whoever resumes the run: its own code expands it.
            self.config = with_home(parser.parse_args(args), but=(CACHE_FOLDER,))
            settings = self.config.get(str(self.config.get("subcommand")), self.config)
            for name in ("accelerator", "strategy", "profiler"):
                if names_outside(value := settings["trainer"][name], [*ALLOWED, *self.allowed]):
                    raise DeniedImportError(value, f"trainer.{name}")
            check_settings(settings)
        except DeniedImportError as error:
            raise UserError(
                f"{error.key} {_where(error.path, args)}names {error.path}, and a recipe may name only classes of "
                f"Lightning and fuyu-e2e: if you trust that code, say {OPTION} {error.path.split('.')[0]}."
            ) from error
        except SettingError as error:
            raise UserError(sentence(error, args, named_classes())) from error
        allowed = [yaml.safe_load(value) for value in values_of(args, "--data.allow_pipe")[0]]
        if settings["data"]["allow_pipe"] and allowed[-1:] != [True]:
            raise UserError(
                "data.allow_pipe would let the recipe run commands in your shell: if you trust it, say "
                "--data.allow_pipe true on the command line."
            )
        if (command := self.config.get("subcommand")) is not None:
            check_devices(settings["trainer"])
            check_limits(command, settings["trainer"])
            set_monitor(settings)
            if command == "fit" and (said := set_intervals(settings)):
                rank_zero_info(said)
            settings["ckpt_path"] = checkpoint_to_read(
                command, settings.get("ckpt_path"), Path(settings["trainer"]["default_root_dir"])
            )

    def instantiate_classes(self) -> None:
        """Builds module, data and trainer.

        Raises:
            UserError: Our code or the class refused a setting; jsonargparse wraps the original error.
        """
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError, RuntimeError, MisconfigurationException) as error:
            chain: list[BaseException] = []  # of causes, which jsonargparse lets run in a circle
            cause: BaseException | None = error
            while cause is not None and cause not in chain:
                chain.append(cause)
                cause = cause.__cause__ or cause.__context__
            ours = next((one for one in chain if isinstance(one, UserError)), None)
            if ours is None and not is_of_others(error):
                raise
            raise ours or UserError(f"{reason(str(error))}.") from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Builds the trainer, with TensorBoard in the run's directory unless the recipe names another logger.

        A progress bar or a summary of the recipe replaces ours, and `enable_checkpointing` false leaves our
        checkpoints out.
        """
        settings = self._get(self.config_init, "trainer")
        if settings["logger"] is None:
            # What only evaluates has no step, and no point in a run's curves.
            trains = self.subcommand in (None, "fit")
            root = settings["default_root_dir"]
            kwargs["logger"] = Curves(root, name="tensorboard", version="") if trains else False
        named, plugins = (_listed(settings[name]) for name in ("callbacks", "plugins"))
        check_plugins(plugins)
        own_bar = settings["enable_progress_bar"] is False or any(isinstance(one, ProgressBar) for one in named)
        shown: list[pl.Callback] = [] if own_bar else [progress()]
        if settings["enable_model_summary"] is not False and not any(isinstance(one, ModelSummary) for one in named):
            shown.append(Summary())
            kwargs["enable_model_summary"] = False  # or Lightning says that it leaves its own out
        kwargs["callbacks"] = [RandomState(), LastCheckpoint(), *named, *shown]
        kwargs["plugins"] = [*plugins, BackgroundCheckpointIO()]
        if settings["profiler"] is None:
            kwargs["profiler"] = NoProfiler()
        # They follow those of the recipe and those that have settings of their own.
        self.trainer_defaults["callbacks"] = [
            self.throughput,
            DataReport(),
            Climbing(),
            SampleGenerations(),
            RoutingReport(),
            WritePredictions(),
            CheckpointGuard(),
            GarbageCollection(),
            StopSignals(),
            TimeLimit(settings["max_time"]),
            Ending(),
        ]
        kwargs["max_time"] = None  # or Lightning adds its own
        kwargs |= launched_processes()
        if settings["enable_checkpointing"] is not False or any(isinstance(one, ModelCheckpoint) for one in named):
            return super().instantiate_trainer(**kwargs)
        kwargs["enable_checkpointing"] = None  # or Lightning refuses ours
        trainer = super().instantiate_trainer(**kwargs)
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [one for one in callbacks if not isinstance(one, ModelCheckpoint)]  # type: ignore[attr-defined]
        return trainer

    def before_fit(self) -> None:
        """Distributes the rows of a step over processes and micro-batches.

        Raises:
            UserError: They don't divide evenly; or the attention backend doesn't serve the device, which otherwise the
                first step would show.
        """
        rows, strategy = self.config.fit.rows_per_step, self.trainer.strategy
        if rows is not None:
            sharing = strategy.tensor_parallel_size if isinstance(strategy, Sharded) else 1
            processes = max(1, self.trainer.world_size // sharing)
            if rows < 1 or rows % processes:
                raise UserError(
                    f"rows_per_step is {rows}, but must be a multiple of the {processes} processes that read rows of "
                    "their own."
                )
            self.trainer.accumulate_grad_batches = rows // processes
        check_device(self.model.attention, self.trainer.strategy.root_device)


class RecipeReader(FuyuCLI):
    """A recipe of a command that doesn't run it.

    Args:
        args: The command line.
        add_options: Adds the command's own options to the parser.
    """

    def __init__(self, args: Sequence[str], add_options: Callable[[LightningArgumentParser], None]) -> None:
        self._add_options = add_options
        super().__init__(args, run=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the command's own options."""
        super().add_arguments_to_parser(parser)
        self._add_options(parser)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Returns a trainer that writes nothing, and that no command uses."""
        return pl.Trainer(logger=False, enable_checkpointing=False)


def _listed(value: Any) -> list[Any]:
    """Returns a setting that may be a value, a list or none as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _where(path: str, args: Sequence[str]) -> str:
    """Returns the recipe that names a class path, as part of a sentence; empty if none does."""
    recipes = recipes_of(args)
    name = path.rpartition(".")[2]  # the recipe may use another path, or the name alone
    found = (recipe for recipe in recipes if Path(recipe).is_file() and name in Path(recipe).read_text())
    return f"in {recipe} " if (recipe := next(found, None)) else ""
