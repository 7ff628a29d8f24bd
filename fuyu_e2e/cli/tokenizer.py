"""`fuyu-e2e tokenizer train`: a tokenizer from the text of shards."""

from collections.abc import Sequence
from pathlib import Path

from fuyu_e2e.errors import UserError
from fuyu_e2e.training.settings.arguments import CommandParser, whole_number

MOST_TOKENS = 2**20
"""More than any tokenizer has; what the text doesn't fill would be padding, and cost a decoder's memory."""


def tokenizer(args: Sequence[str]) -> int:
    """Trains a sentencepiece tokenizer on the text of shards."""
    parser = CommandParser(prog="fuyu-e2e tokenizer", description=tokenizer.__doc__)
    train = parser.add_subparsers(dest="action", required=True).add_parser("train", help="Train a new tokenizer.")
    train.add_argument("--shards", required=True, help="Path, glob or brace pattern of shards of any format.")
    train.add_argument(
        "--vocab-size",
        type=whole_number(1, MOST_TOKENS),
        required=True,
        help="Tokens, special and byte tokens included.",
    )
    train.add_argument("--out", required=True, help="The file to write.")
    options = parser.parse_args(args)

    from fuyu_e2e.data.progress_bar import ProgressBar
    from fuyu_e2e.data.sample_stats import SampleStats
    from fuyu_e2e.data.shards.cache import ShardCache
    from fuyu_e2e.data.shards.locations import expand_patterns
    from fuyu_e2e.data.shards.reading import read_documents
    from fuyu_e2e.data.tokenizer import OFTEN, suggest_vocab_size, train_tokenizer

    found = expand_patterns(options.shards)
    if (out := Path(options.out)).is_dir():
        raise UserError(f"--out {out} is a folder: name the file to write, such as {out / 'tokenizer.model'}.")
    cache = ShardCache.at()
    stats = SampleStats()
    with ProgressBar("Reading shards", len(found), "shards") as progress:
        texts = [
            text
            for shard in found
            for document in read_documents(cache.path(shard), stats, shard, progress.advance)
            for text in document.texts
        ]
    if not any(text.strip("\n") for text in texts):
        raise UserError(f"The shards hold no text to train a tokenizer on ({stats.summary_with_examples}).")
    with ProgressBar("Training the tokenizer"):
        trained = train_tokenizer(texts, options.vocab_size)
        suggested = suggest_vocab_size(trained, texts)
    if out.exists():
        print(f"{out} was there, and is replaced: checkpoints trained with the one before still hold it.")
    trained.save(out)
    print(
        f"{out}: {trained.vocab_size:,} tokens from {len(found)} shards ({stats.read:,} samples read, "
        f"{stats.skipped.total():,} skipped), {trained.vocab_size - trained.padding:,} of them real, "
        f"{trained.padding:,} padding that no text uses"
    )
    if suggested:
        print(
            f"This text suggests --vocab-size {suggested}: it holds the last tokens of a larger vocabulary fewer than "
            f"{OFTEN} times each, too few to learn them. A decoder that is spelled out takes it with "
            f"--model.decoder.vocab_size {suggested}."
        )
    return 0
