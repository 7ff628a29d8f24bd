"""A checkpoint on disk that is either complete or absent: a directory with a manifest, which appears by a rename.

    step=300.ckpt/
        manifest.json           step, tokens, versions, recipe, and for every other file its size and sha256
        manifest.json.sha256    the checksum of the manifest itself
        checkpoint.pt           Lightning's checkpoint; or the files of a sharded one

The directory is filled next to its place under another name, flushed to disk, and renamed. A reader finds a complete
checkpoint or none, and detects a single flipped byte.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fuyu_e2e.checkpoint.json_files import read_json
from fuyu_e2e.errors import UserError
from fuyu_e2e.version import __version__

MANIFEST = "manifest.json"
DIGEST_FILE = f"{MANIFEST}.sha256"
FILE = "checkpoint.pt"
"""The file of a checkpoint that is not sharded."""
TABLE = ".metadata"
"""The table of contents of a sharded checkpoint."""
UNFINISHED = ".unfinished-"
"""Prefix of directories that are being filled, or were when their process died."""


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """The content of a checkpoint's manifest."""

    step: int
    """Optimizer steps."""
    tokens_seen: int
    """Tokens of documents trained on."""
    files: dict[str, dict[str, Any]]
    """`bytes` and `sha256` of every file by name, except the manifest and its checksum."""
    recipe: str | None
    """The run's `config.yaml`, if it has one."""
    written: float
    """Time of writing, in seconds since 1970."""
    fuyu_e2e: str = __version__
    """The version that wrote it."""
    monitored: dict[str, Any] | None = None
    """The figure that ranks a run's checkpoints, taken with these weights: its `name`, its `value`, and `mode`, "min"
    or "max", for which is better. None if it was not taken at this step."""

    @classmethod
    def read(cls, checkpoint: Path) -> "CheckpointManifest":
        """Returns the manifest of a checkpoint.

        Raises:
            UserError: There is none, or it is damaged or something else.
        """
        path = checkpoint / MANIFEST
        try:
            sealed = _sha256(path) == (checkpoint / DIGEST_FILE).read_text(encoding="ascii")
        except (OSError, ValueError) as error:
            raise UserError(f"{path} or its checksum can't be read ({error})") from error
        if not sealed:
            raise UserError(f"{path} has another checksum than when it was written")
        try:
            return cls(**read_json(path))
        except TypeError as error:
            raise UserError(f"{path} is no manifest of a checkpoint ({error}).") from error


def is_whole(path: Path) -> bool:
    """Returns whether a path is a checkpoint with a manifest, without checking its files."""
    return (path / MANIFEST).is_file()


def is_sharded(path: Path) -> bool:
    """Returns whether a path is a sharded checkpoint."""
    return (path / TABLE).is_file()


def faults(checkpoint: Path) -> list[str]:
    """Returns what is wrong with a checkpoint, file by file; empty if every byte is as written."""
    try:
        listed = CheckpointManifest.read(checkpoint).files
        there = {path.name for path in checkpoint.iterdir()} - {MANIFEST, DIGEST_FILE}
        found = [f"{name} is not in its manifest" for name in sorted(there - listed.keys())]
        for name, said in sorted(listed.items()):
            path = checkpoint / name
            if name not in there:
                found.append(f"{name} is gone")
            elif path.stat().st_size != said["bytes"]:
                found.append(f"{name} has {path.stat().st_size:,} bytes instead of {said['bytes']:,}")
            elif _sha256(path) != said["sha256"]:
                found.append(f"{name} has another checksum than when it was written")
    except (UserError, OSError, KeyError, TypeError) as error:
        return [str(error)]
    return found


def check(checkpoint: Path) -> None:
    """Refuses a damaged checkpoint.

    Raises:
        UserError: Names the first file that is wrong.
    """
    if found := faults(checkpoint):
        raise UserError(f"The checkpoint {checkpoint} is damaged: {found[0]}. Name another one.")


def unfinished_place(target: Path) -> Path:
    """Returns the temporary place in which the checkpoint `target` is filled."""
    return target.parent / f"{UNFINISHED}{target.name}"


@contextmanager
def staging_directory(target: Path) -> Iterator[Path]:
    """Yields a directory next to `target` to fill, and removes it unless it was renamed."""
    place = unfinished_place(target)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def commit(place: Path, target: Path, *, step: int, tokens_seen: int, monitored: dict[str, Any] | None = None) -> None:
    """Turns a filled directory into the checkpoint `target`: flushes it, writes its manifest, and renames it.

    Replaces an existing checkpoint of that name.

    Raises:
        OSError: The disk is full or fails.
    """
    files = sorted(path for path in place.iterdir() if path.is_file())
    for path in files:
        _flush(path)
    recipe = target.parent.parent / "config.yaml"
    manifest = CheckpointManifest(
        step=step,
        tokens_seen=tokens_seen,
        files={path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files},
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        written=time.time(),
        monitored=monitored,
    )
    (place / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    (place / DIGEST_FILE).write_text(_sha256(place / MANIFEST), encoding="ascii")
    for path in (place / MANIFEST, place / DIGEST_FILE, place):
        _flush(path)
    replaced = target.with_name(f"{target.stem}-replaced{target.suffix}")
    if target.exists():  # at any moment one of the two exists and is complete
        target.rename(replaced)
    place.rename(target)
    _flush(target.parent)
    if replaced.exists():
        remove(replaced)


def link(checkpoint: Path, name: Path) -> None:
    """Makes `name`, next to a checkpoint, a link to it if it exists; the link is replaced atomically.

    If `name` is itself a checkpoint, because a tool that follows links copied the run, it is removed first.
    """
    if not is_whole(checkpoint):
        return
    fresh = name.parent / f"{UNFINISHED}{name.name}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(checkpoint, name.parent))
    if name.is_dir() and not name.is_symlink():
        remove(name)
    fresh.replace(name)


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint: renames it first, so that no reader finds it half deleted."""
    if checkpoint.is_symlink() or checkpoint.is_file():
        checkpoint.unlink()
        return
    going = checkpoint.parent / f"{UNFINISHED}going-{checkpoint.name}"
    shutil.rmtree(going, ignore_errors=True)
    checkpoint.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Waits until a file, or a directory's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
