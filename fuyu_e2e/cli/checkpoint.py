"""`fuyu-e2e checkpoint verify|info|consolidate`: verifies a checkpoint, describes it, or writes it as one file."""

import time
from collections.abc import Sequence
from pathlib import Path

from fuyu_e2e.errors import UserError
from fuyu_e2e.training.settings.arguments import CommandParser, add_allow_imports

DAMAGED = 1
"""Exit code of `verify` for a damaged checkpoint."""


def checkpoint(args: Sequence[str]) -> int:
    """Verifies checkpoints by their checksums, describes one, or turns shards into one file."""
    parser = CommandParser(prog="fuyu-e2e checkpoint", description=checkpoint.__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    for name, said in (
        ("verify", "Compare a checkpoint, or all of a run, with the checksums taken when they were written."),
        ("info", "Show the step, data, figures and model of a checkpoint, or of the newest of a run."),
        ("consolidate", "Write a sharded checkpoint, or the newest of a run, as one file."),
    ):
        action = actions.add_parser(name, help=said, description=said)
        add_allow_imports(action)
        action.add_argument("path", help="A checkpoint, or a run's directory.")
        if name == "consolidate":
            action.add_argument("--out", required=True, help="The checkpoint to write; it must not be there yet.")
    options = parser.parse_args(args)
    path = Path(options.path)
    if options.action == "consolidate":
        return consolidate(path, Path(options.out))
    return verify(path) if options.action == "verify" else info(path)


def verify(path: Path) -> int:
    """Prints the faults of a checkpoint, or of each of a run's; returns 1 if there are any."""
    from fuyu_e2e.checkpoint.atomic import faults, is_whole
    from fuyu_e2e.checkpoint.run_checkpoints import run_checkpoints
    from fuyu_e2e.data.progress_bar import ProgressBar

    found = [path] if is_whole(path) else run_checkpoints(path)
    if not found:
        raise UserError(f"{path} is no checkpoint with a manifest, and no run's directory with one.")
    damaged = False
    with ProgressBar("Comparing with checksums", len(found), "checkpoints") as progress:
        for one in found:
            wrong = faults(one)
            damaged |= bool(wrong)
            print(f"{one}: {'; '.join(wrong) or 'every byte is right'}")
            progress.advance()
    return DAMAGED if damaged else 0


def consolidate(path: Path, out: Path) -> int:
    """Writes a checkpoint as one file, in the form of an unsharded run."""
    from fuyu_e2e.checkpoint.lightning_io import read_checkpoint, write_file
    from fuyu_e2e.checkpoint.run_checkpoints import find_checkpoint

    if out.exists():
        raise UserError(f"{out} is already there: name another place.")
    found = find_checkpoint(path)
    checkpoint = read_checkpoint(found, checked=found != path, optimizer=True)
    write_file(checkpoint, out)
    print(f"{out}: step {checkpoint['global_step']:,}, from {found}")
    return 0


def info(path: Path) -> int:
    """Prints a description of a checkpoint."""
    from rich.console import Console
    from rich.table import Table

    from fuyu_e2e.checkpoint.atomic import CheckpointManifest, is_whole
    from fuyu_e2e.checkpoint.loading import read_model
    from fuyu_e2e.checkpoint.run_checkpoints import find_checkpoint
    from fuyu_e2e.model.cost import cost
    from fuyu_e2e.model.decoder import meta_decoder

    found = find_checkpoint(path)
    stored = read_model(found)
    config, told = stored.metadata.config, stored.provenance
    table = Table(show_header=False, title=str(found), title_justify="left")
    table.add_row("step", f"{told.step:,}")
    table.add_row("tokens seen", f"{told.tokens_seen:,}")
    for name, value in sorted(told.validation.items()):
        table.add_row(name, f"{value:.6g}")
    for name, digest in told.data.items():
        table.add_row(f"data: {name}", digest)
    parameters = cost(config, document_lengths=(1,), grids=(), targets=0).parameters
    table.add_row("model", f"{parameters:,} parameters, {config.layers} blocks of width {config.width:,}")
    table.add_row("dialect", config.dialect)
    for block, numbers in meta_decoder(config).other_kinds.items():
        table.add_row(f"{block.kind} blocks", ", ".join(map(str, numbers)))
    if is_whole(found):
        manifest = CheckpointManifest.read(found)
        size = sum(file["bytes"] for file in manifest.files.values())
        table.add_row("written", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.written)))
        table.add_row("by", f"fuyu-e2e {manifest.fuyu_e2e}")
        table.add_row("size", f"{size:,} bytes in {len(manifest.files)} files")
    Console(highlight=False).print(table)
    return 0
