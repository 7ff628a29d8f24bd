"""Turns jsonargparse's errors into one sentence: the setting, the recipe that has it, the nearest name.

jsonargparse's messages list every type of a union and why each was refused, after a hundred lines of usage. This
module parses their text, since the errors carry nothing else. It passes on a message of another form, in one line.
"""

import inspect
import re
import sys
import traceback
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from fuyu_e2e.training.settings.arguments import (
    KINDS,
    NO_VALUE,
    REQUIRED,
    UNRECOGNIZED,
    did_you_mean,
    unknown_option,
    values_of,
    without_value,
)

HELP = "fuyu-e2e fit --help"
"""The command that lists all settings."""
LONGEST = 300
"""Most characters of a message that is passed on."""


TYPES = KINDS | {
    "str": "text",
    "bool": "true or false",
    "NoneType": "null",
    "tuple": "a list, as [a, b]",
    "list": "a list, as [a, b]",
    "dict": "names with a value each, as {a: b}",
}
"""What messages call types."""


class SettingError(Exception):
    """jsonargparse refused a setting.

    Not a ValueError, which jsonargparse would catch as one of its own if one config includes another.

    Attributes:
        message: jsonargparse's message.
        options: All options of the command.
    """

    def __init__(self, message: str, options: Collection[str]) -> None:
        super().__init__(message)
        self.message, self.options = message, options


def follows(target: str, source: str) -> str:
    """Returns jsonargparse's message for a value of a setting that is linked to another."""
    return f'Linked "{target}" must be given via "{source}".'


def recipes_of(args: Sequence[str]) -> list[str]:
    """Returns the recipes that a command line names."""
    return values_of(args, "-c", "--config")[0]


def groups_given(group: str, args: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the groups of settings that a command line gives whole, as `--data '{"workers": 2}'` or as a file."""
    found = []
    for text in values_of(args, f"--{group}")[0]:
        with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):  # the parser says what is wrong with it
            found.append(yaml.safe_load(text if text.startswith("{") else Path(text).read_text(encoding="utf-8")))
    return [settings for settings in found if isinstance(settings, dict)]


def sentence(error: SettingError, args: Sequence[str], classes: Collection[str]) -> str:
    """Returns the sentence that refuses a command line.

    Args:
        error: jsonargparse's error.
        args: The command line.
        classes: Names of classes that a setting may use without their path.
    """
    message = _of_meant_type(error.message)
    recipes: dict[str, Any] = {}
    for name in recipes_of(args):
        try:
            # A recipe may be given on the command line itself, in braces.
            text = name if name.startswith("{") else Path(name).read_text(encoding="utf-8")
            recipes[name] = yaml.safe_load(text)
        except OSError as problem:
            return f"The recipe {name} can't be read: {problem.strerror}."
        except UnicodeDecodeError as problem:
            return f"The recipe {name} is no text in UTF-8: {problem}."
        except yaml.YAMLError as problem:
            where = getattr(problem, "problem_mark", None)
            line = f" in line {where.line + 1}" if where else ""
            return f"The recipe {name} is no YAML{line}: {getattr(problem, 'problem', problem)}."
        if not isinstance(recipes[name], dict):
            return f"The recipe {name} holds no settings, as `trainer:` and below it `max_steps: 100` would be."
    if message.startswith("'utf-8' codec"):
        return f"{_no_text(args)} is no text in UTF-8: name a file of settings."
    if message.endswith(NO_VALUE):
        return without_value(message, HELP)
    if message.startswith(REQUIRED):
        missing = message.removeprefix(REQUIRED).split(", ")
        names = " and ".join(re.sub(r"^(fit|validate|test|predict)\.", "", name) for name in missing)
        return f"{names} {'is' if len(missing) == 1 else 'are'} not set: name a recipe that does with --config RECIPE."
    if message.startswith(UNRECOGNIZED):
        return unknown_option(message.removeprefix(UNRECOGNIZED), error.options, HELP)
    settings = [option.removeprefix("--") for option in error.options]
    # jsonargparse's message for a linked setting, and the one for a value of the wrong type.
    linked = re.search(r'Linked "(?P<target>[\w.]+)" must be given via "(?P<source>[\w.]+)"', message)
    if linked := linked or re.search(r"\((?P<source>[\w.]+)\) --> (?P<target>[\w.]+):", message):
        source = linked["source"].replace("model.config", "model.decoder")
        where = _where(linked["target"], args, recipes)
        return f"{where} can't be set, since it follows from {source}: leave it out, and set that."
    if unknown := re.match(r"(Subcommand|Group) '(.*?)' does not accept option '(.+?)'", message):
        group = unknown[2] if unknown[1] == "Group" else ""
        return _unknown(f"{group}.{unknown[3]}".strip("."), settings, args, recipes)
    key, in_group = "", False
    for part in re.findall(r'Parser key "([\w.]+)"', message):
        within = part == key or part.startswith(f"{key}.")  # within a group, a key has the full name
        in_group = in_group or within
        key = part if within else f"{key}.{part}".strip(".")
    recipes = {} if in_group else recipes  # what a group on the command line holds is in no recipe
    if (lacking := re.search(r"arguments are required: ([\w, ]+)", message)) and key == "model.decoder":
        return (
            f"{_where(key, args, recipes)} lacks {lacking[1]}: a named size takes no further settings, and a decoder "
            "that is spelled out needs all of these (docs/recipes.md lists those of the sizes)."
        )
    if no_group := re.search(r'Unable to load config "(.*?)"', message):
        return _no_settings(key, no_group[1], args, recipes)
    if unknown := re.search(r"Option '([\w.]+)' is not accepted", message):
        within = _settings_of(message[: unknown.start()], key) if key else settings
        return _unknown(f"{key}.{unknown[1]}".strip("."), within, args, recipes)
    # The rest of the message is about the innermost setting.
    rest = re.split(r'Parser key "[\w.]+":', message)[-1].lstrip("\n")
    given = re.search(r"(?:Got value|Given value): (.*)", rest)
    choices = _choices(rest)
    if key and given and choices:
        return f"{_where(key, args, recipes)} is {given[1]!r}, but must be {choices}."
    if unknown := re.search(r"(?:Expected a dot import path string: |has no attribute ')(\w+)", message):
        hint = (
            did_you_mean(unknown[1], set(classes) - {unknown[1]})
            or "write its path, as lightning.pytorch.callbacks.EarlyStopping."
        )
        return f"{_where(key, args, recipes)} names the class {unknown[1]}, which isn't known: {hint}"
    return f"{_where(key, args, recipes)}: {reason(rest)}." if key else f"{reason(rest)}."


def reason(message: str) -> str:
    """Returns in one line why a value was refused: for a union, by the type that the value was meant for."""
    message = re.sub(r"\s*- Expected a path but .* either not accessible or invalid\n\s*-", "", message)
    listed = message.partition("Errors:")[2].partition("Given value type:")[0]
    reasons = [_one_line(part) for part in re.split(r"\n\s*- ", listed)]
    told = [one for one in reasons if one and not one.startswith(("Expected a", "Not a valid subclass"))]
    line = (told[0] if told else _one_line(message)).replace("`", "")
    line = re.sub(r"Problem with given class_path '(?:\w+\.)*(\w+)'", r"\1", line)
    return re.sub(r"Requirement '(.+?)' not met\b.*", r"a package is missing, which pip install '\1' installs", line)


def is_of_others(error: BaseException) -> bool:
    """Returns whether another package's code raised an error, about a value that it was given, and not ours."""
    frames = traceback.extract_tb(error.__traceback__)
    return not (frames and Path(frames[-1].filename).is_relative_to(Path(__file__).parent))


def _of_meant_type(message: str) -> str:
    """Returns a message without the other types of a union, if the value was read as settings of its class.

    A decoder is a class of settings or the name of a size: that a setting of it is no name of a size says nothing.
    """
    union = re.compile(
        r"\n *Does not validate against any of the Union subtypes\n *Subtypes: [^\n]*\n *Errors:\n *- "
        r"(Problem with given class_path '[\w.]+':\n.*)\n *- Expected a typing\.Literal\[.*",
        re.DOTALL,
    )
    return union.sub(r"\n\1", message)


def _choices(message: str) -> str:
    """Returns what a value must be, if a message lists plain types only; empty if it lists classes."""
    expected = re.compile(
        r"(?:- )?Expected an? (?:<class '(?P<type>\w+)'>|typing\.Literal\[(?P<values>.*?)\])(?:\.|$)"
    )
    if found := expected.match(message.strip()):
        reasons = [found]
    else:
        listed = [line for line in message.partition("Errors:")[2].splitlines() if line.lstrip().startswith("- ")]
        outer = min((len(line) - len(line.lstrip()) for line in listed), default=0)
        matches = [expected.match(line.strip()) for line in listed if len(line) - len(line.lstrip()) == outer]
        reasons = [match for match in matches if match is not None]
        if len(reasons) < len(matches) and not any(match["values"] for match in reasons):
            return ""
    names: list[str] = []
    for reason in reasons:
        names += [TYPES.get(reason["type"], reason["type"])] if reason["type"] else reason["values"].split(", ")
    unquoted = list(dict.fromkeys(name.strip("'") for name in names))
    return " or ".join([", ".join(unquoted[:-1]), unquoted[-1]] if len(unquoted) > 1 else unquoted)


def _unknown(name: str, settings: Collection[str], args: Sequence[str], recipes: dict[str, Any]) -> str:
    """Returns the message for an unknown setting."""
    if _given_as(name, args) == f"--{name}":
        return unknown_option(f"--{name}", [f"--{setting}" for setting in settings], HELP)
    hint = did_you_mean(name, settings) or f"{HELP} lists all settings."
    source = _recipe_of(name, recipes) or _given_as(name, args) or "The recipe"
    return f"{source} sets {name}, which is no setting: {hint}"


def _settings_of(message: str, key: str) -> list[str]:
    """Returns the settings of the last class in a message, which is imported already."""
    path = re.findall(r"class_path '([\w.]+)'", message)[-1:]
    module, _, name = path[0].rpartition(".") if path else ("", "", "")
    found = getattr(sys.modules.get(module), name, None)
    return [f"{key}.{setting}" for setting in inspect.signature(found).parameters] if found is not None else []


def _no_settings(group: str, given: str, args: Sequence[str], recipes: dict[str, Any]) -> str:
    """Returns the message for a value given in place of a group that is neither settings nor a file of them."""
    if group == "checkpoint":
        return (
            f"--checkpoint is for settings of how checkpoints are kept, and {given!r} is none: name the checkpoint to "
            "read with --ckpt_path."
        )
    return (
        f"{_where(group, args, recipes)} is {given!r}, but must be a YAML file of such settings, or settings in "
        f"braces: {HELP} lists them."
    )


def _no_text(args: Sequence[str]) -> str:
    """Returns the first file of a command line that can't be read as text."""
    for name in (arg.rpartition("=")[2] for arg in args):
        with suppress(OSError):
            try:
                Path(name).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                return name
    return "A file"


def _given_as(key: str, args: Sequence[str]) -> str | None:
    """Returns the option that sets a setting on a command line: under its own name, or as part of a group."""
    given = {arg.partition("=")[0].removesuffix("+") for arg in args}
    parts = key.split(".")
    names = ["--" + ".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in given), None)


def _where(key: str, args: Sequence[str], recipes: dict[str, Any]) -> str:
    """Returns a setting with the place where it is set, unless that is its own option."""
    option = _given_as(key, args)
    if option == f"--{key}":
        return option
    source = _recipe_of(key, recipes) or option
    return f"{key} in {source}" if source else key


def _recipe_of(key: str, recipes: dict[str, Any]) -> str | None:
    """Returns the last recipe that contains a setting, or None."""
    return next((name for name, settings in reversed(recipes.items()) if _sets(settings, key.split("."))), None)


def _sets(settings: Any, parts: Sequence[str]) -> bool:
    if not parts:
        return True
    if isinstance(settings, list):
        return any(_sets(entry, parts) for entry in settings)
    if not isinstance(settings, dict):
        return False
    return (parts[0] in settings and _sets(settings[parts[0]], parts[1:])) or _sets(settings.get("init_args"), parts)


def _one_line(text: str) -> str:
    line = " ".join(text.split()).removesuffix(".")
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} …"
