"""Turns errors of the command line into one sentence, with the name that was probably meant."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

from fuyu_e2e.errors import UserError

UNRECOGNIZED = "unrecognized arguments: "
"""Start of argparse's and jsonargparse's message about arguments that no option takes."""
REQUIRED = "the following arguments are required: "
"""Start of argparse's message about missing arguments."""
NO_VALUE = "expected one argument"
"""End of argparse's and jsonargparse's message about an option without its value."""
KINDS = {"int": "a whole number", "float": "a number"}
"""What messages call types."""


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Returns an argparse type for whole numbers from `least` to `most`, each included."""

    def read(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            bounds = f"at least {least}" if most is None or value < least else f"at most {most}"
            raise argparse.ArgumentTypeError(f"is {value}, but must be {bounds}")
        return value

    read.__name__ = "int"  # argparse's name for the type if the text is not a number
    return read


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, but with errors in the form of our other messages.

    Refuses abbreviated options: with them, a typo could set another option.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | kwargs)
        self._given: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses, and stores the arguments for error messages."""
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._given, namespace)

    def _first_unknown(self) -> str | None:
        known = _options(self)
        options = (word for word in self._given if word.startswith("--") and word != "--")
        return next((word for word in options if word.partition("=")[0] not in known), None)

    def error(self, message: str) -> NoReturn:
        """Refuses the command line.

        Raises:
            UserError: Always; suggests the nearest name if there is one.
        """
        if message.startswith(REQUIRED) and (unknown := self._first_unknown()):
            message = UNRECOGNIZED + unknown  # a typo is why the required one is missing
        if message.startswith(UNRECOGNIZED):
            raise UserError(unknown_option(message.removeprefix(UNRECOGNIZED), _options(self), f"{self.prog} --help"))
        if chosen := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            choices = [choice.strip("'\" ") for choice in chosen[2].split(",")]
            hint = did_you_mean(chosen[1], choices) or f"choose from {', '.join(choices)}."
            what = message.partition(":")[0].removeprefix("argument ")
            raise UserError(f"{what} can't be {chosen[1]!r}: {hint}")
        if wrong := re.search(r"argument (\S+): invalid (int|float) value: (.*)", message):
            raise UserError(f"{wrong[1]} is {wrong[3]}, but must be {KINDS[wrong[2]]}.")
        if out_of_range := re.search(r"argument (\S+): (is .*)", message):
            raise UserError(f"{out_of_range[1]} {out_of_range[2]}.")
        if message.endswith(NO_VALUE):
            raise UserError(without_value(message, f"{self.prog} --help"))
        raise UserError(f"{message}; {self.prog} --help tells more.")


def values_of(args: Sequence[str], *names: str) -> tuple[list[str], list[str]]:
    """Returns all values that a command line of a recipe gives an option, and the remaining arguments."""
    parser = CommandParser(prog="fuyu-e2e fit", add_help=False)
    parser.add_argument(*names, dest="values", action="append", default=[])
    found, rest = parser.parse_known_args(args)
    return found.values, rest


class _Import(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None
    ) -> None:
        for name in values.split(","):
            try:
                import_module(name)
            except (ImportError, ValueError) as error:
                raise UserError(f"--allow-imports {name} can't be imported ({error}).") from error


def add_allow_imports(parser: argparse.ArgumentParser) -> None:
    """Adds the option that imports the packages of a model's custom parts."""
    parser.add_argument(
        "--allow-imports",
        action=_Import,
        metavar="PACKAGE[,PACKAGE]",
        help="Packages that the model's own connectors, blocks and masks come from.",
    )


def _options(parser: argparse.ArgumentParser) -> set[str]:
    """Returns the options of a parser and of its subcommands."""
    known = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            known |= {option for inner in action.choices.values() for option in _options(inner)}
    return known


def without_value(message: str, help_command: str) -> str:
    """Returns the message for an option without its value, from argparse's or jsonargparse's message."""
    name = message.removeprefix("argument ").partition(":")[0].rpartition("/")[2]
    return f"{name} needs a value: {help_command} says which."


def unknown_option(arguments: str, known: Iterable[str], help_command: str) -> str:
    """Returns the message for an argument that no option takes.

    Args:
        arguments: The rest of the command line, starting with that argument.
        known: All options.
        help_command: The command that lists them.
    """
    name = arguments.split()[0].partition("=")[0]
    kind = "option" if name.startswith("-") else "argument"
    if name.endswith((".yaml", ".yml")) and "--config" in known:
        return f"There is no argument {name}: did you mean --config {name}?"
    hint = did_you_mean(name, known) or f"{help_command} lists all options."
    return f"There is no {kind} {name}: {hint}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns a question with the nearest of the known names; empty if none is near.

    Of dotted names, one with the same last part is nearest (`--max_steps` means `--trainer.max_steps`), then one of
    the same group, and without such a group, one that is similar as a whole.
    """
    parents = {option: option.rpartition(".")[0] for option in known}
    parent, _, last = name.rpartition(".")
    ends = [option for option in parents if option.rpartition(".")[2] == last.lstrip("-")]
    group = {option.rpartition(".")[2]: option for option, own in parents.items() if own == parent}
    if ends:
        near = ends[:1]
    elif group:
        near = [group[found] for found in get_close_matches(last, group, n=1)]
    else:
        near = get_close_matches(name, parents, n=1, cutoff=0.8)
    return f"did you mean {near[0]}?" if near else ""
