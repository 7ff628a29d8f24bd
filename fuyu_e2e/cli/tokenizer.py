"""`fuyu-e2e tokenizer train`: a tokenizer from the text of shards."""

from collections.abc import Sequence
from pathlib import Path

from fuyu_e2e.arguments import CommandParser


def tokenizer(args: Sequence[str]) -> int:
    """Trains a sentencepiece tokenizer on the text of shards."""
    parser = CommandParser(prog="fuyu-e2e tokenizer", description=tokenizer.__doc__)
    train = parser.add_subparsers(dest="action", required=True).add_parser("train", help="Train a new tokenizer.")
    train.add_argument("--shards", required=True, help="Path, glob or brace pattern of shards of any format.")
    train.add_argument("--vocab-size", type=int, required=True, help="Tokens, special and byte tokens included.")
    train.add_argument("--out", required=True, help="The file to write.")
    options = parser.parse_args(args)

    from fuyu_e2e.shards.formats import read_documents
    from fuyu_e2e.shards.sources import ShardCache, expand_patterns
    from fuyu_e2e.tally import Tally
    from fuyu_e2e.tokenizer import train_tokenizer

    found = expand_patterns(options.shards)
    cache = ShardCache.at()
    tally = Tally()
    texts = (
        text
        for shard in found
        for document in read_documents(cache.path(shard), tally, shard)
        for text in document.texts
    )
    trained = train_tokenizer(texts, options.vocab_size)
    trained.save(Path(options.out))
    print(
        f"{options.out}: {trained.vocab_size} tokens from {len(found)} shards ({tally.read} samples read, "
        f"{tally.skipped.total()} skipped)"
    )
    return 0
