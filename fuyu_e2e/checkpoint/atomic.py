"""A checkpoint on disk that is whole or not there: a directory with a manifest, which appears by one renaming.

    step=300.ckpt/
        manifest.json           step, tokens, versions, recipe, and of every other file its size and sha256
        manifest.json.sha256    the checksum of the manifest itself
        checkpoint.pt           Lightning's checkpoint; or the files of a sharded one

The directory is filled beside its place under another name, flushed to the disk, and renamed. Whoever reads meets a
whole checkpoint or none, and one flipped byte is found.
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
"""What a checkpoint that is not sharded lies in."""
TABLE = ".metadata"
"""The table of contents."""
UNFINISHED = ".unfinished-"
"""How the names of directories begin that are being filled, or were when their process died."""


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """What a checkpoint's manifest says."""

    step: int
    """Optimizer steps."""
    tokens_seen: int
    """Tokens of documents trained on."""
    files: dict[str, dict[str, Any]]
    """By name, `bytes` and `sha256` of every file but the manifest and its checksum."""
    recipe: str | None
    """The run's `config.yaml`, where it has one."""
    written: float
    """When, in seconds since 1970."""
    fuyu_e2e: str = __version__
    """The version that wrote it."""
    monitored: dict[str, Any] | None = None
    """The figure that tells a run's best checkpoint, taken with these very weights: its `name`, its `value`, and the
    `mode`, "min" or "max", in which it is better. None where it was not taken at this step."""

    @classmethod
    def read(cls, checkpoint: Path) -> "CheckpointManifest":
        """Returns the manifest of a checkpoint.

        Raises:
            UserError: There is none, it is damaged, or something else.
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
    """Returns whether a path is a checkpoint with a manifest; its files are not looked at."""
    return (path / MANIFEST).is_file()


def is_sharded(path: Path) -> bool:
    """Returns whether a path is a checkpoint in shards."""
    return (path / TABLE).is_file()


def faults(checkpoint: Path) -> list[str]:
    """Returns what is wrong with a checkpoint, file by file; nothing, where every byte is what was written."""
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
    """Refuses a checkpoint that is not what was written.

    Raises:
        UserError: Names the first file that is wrong.
    """
    if found := faults(checkpoint):
        raise UserError(f"The checkpoint {checkpoint} is damaged: {found[0]}. Name another one.")


def unfinished_place(target: Path) -> Path:
    """Returns where a checkpoint is filled that is to become `target`."""
    return target.parent / f"{UNFINISHED}{target.name}"


@contextmanager
def staging_directory(target: Path) -> Iterator[Path]:
    """A directory beside `target` to fill, which is gone when that fails."""
    place = unfinished_place(target)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def commit(place: Path, target: Path, *, step: int, tokens_seen: int, monitored: dict[str, Any] | None = None) -> None:
    """Makes a filled directory the checkpoint `target`: flushes it, writes its manifest, and renames it.

    A checkpoint of that name gives way to the new one.

    Raises:
        OSError: The disk is full, or at fault.
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
    if target.exists():  # at every moment one of the two is there, and whole
        target.rename(replaced)
    place.rename(target)
    _flush(target.parent)
    if replaced.exists():
        remove(replaced)


def link(checkpoint: Path, name: Path) -> None:
    """Lets a name beside a checkpoint lead to it, if it is there; at no moment does the name lead nowhere.

    Unless the name is a checkpoint itself, since a tool that follows links copied the run: that one gives way first.
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
    """Takes a checkpoint away: its name first, so that none is met half gone."""
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
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
