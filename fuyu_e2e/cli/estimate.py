"""`fuyu-e2e estimate`: memory, operations and hours of a recipe's run, before it is started."""

from collections.abc import Sequence

from fuyu_e2e.cli.starting import starting
from fuyu_e2e.training.settings.own_options import add_estimate_options, show_help


def estimate(args: Sequence[str]) -> int:
    """Prints parameters, operations, memory by part, tokens and hours of a recipe's run."""
    if "--help" in args or "-h" in args:
        show_help("estimate", estimate.__doc__, add_estimate_options)
        return 0
    with starting():
        from fuyu_e2e.training.estimate import estimated, show

    show(estimated(args))
    return 0
