"""The options that `inspect` and `estimate` have beside all settings of a recipe, and their help."""

import argparse
from collections.abc import Callable

from fuyu_e2e.training.settings.arguments import CommandParser

ASSUMED_MFU = 0.4
"""Share of the device's rate that a run is taken to reach, unless `--mfu` says better."""


def add_inspect_options(parser: argparse.ArgumentParser) -> None:
    """Adds which sample to show, and where to."""
    parser.add_argument(
        "--index", type=int, default=0, help="Number of the sample in the training shards (default: 0)."
    )
    parser.add_argument(
        "--out", default="inspect.png", help="Where the picture of its images goes (default: inspect.png)."
    )


def add_estimate_options(parser: argparse.ArgumentParser) -> None:
    """Adds what the run is to be estimated for."""
    parser.add_argument("--device", help="A card by name, as `h100 sxm` (default: what this machine has).")
    parser.add_argument(
        "--mfu",
        type=float,
        default=ASSUMED_MFU,
        help=f"Share of the device's rate that the run reaches (default: {ASSUMED_MFU}).",
    )


def show_help(command: str, description: str | None, add: Callable[[argparse.ArgumentParser], None]) -> None:
    """Prints the help of a command that takes a recipe: its own options, and where the settings of recipes are listed.

    Args:
        command: Its name.
        description: What it does.
        add: Adds its own options.
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
