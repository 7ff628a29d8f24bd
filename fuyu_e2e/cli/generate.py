"""`fuyu-e2e generate`: continues one prompt, or several in turn."""

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence

from fuyu_e2e.cli.prompting import PROMPT_HELP, add_max_new_tokens, add_model_and_images, prompt_parts
from fuyu_e2e.cli.starting import starting
from fuyu_e2e.data.home import words_with_home
from fuyu_e2e.errors import UserError
from fuyu_e2e.training.settings.arguments import CommandParser, whole_number

MOST_SEED = 2**63 - 1
"""torch accepts seeds of 64 bits."""
SET_IMAGES = ":image"
INTERACTIVE_HELP = (
    "Load the model once and read prompts from standard input, one a line, until it ends. A line `:image a.png b.png` "
    "sets the images of the prompts that follow, `:image` alone removes them, an empty line asks for a caption."
)


def generate(args: Sequence[str]) -> int:
    """Continues a prompt with a checkpoint's model, and prints the text."""
    parser = CommandParser(prog="fuyu-e2e generate", description=generate.__doc__)
    add_model_and_images(parser)
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--prompt", default="", help=PROMPT_HELP)
    asked.add_argument("--interactive", action="store_true", help=INTERACTIVE_HELP)
    add_max_new_tokens(parser)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest token.")
    parser.add_argument("--top-k", type=int, default=None, help="Draw from this many of the likeliest tokens.")
    parser.add_argument("--top-p", type=float, default=None, help="Draw from the likeliest that reach this share.")
    parser.add_argument("--seed", type=whole_number(0, MOST_SEED), default=0, help="Seeds the draws.")
    options = parser.parse_args(args)

    with starting():
        from fuyu_e2e.checkpoint.loading import load_model
        from fuyu_e2e.data.processor import Processor
        from fuyu_e2e.inference.device import autocast, find_device
        from fuyu_e2e.inference.generation import Sampling
        from fuyu_e2e.inference.generation import generate as generate_ids

    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    device = find_device(options.device)
    model = load_model(options.checkpoint, device)
    processor = Processor(model.builder)

    def answer(images: Sequence[str], text: str) -> str:
        [written] = generate_ids(
            model.decoder,
            [processor(*prompt_parts(images, text))],
            max_new_tokens=options.max_new_tokens,
            eos_id=processor.eos_id,
            sampling=sampling,
        )
        return processor.decode(written)

    with autocast(device):
        if options.interactive:
            answer_lines(answer, options.image)
        else:
            print(answer(options.image, options.prompt))
    return 0


def answer_lines(answer: Callable[[Sequence[str], str], str], images: Sequence[str]) -> None:
    """Answers prompts from standard input, one a line, until it ends; prints an error of a prompt and continues.

    Args:
        answer: Continues a prompt, given its images and its text.
        images: The images of the first prompts.
    """
    for line in _lines():
        try:
            command, _, rest = line.strip().partition(" ")
            if command == SET_IMAGES:
                images = _paths(rest)
            else:
                print(answer(images, line.strip()), flush=True)
        except UserError as error:
            print(f"fuyu-e2e: {error}", file=sys.stderr, flush=True)


def _lines() -> Iterator[str]:
    """Yields the lines of standard input, with a prompt sign for each in a terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    print(f"A prompt a line; {SET_IMAGES} FILE ... sets the images; Ctrl-D ends.", file=sys.stderr)
    try:
        while True:
            yield input("> ")
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)


def _paths(text: str) -> list[str]:
    try:
        return words_with_home(shlex.split(text))
    except ValueError as error:
        raise UserError(f"{SET_IMAGES} {text} can't be read ({error}): quote names as in a shell.") from error
