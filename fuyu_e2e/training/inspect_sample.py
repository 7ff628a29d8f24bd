"""Shows one training sample of a recipe as the model reads it."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from rich.console import Console

from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.inspection import draw_sequence, show_tokens
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.errors import UnusableSampleError, UserError
from fuyu_e2e.training.settings.own_options import add_inspect_options
from fuyu_e2e.training.settings.recipe import RecipeReader


def inspect_sample(args: Sequence[str]) -> None:
    """Prints the tokens of the sample that a command line names, and draws its images.

    Raises:
        UserError: A setting is wrong, there is no such sample, or it can't be used.
    """
    cli = RecipeReader(args, add_inspect_options)
    data: FuyuDataModule = cli.datamodule
    stats = SampleStats()
    index = cli.config.index
    if index < 0:
        raise UserError(f"--index is {index}, but must be at least 0, the first sample.")
    document = next(islice(data.documents("train", stats), index, None), None)
    if document is None:
        raise UserError(f"--index {index} is beyond the last usable sample ({stats.summary_with_examples}).")
    try:
        sequence = data.builder.build(document)
    except UnusableSampleError as error:
        raise UserError(f"Sample {index} can't be used ({error}): it is skipped and counted in training.") from error
    Console(highlight=False).print(show_tokens(sequence, data.tokenizer))
    if stats.skipped:
        print(f"Unusable samples before it have no index: {stats.summary_with_examples}.")
    if sequence.images:
        draw_sequence(sequence, data.images.patch_size, Path(cli.config.out))
        print(
            f"The images with their patches (red), newline tokens (blue) and padding (grey stripes): {cli.config.out}"
        )
