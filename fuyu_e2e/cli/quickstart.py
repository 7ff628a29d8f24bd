"""`fuyu-e2e quickstart`: from handwritten digits to a model that reads them."""

from collections.abc import Sequence

from fuyu_e2e.cli.starting import starting
from fuyu_e2e.training.settings.arguments import CommandParser, whole_number

MOST_SEED = 2**32 - 1
"""`fit` accepts no larger seed."""


def quickstart(args: Sequence[str]) -> int:
    """Writes shards of composed digits, trains a tokenizer and a model on them, and scores what it reads."""
    parser = CommandParser(prog="fuyu-e2e quickstart", description=quickstart.__doc__)
    parser.add_argument("--out", default="runs/quickstart", help="Directory of the run (default: %(default)s).")
    parser.add_argument(
        "--recipe",
        default="recipes/quickstart.yaml",
        help="What to train; recipes/quickstart-mod.yaml has Mixture-of-Depths (default: %(default)s).",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, MOST_SEED),
        default=0,
        help="Seeds the training pictures, their order, the weights.",
    )
    parser.add_argument(
        "--pictures", type=whole_number(1), default=80_000, help="Training pictures (default: %(default)s)."
    )
    parser.add_argument(
        "--test-pictures", type=whole_number(1), default=1_000, help="Pictures of each test (default: %(default)s)."
    )
    parser.add_argument("--max-steps", type=whole_number(1), help="Training steps, instead of the recipe's.")
    options = parser.parse_args(args)

    with starting():
        from fuyu_e2e.studies.quickstart import run

    run(options)
    return 0
