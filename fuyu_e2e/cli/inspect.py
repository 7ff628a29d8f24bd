"""`fuyu-e2e inspect`: a sample as it enters the model."""

from collections.abc import Sequence

from fuyu_e2e.cli.starting import starting
from fuyu_e2e.training.settings.own_options import add_inspect_options, show_help


def inspect(args: Sequence[str]) -> int:
    """Prints the tokens of one training sample, and draws its images as the model sees them."""
    if "--help" in args or "-h" in args:
        show_help("inspect", inspect.__doc__, add_inspect_options)
        return 0
    with starting():
        from fuyu_e2e.training.inspect_sample import inspect_sample

    inspect_sample(args)
    return 0
