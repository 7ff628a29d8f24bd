"""`fuyu-e2e shards`: shows what shards contain, verifies them, and writes new ones from a user's own files."""

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fuyu_e2e.cli.shards_write import write
from fuyu_e2e.data.sample_stats import skipped_first
from fuyu_e2e.data.shards.cache import CACHE_FOLDER, ShardCache
from fuyu_e2e.data.shards.locations import expand_patterns, folder_of
from fuyu_e2e.data.shards.manifest import ShardFacts, index, totals, verify
from fuyu_e2e.data.shards.statistics import NoPlotsError, survey
from fuyu_e2e.errors import FAULTY, WRONG_USE, UserError
from fuyu_e2e.training.settings.arguments import CommandParser, did_you_mean

USAGE = """usage: fuyu-e2e shards {index,verify,stats,write} [--help]

  index PATTERN      count what shards hold, into fuyu-manifest.json next to them
  verify PATTERN     compare shards with their manifest: bytes, checksums, documents; --deep decodes images
  stats PATTERN      a table (and a picture, with matplotlib) of resolutions, aspect ratios, text lengths and tokens
  write SOURCE       shards from your own images and texts
"""
HEADERS_ONLY = "Images were judged by their headers, not decoded: `fuyu-e2e shards verify --deep` decodes each."


def shards(args: Sequence[str]) -> int:
    """Runs one of the `shards` commands."""
    commands = {"index": _index, "verify": _verify, "stats": _stats, "write": write}
    name = args[0] if args else ""
    if name in ("", "--help", "-h"):
        print(USAGE)
        return 0 if name else WRONG_USE
    if name not in commands:
        raise UserError(
            f"There is no command 'shards {name}': "
            + (did_you_mean(name, commands) or f"choose from {', '.join(commands)}.")
        )
    return commands[args[0]](args[1:])


def _parser(name: str, description: str | None) -> CommandParser:
    parser = CommandParser(prog=f"fuyu-e2e shards {name}", description=description)
    parser.add_argument("patterns", nargs="+", help="Paths, URLs, globs, brace patterns or folders of shards.")
    parser.add_argument("--cache-dir", default=CACHE_FOLDER, help="Where remote shards go (default: %(default)s).")
    parser.add_argument("--allow-pipe", action="store_true", help="Run the commands of pipe: shards in a shell.")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="Shards read at once.")
    return parser


def _index(args: Sequence[str]) -> int:
    """Counts what shards hold, into fuyu-manifest.json next to them, or in the cache if that can't be written."""
    options = _parser("index", _index.__doc__).parse_args(args)
    found = expand_patterns(options.patterns, allow_pipe=options.allow_pipe)
    facts, places = index(found, ShardCache.at(options.cache_dir), options.processes)
    _print_totals(list(facts.values()))
    print(HEADERS_ONLY)
    for place in places:
        print(f"Written: {place}")
    return 0


def _verify(args: Sequence[str]) -> int:
    """Compares shards with their manifests; exit code 1 if one differs."""
    parser = _parser("verify", _verify.__doc__)
    parser.add_argument("--deep", action="store_true", help="Decode each image to its end, too.")
    options = parser.parse_args(args)
    found = expand_patterns(options.patterns, allow_pipe=options.allow_pipe)
    cache = ShardCache.at(options.cache_dir)
    faults = verify(options.patterns, found, cache, options.processes, deep=options.deep)
    for fault in faults:
        print(f"{fault.shard} {fault.reason}")
    folders = len(set(map(folder_of, found)))
    compared = "compared with their manifests" + (" and decoded" if options.deep else "")
    print(f"{len(found):,} shards in {folders:,} folders {compared}: {len(faults):,} faults")
    if not options.deep:
        print(HEADERS_ONLY)
    return FAULTY if faults else 0


def _stats(args: Sequence[str]) -> int:
    """Prints statistics of the documents in shards, and draws their distributions."""
    parser = _parser("stats", _stats.__doc__)
    parser.add_argument("--out", type=Path, default=Path("shards.png"), help="The picture (default: %(default)s).")
    parser.add_argument("--tokenizer", type=Path, help="Count its tokens instead of estimating them.")
    parser.add_argument("--patch-size", type=int, default=16, help="For the count of tokens (default: %(default)s).")
    parser.add_argument("--max-patches", type=int, default=1024, help="Of an image (default: %(default)s).")
    options = parser.parse_args(args)
    found = expand_patterns(options.patterns, allow_pipe=options.allow_pipe)
    cache = ShardCache.at(options.cache_dir)
    surveyed = survey(found, cache, options.tokenizer, options.patch_size, options.max_patches, options.processes)
    Console().print(surveyed.table())
    for line in skipped_first(surveyed.examples):
        print(line)
    print(HEADERS_ONLY)
    try:
        surveyed.draw(options.out)
    except NoPlotsError as error:
        print(f"No picture was drawn. {error}")
    else:
        print(f"The distributions: {options.out}")
    return 0


def _print_totals(facts: list[ShardFacts]) -> None:
    table = Table("shards", "documents", "images", "tokens, about", "bytes", "unusable")
    sums = totals(facts)
    counts = [sums[name] for name in ("shards", "documents", "images", "tokens_estimate", "bytes")]
    table.add_row(*(f"{count:,}" for count in [*counts, sums["unusable"].total()]))
    Console().print(table)
    print(", ".join(f"{name} {count:,}" for name, count in sorted(sums["kinds"].items())))
    for reason, count in sorted(sums["unusable"].items()):
        print(f"unusable: {reason} {count:,}")
    for line in skipped_first({reason: said for one in reversed(facts) for reason, said in one.examples.items()}):
        print(line)
