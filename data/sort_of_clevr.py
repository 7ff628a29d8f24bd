"""Writes the shards of Sort-of-CLEVR: `python data/sort_of_clevr.py --out runs/sort-of-clevr/data`."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.data.tokenizer import train_tokenizer
from fuyu_e2e.tasks.sort_of_clevr import KINDS, OBJECTS, TEST_SEED, VOCAB_SIZE, write_shards


def main(args: Sequence[str] | None = None) -> None:
    """Writes pictures with questions to train, validate and test on, and a tokenizer trained on their words."""
    parser = ArgumentParser(prog="python data/sort_of_clevr.py", description=main.__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/sort-of-clevr/data"), help="Folder (default: %(default)s)."
    )
    parser.add_argument(
        "--images", type=int, default=9_800, help="Pictures to train on, of 20 questions each (default: %(default)s)."
    )
    parser.add_argument(
        "--fewer",
        type=int,
        default=9_800,
        help="Pictures of one object to begin training with, and of two, and so on to five (default: %(default)s).",
    )
    parser.add_argument(
        "--close-calls",
        type=int,
        default=27_500,
        help="Pictures of six objects to ask only questions about that are close calls (default: %(default)s).",
    )
    parser.add_argument("--test-images", type=int, default=2_000, help="Pictures to test on (default: %(default)s).")
    parser.add_argument("--seed", type=int, default=0, help="Of the training pictures (default: %(default)s).")
    parser.add_argument("--processes", type=int, default=2, help="Shards written at once (default: %(default)s).")
    options = parser.parse_args(args)
    options.out.mkdir(parents=True, exist_ok=True)
    first = {}
    for objects in range(1, OBJECTS + 1):
        for kind in KINDS:
            first[kind], *_ = write_shards(
                options.out,
                split="train",
                count=options.images if objects == OBJECTS else options.fewer,
                seed=options.seed,
                objects=objects,
                kind=kind,
                processes=options.processes,
            )
    write_shards(
        options.out,
        split="train",
        count=options.close_calls,
        seed=options.seed,
        kind="close-calls",
        processes=options.processes,
    )
    write_shards(options.out, split="val", count=50, seed=TEST_SEED, processes=options.processes)
    write_shards(options.out, split="test", count=options.test_images, seed=TEST_SEED, processes=options.processes)
    texts = (
        text for path in first.values() for document in read_documents(path, SampleStats()) for text in document.texts
    )
    train_tokenizer(texts, VOCAB_SIZE).save(options.out / "tokenizer.model")
    print(f"{options.images:,} pictures to train on, {options.test_images:,} to test on: {options.out}")


if __name__ == "__main__":
    main()
