"""`fuyu-e2e fit|validate|test|predict`: Lightning's commands, with a recipe."""

from collections.abc import Sequence

from fuyu_e2e.recipe import FuyuCLI


def lightning(args: Sequence[str]) -> int:
    """Runs Lightning's command; a run that a signal ended leaves from within, with an exit code of its own."""
    FuyuCLI(args)
    return 0
