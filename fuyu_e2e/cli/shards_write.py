"""`fuyu-e2e shards write`: writes shards from a user's own files, and prints the commands that train on them."""

import glob
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fuyu_e2e.data.shards.cache import ShardCache
from fuyu_e2e.data.shards.locations import expand_patterns
from fuyu_e2e.data.shards.manifest import index
from fuyu_e2e.data.shards.tables import FORMS
from fuyu_e2e.data.shards.write_plan import Settings, WriteReport
from fuyu_e2e.data.shards.writing import INTERRUPTED, REPORT, write_shards
from fuyu_e2e.training.settings.arguments import CommandParser

VOCAB_SIZE = 512
"""Vocabulary of the tokenizer in the printed commands, as in `recipes/own-pictures.yaml`."""
FEW = 50
"""Validation documents below which a figure on them is mostly chance."""


def write(args: Sequence[str]) -> int:
    """Writes webdataset shards, and their manifest, from images with captions, tables, conversations or text."""
    parser = CommandParser(
        prog="fuyu-e2e shards write",
        description=f"{write.__doc__} The same command again writes what is missing after an interruption.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help=f"{FORMS[0].upper()}{FORMS[1:]}.")
    parser.add_argument("--out", type=Path, required=True, help="The folder of the shards.")
    parser.add_argument("--image-column", help="Column of images, where its name is not a common one.")
    parser.add_argument("--text-column", help="Column of texts or of turns, where its name is not a common one.")
    parser.add_argument("--images", type=Path, help="What relative image paths start from, if not the table's folder.")
    parser.add_argument(
        "--val-share", type=float, default=Settings.val_share, help="Rows for val (default: %(default)s)."
    )
    parser.add_argument("--seed", type=int, default=Settings.seed, help="Seeds which rows go into val.")
    parser.add_argument(
        "--shard-megabytes",
        type=float,
        default=Settings.shard_megabytes,
        help="Size of a shard, in millions of bytes (default: %(default)s).",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="Shards written at once.")
    options = parser.parse_args(args)
    try:
        report = write_shards(
            options.source,
            options.out,
            image_column=options.image_column,
            text_column=options.text_column,
            images=options.images,
            settings=Settings(val_share=options.val_share, seed=options.seed, shard_megabytes=options.shard_megabytes),
            processes=options.processes,
        )
    except KeyboardInterrupt:
        print("\nInterrupted: the same command writes what is missing.", file=sys.stderr)
        return INTERRUPTED
    index(expand_patterns(str(options.out)), ShardCache.at(), options.processes)
    print(f"{options.out}: {report.summary()}\n{next_steps(options.out, report)}")
    return 0


def next_steps(out: Path, report: WriteReport) -> str:
    """Returns the lines below the counts: skipped rows, the patterns of both splits, and commands ready to paste."""
    lines = [f"  left out: {said}" for said in report.left_out()]
    if lines:
        lines.append(f"  more of them: {out / REPORT}")
    train, val = (shlex.quote(str(Path(glob.escape(str(out))) / f"{split}-*.tar")) for split in ("train", "val"))
    tokenizer = shlex.quote(str(out / "tokenizer.model"))
    data = f"--data.train {train}"
    lines += ["", f"to train on:    {train}"]
    held_out = report.splits["val"].written
    data += f" --data.val {val if held_out else 'null'}"
    if held_out:
        lines.append(f"to validate on: {val}")
    if held_out < FEW:
        written = held_out + report.splits["train"].written
        enough = f": --val-share {FEW / written:.2g}, into another folder, holds out about {FEW}"
        hint = enough if written > 4 * FEW else ""  # with fewer, training needs nearly all
        lines.append(f"{held_out or 'No'} documents to validate on {'are few' if held_out else 'are left'}{hint}.")
    return "\n".join(
        [
            *lines,
            "",
            "Next:",
            f"  fuyu-e2e tokenizer train --shards {train} --vocab-size {VOCAB_SIZE} --out {tokenizer}",
            f"  fuyu-e2e fit --config recipes/own-pictures.yaml --data.tokenizer {tokenizer} \\",
            f"      {data}",
        ]
    )
