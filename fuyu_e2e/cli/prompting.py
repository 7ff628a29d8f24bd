"""Options that all commands with a prompt share: the model, the device, and the prompt."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from fuyu_e2e.training.settings.arguments import add_allow_imports, whole_number

PROMPT_HELP = "The text after the images; empty asks for a caption."
DEVICE_HELP = (
    "What computes, as cpu or cuda:1 (default: CUDA where there is a GPU). Products are in bfloat16 on a GPU that has "
    "it, in float32 elsewhere."
)
MOST_TOKENS = 2**31 - 1
"""Most positions of a document that the decoder can count."""


def add_model_and_images(parser: ArgumentParser) -> None:
    """Adds the options for the model, its device, and the prompt's images."""
    add_allow_imports(parser)
    parser.add_argument("--checkpoint", required=True, help="A checkpoint, a run's directory, or an exported folder.")
    parser.add_argument("--image", action="append", default=[], help="An image file; may be given several times.")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)


def add_max_new_tokens(parser: ArgumentParser) -> None:
    """Adds the option for the most generated tokens."""
    parser.add_argument(
        "--max-new-tokens",
        type=whole_number(1, MOST_TOKENS),
        default=64,
        help="Tokens written at most (default: %(default)s).",
    )


def prompt_parts(images: Sequence[str], text: str) -> list[Path | str]:
    """Returns the parts of a prompt, as `fuyu_e2e.Processor` takes them."""
    return [*map(Path, images), *([text] if text else [])]
