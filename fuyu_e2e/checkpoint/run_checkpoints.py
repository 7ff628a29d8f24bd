"""Finds a run's checkpoints: all of them, the newest, the best, or a named one.

All searches for checkpoints go through this module. It orders them by the time of writing in their manifests: file
times are those of a copy if `rsync -r`, an object store or `unzip` made one.
"""

import logging
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fuyu_e2e.checkpoint.atomic import MANIFEST, UNFINISHED, CheckpointManifest, faults, is_sharded, is_whole
from fuyu_e2e.checkpoint.run_directory import CHECKPOINTS, RECIPE, shown
from fuyu_e2e.errors import UserError

logger = logging.getLogger(__name__)

SUFFIX = ".ckpt"
LAST = f"last{SUFFIX}"
"""The link to the newest checkpoint; a real checkpoint of that name is a copy of it."""


def run_checkpoints(path: Path) -> list[Path]:
    """Returns the checkpoints of a run's directory, anywhere in it, or of a folder of checkpoints, newest first.

    For a directory that is neither but contains some further down, returns those of the folder with the newest one.
    """
    below = {manifest.parent.parent for manifest in path.glob(f"**/*{SUFFIX}/{MANIFEST}")}
    if (path / CHECKPOINTS).is_dir():
        others = {recipe.parent for recipe in path.glob(f"**/{RECIPE}")} - {path}  # runs nested in this one
        own = {folder for folder in below if not others & {folder, *folder.parents}}
        return written_last_first([path / CHECKPOINTS, *own])  # glob doesn't follow the folder if it is a link
    if found := written_last_first([path]):
        return found
    each = [found for folder in below if (found := written_last_first([folder]))]
    return max(each, key=lambda found: _written(found[0]), default=[])


def written_last_first(folders: Iterable[Path]) -> list[Path]:
    """Returns the checkpoints with a manifest in some folders, last written first.

    Ignores links to other results. Checkpoints with a damaged manifest come first, since any may be the newest.
    """
    found = {path for folder in folders for path in folder.glob(f"*{SUFFIX}") if is_whole(path)}
    found = {path for path in found if not path.name.startswith(UNFINISHED)}
    themselves = {path.resolve() for path in found if not path.is_symlink()}
    found = {path for path in found if not path.is_symlink() or path.resolve() not in themselves}
    return sorted(found, key=_written, reverse=True)


def _written(checkpoint: Path) -> tuple[float, int, bool, str]:
    try:
        manifest = CheckpointManifest.read(checkpoint)
    except UserError:
        return math.inf, 0, True, checkpoint.name
    return manifest.written, manifest.step, checkpoint.name != LAST, str(checkpoint)


def manifests(checkpoints: Iterable[Path]) -> dict[Path, CheckpointManifest]:
    """Returns the manifests of some checkpoints by path, without damaged ones."""
    found = {}
    for path in checkpoints:
        with suppress(UserError):
            found[path] = CheckpointManifest.read(path)
    return found


def newest(path: Path) -> tuple[Path, dict[Path, str]]:
    """Returns the newest intact one of `run_checkpoints`, and the faults of newer ones by path.

    Raises:
        UserError: There is none.
    """
    passed_over: dict[Path, str] = {}
    for checkpoint in run_checkpoints(path):
        if not (found := faults(checkpoint)):
            return checkpoint, passed_over
        passed_over[checkpoint] = found[0]
    said = "".join(f"; {path.name}: {fault}" for path, fault in passed_over.items())
    raise UserError(f"{path} holds no checkpoint to go on from{said}.")


def find_checkpoint(path: str | Path) -> Path:
    """Returns the checkpoint that `path` names: itself, or the newest intact one in a run's directory.

    Warns about damaged ones that it skips.

    Raises:
        UserError: There is none, or there are several that Lightning alone wrote, whose age is unknown.
    """
    path = Path(path)
    if path.is_file() or is_sharded(path) or is_whole(path):
        return path
    if run_checkpoints(path):
        chosen, passed_over = newest(path)
        for bad, fault in passed_over.items():
            logger.warning("Passed over the checkpoint %s, which is damaged: %s.", shown(bad), fault)
        return chosen
    found = sorted(file for file in path.glob(f"**/*{SUFFIX}") if not file.is_symlink())
    if not found:
        raise UserError(f"{path} is no checkpoint, and no directory that holds one (*{SUFFIX}).")
    if len(found) > 1:
        raise UserError(
            f"{path} holds {len(found)} checkpoints without a manifest, {found[0].name} among them: name the one that "
            "you mean."
        )
    return found[0]


@dataclass(frozen=True, kw_only=True)
class BestCheckpoint:
    """The checkpoint of a run with the best figure."""

    path: Path
    step: int
    """Optimizer steps."""
    name: str
    """The figure that ranks it best, named as in TensorBoard: `val/loss`."""
    value: float
    """The figure's value for its weights."""


def best_checkpoint(run: Path) -> BestCheckpoint | None:
    """Returns the best checkpoint in a run's directory, by the figures recorded in the checkpoints.

    The newest checkpoint with a figure decides which figure counts, and whether lower is better. Among equal ones,
    takes the earliest step. Reads only manifests; checksums are compared when weights are read.

    Returns:
        None if no checkpoint records such a figure: the run had no validation, or an earlier version wrote it.
    """
    found: list[tuple[BestCheckpoint, str]] = []
    for path, manifest in manifests(run_checkpoints(run)).items():
        if (taken := manifest.monitored) and not math.isnan(taken["value"]):
            best = BestCheckpoint(path=path, step=manifest.step, name=taken["name"], value=taken["value"])
            found.append((best, taken["mode"]))
    if not found:
        return None
    name, mode = found[0][0].name, found[0][1]
    sign = 1 if mode == "min" else -1
    return min((best for best, _ in found if best.name == name), key=lambda best: (sign * best.value, best.step))
