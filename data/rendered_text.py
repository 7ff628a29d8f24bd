"""Writes the shards of the reading task: `python data/rendered_text.py --out runs/ocr/data`."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.data.tokenizer import train_tokenizer
from fuyu_e2e.tasks.rendered_text import FONT_FOLDER, TEST_SEED, VOCAB_SIZE, Pictures, Split, find_fonts, write_shards


def main(args: Sequence[str] | None = None) -> None:
    """Writes pictures of words to train, validate and test on, and a tokenizer trained on their words."""
    parser = ArgumentParser(prog="python data/rendered_text.py", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/ocr/data"), help="Folder (default: %(default)s).")
    parser.add_argument("--fonts", type=Path, default=FONT_FOLDER, help="Where fonts are (default: %(default)s).")
    parser.add_argument(
        "--pictures",
        type=int,
        default=80_000,
        help="To train on; half as many of single letters and of short words, to begin with (default: %(default)s).",
    )
    parser.add_argument("--test-pictures", type=int, default=2_100, help="Of each test (default: %(default)s).")
    parser.add_argument("--seed", type=int, default=0, help="Of the training pictures (default: %(default)s).")
    parser.add_argument("--processes", type=int, default=2, help="Shards written at once (default: %(default)s).")
    options = parser.parse_args(args)
    options.out.mkdir(parents=True, exist_ok=True)
    trained = find_fonts("train", options.fonts)
    held_out = find_fonts("test", options.fonts)
    splits: tuple[tuple[Split, int, tuple[Path, ...], int], ...] = (
        ("train", options.seed, trained, options.pictures),
        ("letters", options.seed, trained, options.pictures // 2),
        ("easy", options.seed, trained, options.pictures // 2),
        ("val", TEST_SEED, trained, 280),
        ("test", TEST_SEED, held_out, options.test_pictures),
        ("test-known-fonts", TEST_SEED, trained, options.test_pictures),
    )
    shards = {}
    for split, seed, fonts, count in splits:
        pictures = Pictures(split=split, seed=seed, fonts=fonts)
        shards[split] = write_shards(options.out, pictures, count, processes=options.processes)
    texts = (text for document in read_documents(shards["train"][0], SampleStats()) for text in document.texts)
    train_tokenizer(texts, VOCAB_SIZE).save(options.out / "tokenizer.model")
    print(f"{options.pictures:,} training pictures in {len(trained)} fonts, tests in {len(held_out)}: {options.out}")


if __name__ == "__main__":
    main()
