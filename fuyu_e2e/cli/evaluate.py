"""`fuyu-e2e evaluate`: a checkpoint's scores on a task."""

from argparse import ArgumentTypeError
from collections.abc import Sequence

from fuyu_e2e.cli.prompting import DEVICE_HELP
from fuyu_e2e.cli.starting import starting
from fuyu_e2e.eval.task import BATCH_TOKENS
from fuyu_e2e.training.settings.arguments import CommandParser, add_allow_imports, whole_number


def evaluate(args: Sequence[str]) -> int:
    """Scores a checkpoint on a task, with intervals, and tells how much of the score comes from the images."""
    parser = CommandParser(prog="fuyu-e2e evaluate", description=evaluate.__doc__)
    add_allow_imports(parser)
    parser.add_argument("--checkpoint", required=True, help="A checkpoint, a run's directory, or an exported folder.")
    parser.add_argument("--task", required=True, help="A task file, or the name of a shipped one.")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        type=_path_by_name,
        metavar="KEY=PATH",
        help="A file or folder of the task's data, in place of the task's own; may be given several times.",
    )
    parser.add_argument("--limit", type=whole_number(1), help="Ask the first N questions only.")
    parser.add_argument("--out", help="Where the report goes (default: evaluate/TASK in the run's directory).")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument(
        "--batch-tokens",
        type=whole_number(1),
        default=BATCH_TOKENS,
        help="Tokens read and written at once, which memory bounds; a longer question is scored as wrong (default: "
        "%(default)s).",
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="Seeds the exchange of images and the intervals."
    )
    options = parser.parse_args(args)

    with starting():
        from fuyu_e2e.eval.checkpoint_scores import score_checkpoint

    score_checkpoint(options)
    return 0


def _path_by_name(text: str) -> tuple[str, str]:
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise ArgumentTypeError(f"{text!r} is not KEY=PATH")
    return name, path
