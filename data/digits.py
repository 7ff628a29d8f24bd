"""Writes the shards of the digits task: `python data/digits.py --out runs/digits/data`."""

import os
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from fuyu_e2e.studies.quickstart import write_data
from fuyu_e2e.tasks.digits import EASY, write_shards


def main(args: Sequence[str] | None = None) -> None:
    """Writes pictures of digits to train, validate and test on, and a tokenizer trained on their texts."""
    parser = ArgumentParser(prog="python data/digits.py", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/digits/data"), help="Folder (default: %(default)s).")
    parser.add_argument(
        "--pictures",
        type=int,
        default=40_000,
        help="To train on; a fifth as many of one digit, and of one or two, to begin with (default: %(default)s).",
    )
    parser.add_argument("--test-pictures", type=int, default=1_000, help="Pictures to test on (default: %(default)s).")
    parser.add_argument("--seed", type=int, default=0, help="Of the training pictures (default: %(default)s).")
    options = parser.parse_args(args)
    write_data(options.out, options.seed, options.pictures, options.test_pictures)
    for split in EASY:
        count = max(1, options.pictures // 5)
        write_shards(options.out, split=split, count=count, seed=options.seed, processes=os.cpu_count() or 1)


if __name__ == "__main__":
    main()
