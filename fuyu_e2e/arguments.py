"""Command lines that are refused with one sentence, and the name that was probably meant."""

import argparse
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NoReturn

from fuyu_e2e.errors import UserError

UNRECOGNIZED = "unrecognized arguments: "
"""How argparse and jsonargparse begin to name arguments that no option takes."""
REQUIRED = "the following arguments are required: "
"""How argparse begins to name arguments that are missing."""


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, whose errors are sentences of the command line like all others.

    Abbreviated options are refused: with them, a typo could set something else than was meant.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | kwargs)
        self._given: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses, and keeps what was given for an error to look at."""
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._given, namespace)

    def _first_unknown(self) -> str | None:
        known = _options(self)
        options = (word for word in self._given if word.startswith("--") and word != "--")
        return next((word for word in options if word.partition("=")[0] not in known), None)

    def error(self, message: str) -> NoReturn:
        """Refuses the command line.

        Raises:
            UserError: Always, with the nearest name where there is one.
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
        raise UserError(f"{message}; {self.prog} --help tells more.")


def _options(parser: argparse.ArgumentParser) -> set[str]:
    """All options of a parser and of its subcommands."""
    known = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            known |= {option for inner in action.choices.values() for option in _options(inner)}
    return known


def unknown_option(arguments: str, known: Iterable[str], help_command: str) -> str:
    """The sentence that refuses an argument which no option takes.

    Args:
        arguments: What was left over of the command line, an option first.
        known: All options.
        help_command: The command that lists them.
    """
    name = arguments.split()[0].partition("=")[0]
    kind = "option" if name.startswith("-") else "argument"
    hint = did_you_mean(name, known) or f"{help_command} lists all options."
    return f"There is no {kind} {name}: {hint}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The question after the nearest of the known names; empty where none is near.

    Of dotted names, one that ends alike is nearest (`--max_steps` means `--trainer.max_steps`), then one of the same
    group, and where there is no such group, one that is alike as a whole.
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
