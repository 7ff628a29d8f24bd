"""The command line: Lightning's `fit`, `validate`, `test` and `predict`, and the project's own commands."""

import errno
import logging
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from fuyu_e2e.checkpoint.commands import checkpoint
from fuyu_e2e.checkpoint.loading import TrainedModel, load_model
from fuyu_e2e.datamodule import FuyuDataModule
from fuyu_e2e.errors import UnusableSampleError, UserError
from fuyu_e2e.estimate import estimate
from fuyu_e2e.eval.commands import evaluate
from fuyu_e2e.exit_codes import WRONG_USE
from fuyu_e2e.export.commands import export, import_model
from fuyu_e2e.inference.depth import token_depth
from fuyu_e2e.inference.depth_map import depth_map
from fuyu_e2e.inference.generation import Sampling
from fuyu_e2e.inference.generation import generate as generate_ids
from fuyu_e2e.inspection import draw_sequence, show_tokens
from fuyu_e2e.processor import Processor
from fuyu_e2e.quickstart import quickstart
from fuyu_e2e.recipe import FuyuCLI
from fuyu_e2e.sequence import TokenSequence
from fuyu_e2e.shards.commands import shards
from fuyu_e2e.shards.formats import read_documents
from fuyu_e2e.shards.progress import Progress
from fuyu_e2e.shards.sources import ShardCache, expand_patterns
from fuyu_e2e.tally import Tally
from fuyu_e2e.tokenizer import OFTEN, suggest_vocab_size, train_tokenizer
from fuyu_e2e.version import __version__

USAGE = f"""fuyu-e2e {__version__}: train a multimodal decoder with no vision encoder, from scratch.

usage: fuyu-e2e COMMAND [--help]

  quickstart         train a small model on handwritten digits, score it, show what it reads
  fit                train:       fuyu-e2e fit --config recipes/X.yaml [--data.train 'PATTERN'] [--ckpt_path last]
  validate, test     loss and perplexity of a checkpoint on data.val or data.test
  predict            continue the documents of data.predict, into predictions.jsonl of the run's directory
  evaluate           score a checkpoint on a task, and whether it looks:  fuyu-e2e evaluate --checkpoint C --task T
  generate           continue one prompt:  fuyu-e2e generate --checkpoint C --image a.png --prompt "..."
  routing            show how much depth each token of a prompt gets in a model with routed blocks
  checkpoint         verify, info, consolidate: whether one is what was written, what it is, and it in one file
  export             write a trained model for fuyu_e2e.load, or --to transformers for FuyuForCausalLM
  import             make a FuyuForCausalLM folder a model to go on with: generate, fit, export
  tokenizer train    train a tokenizer on the text of shards
  shards             index, verify, stats or write: what shards hold, and new ones from your own files
  inspect            show a sample as it enters the model
  estimate           memory, operations and hours of a recipe's run, before it is started
"""
LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")


class InspectCLI(FuyuCLI):
    """The same recipe, to look at one of its samples."""

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(args, run=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds which sample to show, and where to."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--index", type=int, default=0, help="Number of the sample in the training shards.")
        parser.add_argument("--out", default="inspect.png", help="Where the picture of its images goes.")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """A trainer that leaves nothing behind; none is needed to look at a sample."""
        return pl.Trainer(logger=False, enable_checkpointing=False)


def inspect(args: Sequence[str]) -> int:
    """Prints the tokens of one training sample, and draws its images as the model sees them."""
    cli = InspectCLI(args)
    data: FuyuDataModule = cli.datamodule
    tally = Tally()
    index = cli.config.index
    document = next(islice(data.documents("train", tally), index, None), None)
    if document is None:
        raise UserError(f"--index {index} is behind the last usable sample ({tally.summary()}).")
    try:
        sequence = data.builder.build(document)
    except UnusableSampleError as error:
        raise UserError(f"Sample {index} can't be used ({error}): it is skipped and counted in training.") from error
    Console(highlight=False).print(show_tokens(sequence, data.tokenizer))
    if sequence.images:
        draw_sequence(sequence, data.images.patch_size, Path(cli.config.out))
        print(
            f"The images with their patches (red), newline tokens (blue) and padding (grey stripes): {cli.config.out}"
        )
    return 0


def generate(args: Sequence[str]) -> int:
    """Continues one prompt with a checkpoint's model, and prints the text."""
    parser = ArgumentParser(prog="fuyu-e2e generate", description=generate.__doc__)
    _add_prompt(parser)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest token.")
    parser.add_argument("--top-k", type=int, default=None, help="Draw from this many of the likeliest tokens.")
    parser.add_argument("--top-p", type=float, default=None, help="Draw from the likeliest that reach this share.")
    parser.add_argument("--seed", type=int, default=0, help="Seeds the draws.")
    options = parser.parse_args(args)
    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    model, prompt = _prompted(options)
    [written] = generate_ids(
        model.decoder,
        [prompt],
        max_new_tokens=options.max_new_tokens,
        eos_id=model.tokenizer.eos_id,
        sampling=sampling,
    )
    print(model.tokenizer.decode(written))
    return 0


def routing(args: Sequence[str]) -> int:
    """Shows how many routed blocks each token of a prompt and of its continuation passes, as a picture."""
    parser = ArgumentParser(prog="fuyu-e2e routing", description=routing.__doc__)
    _add_prompt(parser)
    parser.add_argument("--out", default="map.png", help="Where the picture goes (default: %(default)s).")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args(args)
    model, prompt = _prompted(options)
    eos_id = model.tokenizer.eos_id
    [written] = generate_ids(model.decoder, [prompt], max_new_tokens=options.max_new_tokens, eos_id=eos_id)
    depth = token_depth(model.decoder, prompt, written)
    depth_map(depth, model.tokenizer).save(options.out)
    print(f"{model.tokenizer.decode(written)}\n\nShare of the {len(depth.blocks)} routed blocks that tokens passed:")
    for name, share in depth.shares.items():
        print(f"  {name:8} {share:6.1%}")
    print(f"The heat map: {options.out}")
    return 0


def _add_prompt(parser: ArgumentParser) -> None:
    """What `_prompted` reads."""
    parser.add_argument("--checkpoint", required=True, help="A checkpoint, a run's directory, or an exported folder.")
    parser.add_argument("--image", action="append", default=[], help="An image file; may be given several times.")
    parser.add_argument("--prompt", default="", help="The text behind the images; empty asks for a caption.")


def _prompted(options: Namespace) -> tuple[TrainedModel, TokenSequence]:
    """The model and the prompt that a command was given."""
    model = load_model(options.checkpoint)
    parts = [*map(Path, options.image), *([options.prompt] if options.prompt else [])]
    return model, Processor(model.builder)(*parts)


def tokenizer(args: Sequence[str]) -> int:
    """Trains a sentencepiece tokenizer on the text of shards."""
    parser = ArgumentParser(prog="fuyu-e2e tokenizer", description=tokenizer.__doc__)
    train = parser.add_subparsers(dest="action", required=True).add_parser("train", help="Train a new tokenizer.")
    train.add_argument("--shards", required=True, help="Path, glob or brace pattern of shards of any format.")
    train.add_argument("--vocab-size", type=int, required=True, help="Tokens, special and byte tokens included.")
    train.add_argument("--out", required=True, help="The file to write.")
    options = parser.parse_args(args)
    found = expand_patterns(options.shards)
    if (out := Path(options.out)).is_dir():
        raise UserError(f"--out {out} is a folder: name the file to write, such as {out / 'tokenizer.model'}.")
    cache = ShardCache.at()
    tally = Tally()
    with Progress("Reading shards", len(found), "shards") as progress:
        texts = [
            text
            for shard in found
            for document in read_documents(cache.path(shard), tally, shard, progress.advance)
            for text in document.texts
        ]
    with Progress("Training the tokenizer"):
        trained = train_tokenizer(texts, options.vocab_size)
        suggested = suggest_vocab_size(trained, texts)
    trained.save(out)
    print(
        f"{out}: {trained.vocab_size:,} tokens from {len(found)} shards ({tally.read:,} samples read, "
        f"{tally.skipped.total():,} skipped), {trained.vocab_size - trained.padding:,} of them real, "
        f"{trained.padding:,} padding that no text uses"
    )
    if suggested:
        print(
            f"This text suggests --vocab-size {suggested}: it holds the last tokens of a larger vocabulary fewer than "
            f"{OFTEN} times each, too few to learn them."
        )
    return 0


def lightning(args: Sequence[str]) -> int:
    """Runs Lightning's command; a run that a signal ended leaves from within, with an exit code of its own."""
    FuyuCLI(args)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    **dict.fromkeys(LIGHTNING_COMMANDS, lightning),
    "inspect": inspect,
    "estimate": estimate,
    "checkpoint": checkpoint,
    "export": export,
    "import": import_model,
    "evaluate": evaluate,
    "generate": generate,
    "routing": routing,
    "shards": shards,
    "tokenizer": tokenizer,
    "quickstart": quickstart,
}


def main() -> int:
    """Runs one command; what the user can mend ends with a sentence and its exit code instead of a traceback."""
    name, *args = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "--version"):
        print(USAGE)
        return 0
    if name not in COMMANDS:
        print(f"fuyu-e2e: there is no command {name!r}.\n\n{USAGE}", file=sys.stderr)
        return WRONG_USE
    _silence_what_no_user_can_act_on()
    try:
        return COMMANDS[name]([name, *args] if name in LIGHTNING_COMMANDS else args)
    except UserError as error:
        # An error of a loader's worker arrives as a traceback in text, with the sentence in its last line.
        sentence = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")
        print(f"fuyu-e2e: {sentence}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" for {error.filename}" if error.filename else ""
        sentence = f"The disk has no room left{where}: make room on it, and run the command again."
        print(f"fuyu-e2e: {sentence}", file=sys.stderr)
        return WRONG_USE


def _silence_what_no_user_can_act_on() -> None:
    """Keeps a product's advertisement and a deprecation inside Lightning out of every run's first lines."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
