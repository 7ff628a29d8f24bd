"""Refuses Lightning settings that don't work here, and says what to use instead.

All others do what Lightning's documentation says. A setting that would be accepted but mean something else is refused.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from math import isnan
from string import Formatter
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.accelerators import AcceleratorRegistry

from fuyu_e2e.errors import UserError
from fuyu_e2e.training.callbacks.checkpoints import MONITOR
from fuyu_e2e.training.callbacks.climbing import Climbing
from fuyu_e2e.training.strategies import check_strategy

SHARES = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches",
          "val_check_interval")  # fmt: skip
"""Settings that Lightning takes as a number of rows or a fraction of them."""
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
LEAST = {"accumulate_grad_batches": 1, "val_check_interval": 1, "log_every_n_steps": 0, "num_sanity_val_steps": -1}
"""The least value of settings for which Lightning accepts any whole number."""
COUNTED = ("step", "epoch")
"""Names besides figures that file names may contain."""
VALIDATED = ("val/loss", "val/perplexity", "val/token_accuracy", "val/exact_match")
"""Figures that a validation logs."""
LOGGED = ("train/loss", "train/perplexity", "train/gradient_norm", "tokens", "tokens/s", "bad_steps/skipped")
LOGGED_UNDER = ("lr/", "lr-", "data/", "throughput/", "ranks/", "routing/", "val/routing/")
"""Prefixes of further figures that training logs."""
SETTINGS = {"Checkpoints": "checkpoint.monitor", "Climbing": "data.climb.monitor"}
"""By callback, the setting that names its figure."""
CALLBACKS = {
    "StochasticWeightAveraging": "it counts in epochs, of which an endless stream has none; EMAWeightAveraging works",
    "GradientAccumulationScheduler": "it counts in epochs, of which an endless stream has none; set "
    "trainer.accumulate_grad_batches",
    "BatchSizeFinder": "a row has data.budget tokens, which the data depend on; fuyu-e2e estimate tells what fits",
    "LearningRateFinder": "rates are those of model.optimizer; try some in short runs",
    "ModelPruning": "it looks for weights elsewhere than in the decoder; leave it out",
    "BackboneFinetuning": "the decoder has no backbone; begin with its weights (model.weights)",
    "Timer": "it counts the time of all starts together; set trainer.max_time",
}
"""Lightning callbacks that don't work here, and the reason."""
SEEDS = 2**32
"""numpy takes seeds below this."""


def check_settings(settings: Namespace) -> None:
    """Refuses settings that are wrong by the recipe alone, before Lightning builds anything.

    Raises:
        UserError: Names the setting.
    """
    seed = settings["seed_everything"]
    if not 0 <= seed < SEEDS:
        raise UserError(
            f"seed_everything is {seed}, but must be a whole number from 0 to {SEEDS - 1}: the order of "
            "the data follows from it."
        )
    trainer = settings["trainer"]
    check_strategy(trainer["strategy"])
    check_callbacks(trainer["callbacks"])
    if trainer["barebones"]:
        raise UserError("trainer.barebones doesn't work here, since a run keeps checkpoints and curves: leave it out.")
    for name in SHARES:
        if isinstance(value := trainer[name], float) and 0 < value < 1:
            raise UserError(
                f"trainer.{name} is {value}, a share of rows that nobody counts beforehand: say how many rows."
            )
    if trainer["model_registry"]:
        raise UserError(
            "trainer.model_registry doesn't work here: leave it out, and publish a run with fuyu-e2e export."
        )
    if settings["checkpoint"]["enable_version_counter"]:
        raise UserError(
            "checkpoint.enable_version_counter doesn't work here, since a run that goes on writes over the names that "
            "it had: leave it out."
        )
    if (filename := settings["checkpoint"]["filename"]) is not None:
        check_filename(filename)


def check_filename(filename: str) -> None:
    """Refuses a `checkpoint.filename` that doesn't name a file next to the other checkpoints.

    Raises:
        UserError: The name can't be read, is empty in its braces, or contains a folder.
    """
    try:
        parts = list(Formatter().parse(filename))
        for _, name, form, _ in parts:
            format(1 if name in COUNTED else 1.0, form or "")
    except ValueError as error:
        raise UserError(
            f"checkpoint.filename is {filename!r}, whose braces can't be read ({error}): write names as in "
            "{step}-{val/loss:.2f}."
        ) from error
    if any(name is not None and not name for _, name, *_ in parts):
        raise UserError(f"checkpoint.filename is {filename!r}, with nothing in its braces: name a figure, or step.")
    if any("/" in text for text, *_ in parts):
        raise UserError(
            f"checkpoint.filename is {filename!r}, which names a folder: checkpoints lie side by side, so that the "
            "newest and the best are found."
        )


def check_limits(command: str, trainer: Namespace) -> None:
    """Refuses a command on no rows at all, which would silently do nothing.

    Raises:
        UserError: Names the setting.
    """
    limits = {"fit": ("limit_train_batches", "max_epochs")}
    for name in limits.get(command, (f"limit_{command.removesuffix('idate')}_batches",)):
        if trainer[name] is not None and trainer[name] == 0:
            raise UserError(f"trainer.{name} is {trainer[name]}, and nothing is left to {command}: leave it out.")


def set_monitor(settings: Namespace) -> None:
    """Sets the figure that ranks several best checkpoints if the recipe leaves it to us, since Lightning requires a
    name.

    Raises:
        UserError: There is no figure; or `mode` is set for our figure, of which lower is better.
    """
    checkpoint = settings["checkpoint"]
    if checkpoint["monitor"] is not None:
        return
    if checkpoint["mode"] == "max":
        raise UserError(
            f"checkpoint.mode is max, but no checkpoint.monitor says of what: the figure is {MONITOR}, the lower the "
            "better, unless it names another."
        )
    if checkpoint["save_top_k"] > 1:
        if settings["data"]["val"] is None:
            raise UserError(
                f"checkpoint.save_top_k is {checkpoint['save_top_k']}, but nothing tells the best: name the shards of "
                "data.val, or a figure in checkpoint.monitor."
            )
        checkpoint["monitor"] = MONITOR


def check_plugins(plugins: Iterable[Any]) -> None:
    """Refuses plugins that replace the way checkpoints are written.

    Raises:
        UserError: Names the plugin.
    """
    for one in plugins:
        if isinstance(one, CheckpointIO):
            raise UserError(
                f"trainer.plugins names {type(one).__name__}, which doesn't work here: checkpoints are written with "
                "checksums, in the background. Leave it out."
            )


def check_callbacks(named: Any) -> None:
    """Refuses Lightning callbacks of a recipe that don't work here.

    Raises:
        UserError: Names the callback and what to use instead.
    """
    for one in named if isinstance(named, list) else [named]:
        package, _, name = str(one.get("class_path", "") if isinstance(one, Namespace) else "").rpartition(".")
        if package.startswith("lightning.") and name in CALLBACKS:
            raise UserError(f"trainer.callbacks names {name}, which doesn't work here: {CALLBACKS[name]}.")


def check_devices(trainer: Namespace) -> None:
    """Refuses devices of a recipe that this machine doesn't have.

    Raises:
        UserError: Names the available ones.
    """
    asked, devices = trainer["accelerator"], trainer["devices"]
    if isinstance(asked, str) and asked != "auto":
        kinds = ["cuda", "mps"] if asked == "gpu" else [asked]
        known = AcceleratorRegistry.available_accelerators()
        here = [kind for kind in known if AcceleratorRegistry[kind]["accelerator"].is_available()]
        if not set(kinds) & set(known):
            raise UserError(f"trainer.accelerator is {asked}, which is unknown: say auto, gpu, {', '.join(known)}.")
        if not set(kinds) & set(here):
            raise UserError(
                f"trainer.accelerator is {asked}, which this machine doesn't have: say auto, or {' or '.join(here)}."
            )
    if devices in (0, "0", [], ""):
        raise UserError(f"trainer.devices is {devices!r}, but must be at least 1, or auto.")


def check_monitors(trainer: pl.Trainer) -> None:
    """Refuses a `monitor`, or a checkpoint file name, with a figure that nothing logs, and `data.climb` without the
    callback that climbs.

    Lightning would notice a monitor late, and write 0 into a file name. If there is a callback that is neither
    Lightning's nor ours, any name is accepted, since that callback may log it.

    Raises:
        UserError: Suggests a figure that is logged, or the callback.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    climb = getattr(trainer.datamodule, "climb", None)  # type: ignore[attr-defined]
    if climb is not None and not any(isinstance(one, Climbing) for one in callbacks):
        raise UserError(
            "data.climb is set, but no callback climbs: add fuyu_e2e.training.callbacks.climbing.Climbing() to the "
            "trainer's callbacks."
        )
    if climb is not None and not trainer.limit_val_batches:
        raise UserError(
            "data.climb is set, but trainer.limit_val_batches is 0, so that no validation tells when to climb: leave "
            "one of them out."
        )
    if not all(type(one).__module__.startswith(("lightning.", "fuyu_e2e.")) for one in callbacks):
        return
    validated = getattr(trainer.datamodule, "patterns", {}).get("val") is not None  # type: ignore[attr-defined]
    for one in callbacks:
        for _, figure, *_ in Formatter().parse(getattr(one, "filename", None) or ""):
            if figure is not None and figure not in COUNTED and not may_be_logged(figure):
                raise UserError(f"checkpoint.filename names {figure}, which is not logged: {near(figure)}")
        name = monitor_of(one)
        setting = SETTINGS.get(type(one).__name__, f"monitor of {type(one).__name__}")
        if name in VALIDATED and not validated:
            raise UserError(f"{setting} is {name}, but there is no data.val to validate on: name its shards.")
        if name is not None and not may_be_logged(name):
            raise UserError(f"{setting} is {name}, which is not logged: {near(name)}")


def monitor_of(callback: pl.Callback) -> str | None:
    """Returns the figure that a callback decides by; None if there is none."""
    name = getattr(callback, "monitor", None)
    return name if isinstance(name, str) else None


def may_be_logged(name: str) -> bool:
    """Returns whether training or validation logs a figure of that name, or figures under it."""
    return name in (*VALIDATED, *LOGGED) or name.startswith(LOGGED_UNDER)


def near(name: str) -> str:
    """Returns the end of a message about a figure that nothing logs: the one that was probably meant, or all."""
    found = get_close_matches(name.replace("_", "/", 1), {*LOGGED, *VALIDATED}, n=1)
    return f"did you mean {found[0]}?" if found else f"{', '.join((*VALIDATED, *LOGGED))} are."


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuses trainer settings that Lightning accepts but that don't work here.

    Raises:
        UserError: Names the setting.
    """
    clip = trainer.gradient_clip_val
    if clip is not None and (clip < 0 or isnan(clip)):
        raise UserError(f"trainer.gradient_clip_val is {clip}, but must be 0 (no clipping) or above.")
    if trainer.precision not in PRECISIONS:
        raise UserError(
            f"trainer.precision {trainer.precision} doesn't work here, since weights are kept in 32 bits: say "
            f"{', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}."
        )
    for name, least in LEAST.items():
        # A `val_check_interval` that is a duration is not an attribute of Lightning's trainer.
        if isinstance(value := getattr(trainer, name, None), int) and value < least:
            raise UserError(f"trainer.{name} is {value}, but must be at least {least}.")
    epoch, interval = trainer.limit_train_batches, getattr(trainer, "val_check_interval", None)
    by_epochs = trainer.check_val_every_n_epoch is not None
    if by_epochs and isinstance(epoch, int) and isinstance(interval, int) and 0 < epoch < interval:
        raise UserError(
            f"trainer.val_check_interval is {interval}, but an epoch has {epoch} rows (limit_train_batches): set "
            "trainer.check_val_every_n_epoch to null, and rows count over epochs."
        )
