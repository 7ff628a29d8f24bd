"""`fuyu-e2e fit|validate|test|predict`: Lightning's commands, with a recipe."""

from collections.abc import Sequence

from fuyu_e2e.cli.starting import starting


def lightning(args: Sequence[str]) -> int:
    """Runs Lightning's command; a run that a signal ended leaves from within, with an exit code of its own."""
    with starting():
        from fuyu_e2e.recipe import FuyuCLI

    FuyuCLI(args)
    return 0
