"""Options of `inspect` and `estimate` in addition to a recipe's settings, and their help."""

import argparse
from collections.abc import Callable

from fuyu_e2e.training.settings.arguments import CommandParser

ASSUMED_MFU = 0.4
"""Fraction of the device's rate that a run is assumed to reach, unless `--mfu` is given."""


def add_inspect_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `inspect`: which sample to show, and the picture's file."""
    parser.add_argument(
        "--index", type=int, default=0, help="Number of the sample in the training shards (default: 0)."
    )
    parser.add_argument(
        "--out", default="inspect.png", help="Where the picture of its images goes (default: inspect.png)."
    )


def add_estimate_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `estimate`: the device and the assumed MFU."""
    parser.add_argument("--device", help="A card by name, as `h100 sxm` (default: what this machine has).")
    parser.add_argument(
        "--mfu",
        type=float,
        default=ASSUMED_MFU,
        help=f"Share of the device's rate that the run reaches (default: {ASSUMED_MFU}).",
    )


def show_help(command: str, description: str | None, add: Callable[[argparse.ArgumentParser], None]) -> None:
    """Prints the help of a command that takes a recipe: its own options, and where recipe settings are listed.

    Args:
        command: Its name.
        description: What it does.
        add: Adds its own options to a parser.
    """
    parser = CommandParser(
        prog=f"fuyu-e2e {command}",
        description=description,
        usage=f"fuyu-e2e {command} --config RECIPE [--OPTION VALUE ...] [--SETTING VALUE ...]",
        epilog="Every setting of a recipe can be given here, too, as in --data.train 'FOLDER/train-*.tar': "
        "fuyu-e2e fit --help lists them.",
    )
    parser.add_argument("-c", "--config", help="The recipe, a YAML file; may be given several times.")
    add(parser)
    parser.print_help()
