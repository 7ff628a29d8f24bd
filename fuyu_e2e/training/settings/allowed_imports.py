"""Limits the classes that a recipe may name to our settings and parts of Lightning's trainer, unless a user adds
more."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from fuyu_e2e.checkpoint.run_directory import run_of
from fuyu_e2e.errors import UserError
from fuyu_e2e.training.settings.arguments import values_of
from fuyu_e2e.training.settings.setting_errors import SettingError, follows, groups_given

OPTION = "--allow-imports"
ALLOWED = (
    "fuyu_e2e.model.attention.mask",
    "fuyu_e2e.model.blocks",
    "fuyu_e2e.model.config",
    "fuyu_e2e.model.images",
    "fuyu_e2e.model.routing.config",
    "fuyu_e2e.data.shards.mixture",
    "fuyu_e2e.training.callbacks",
    "fuyu_e2e.training.checkpoint_io",
    "fuyu_e2e.training.no_profiler",
    "fuyu_e2e.training.optimizers",
    "fuyu_e2e.training.schedule",
    "fuyu_e2e.training.strategies",
    "fuyu_e2e.training.tensorboard",
    "lightning.fabric.plugins",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
)
"""Modules that settings of a recipe may come from. Not whole packages: LightningCLI and ours are classes that take a
command line, and torch has classes that load code."""
CALLBACKS = (
    "bad_steps",
    "checkpoint_guard",
    "checkpoints",
    "data_report",
    "ending",
    "last_checkpoint",
    "random_state",
    "routing_report",
    "samples",
    "signals",
    "step_lines",
    "summary",
    "throughput",
    "time_limit",
    "watchdog",
)
MOVED = {
    "fuyu_e2e.model.mask": "fuyu_e2e.model.attention.mask",
    "fuyu_e2e.model.block": "fuyu_e2e.model.blocks.dense",
    "fuyu_e2e.shards.mixture": "fuyu_e2e.data.shards.mixture",
    "fuyu_e2e.eval.during_training": "fuyu_e2e.training.callbacks.evaluation",
    "fuyu_e2e.training.curves": "fuyu_e2e.training.tensorboard",
    "fuyu_e2e.training.garbage": "fuyu_e2e.training.callbacks.garbage_collection",
    "fuyu_e2e.training.hosts": "fuyu_e2e.training.callbacks.heartbeat",
    "fuyu_e2e.training.progress": "fuyu_e2e.training.callbacks.progress_bar",
    **{f"fuyu_e2e.training.{name}": f"fuyu_e2e.training.callbacks.{name}" for name in CALLBACKS},
}
"""Current modules of classes that recipes of earlier versions name."""
_MOVED = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, MOVED))})(?=\.\w)")


def with_current_paths(text: str) -> str:
    """Returns the text of a recipe or an argument with the current class paths."""
    return _MOVED.sub(lambda found: MOVED[found[1]], text)


class DeniedImportError(Exception):
    """A setting names something outside the allowed packages; nothing of it was imported.

    Not a ValueError, which jsonargparse would catch as one of its own if a config is nested in a config.

    Attributes:
        path: The dotted path.
        key: The setting.
    """

    def __init__(self, path: str, key: str) -> None:
        super().__init__(f"{key} names {path}")
        self.path, self.key = path, key


class RecipeParser(LightningArgumentParser):
    """Lightning's parser, extended to report denied imports, to refuse linked settings, and to move runs.

    For a setting that is linked to another, jsonargparse refuses a value under its own name on the command line, but
    ignores one in a recipe or in a group (`--data '{"seed": 4}'`); this parser refuses both.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._followed: dict[str, str] = {}

    def link_arguments(self, source: Any, target: str, *args: Any, **kwargs: Any) -> None:
        """Makes the setting `target` follow from `source`."""
        super().link_arguments(source, target, *args, **kwargs)
        self._followed[target] = source

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        """Parses the text of a recipe.

        Raises:
            SettingError: It sets a linked setting.
        """
        settings = super().parse_string(with_current_paths(content), *args, **kwargs)
        for target, source in self._followed.items():
            if settings.get(target) is not None:
                raise SettingError(follows(target, source), self._option_string_actions)
        return settings

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Parses the command line. jsonargparse lets some denied imports, and files that aren't text, pass as raised.

        Raises:
            SettingError: The settings, or a file of settings, are wrong.
        """
        if args is not None:
            args = [with_current_paths(arg) if isinstance(arg, str) else arg for arg in args]
        for target, source in self._followed.items():
            group, _, name = target.rpartition(".")
            if any(given.get(name) is not None for given in groups_given(group, args)):
                self.error(follows(target, source))
        try:
            return super().parse_args(args, *rest, **kwargs)
        except (ImportError, UnicodeDecodeError) as error:
            self.error(str(error), error)

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Reads a recipe; one in a run's directory is for that run, wherever the directory was when it was saved."""
        settings = super().parse_path(path, *args, **kwargs)
        if run := run_of(Path(path)):
            settings["trainer.default_root_dir"] = str(run)
        return settings

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Refuses the command line.

        Raises:
            DeniedImportError: A setting names something that is not allowed.
            SettingError: Anything else is wrong.
        """
        denied = re.search(r"Importing '([\w.]+)' is not allowed", message)
        if denied and self.exit_on_error:  # else it parses a nested class and passes the message on
            key = re.search(r"key \"([\w.]+)\"|--([\w.]+?)(?:\.help)?:", message)
            raise DeniedImportError(denied[1], (key[1] or key[2]) if key else "a setting") from ex
        if not self.exit_on_error:
            super().error(message, ex)
        raise SettingError(message, (getattr(ex, "subcommand_parser", None) or self)._option_string_actions) from ex


def take_allowed(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the packages that a command line allows, and the remaining arguments.

    The parser of recipes doesn't know the option, so that no recipe can allow anything itself.

    Raises:
        UserError: Something other than a package was named.
    """
    values, rest = values_of(args, OPTION)
    named = [name for value in values for name in value.split(",")]
    for name in named:
        if not all(part.isidentifier() for part in name.split(".")) or name.split(".")[0] == "jsonargparse":
            raise UserError(f"{OPTION} {name!r} is no package that can be allowed: name one as Python imports it.")
    return named, rest


def is_allowed(path: str, packages: Sequence[str]) -> bool:
    """Returns whether a dotted path lies in one of the packages."""
    return any(path == package or path.startswith(f"{package}.") for package in packages)


def named_classes() -> set[str]:
    """Returns the names of classes that a setting may use without their path."""
    modules = (sys.modules[package] for package in ALLOWED if package in sys.modules)
    return {name for module in modules for name, value in vars(module).items() if isinstance(value, type)}


@contextmanager
def only_allowed_imports(also: Sequence[str]) -> Iterator[None]:
    """Restricts jsonargparse's imports to what is allowed, wherever the name comes from.

    jsonargparse checks its own list before each import that a value leads to, and again for the place where the result
    was defined. So no scan of recipes is needed, which would have to know every way in which jsonargparse reads a name
    (nested files, inline JSON, `.help`, short names, re-exports, types that fall back to others), and any that it
    adds. After the context, everything but the allowed packages stays denied in this process.
    """
    also = [package for package in also if not is_allowed(package, ALLOWED)]
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*ALLOWED, *also])
    try:
        yield
    finally:
        set_parsing_settings(import_path_denylist=list(also))


def names_outside(value: Any, packages: Sequence[str]) -> bool:
    """Returns whether a setting that may be a plain name is a dotted path whose import was denied."""
    return isinstance(value, str) and "." in value and not is_allowed(value, packages)
