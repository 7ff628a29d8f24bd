"""Checkpoints as training leaves them: one file, or the shards of several processes. Nothing in them is ever run."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fuyu_e2e.checkpoint.description import SECTION
from fuyu_e2e.checkpoint.sharded_files import (
    GROUPS,
    OPTIMIZER,
    WEIGHTS,
    ShardedFiles,
    is_sharded,
    read_tensors_and_primitives,
)
from fuyu_e2e.checkpoint.whole import (
    FILE,
    MANIFEST,
    Manifest,
    check,
    is_whole,
    newest,
    publish,
    unfinished,
    whole_checkpoints,
)
from fuyu_e2e.errors import UserError

WEIGHTS_PREFIX = "decoder."
"""What stands before the decoder's own names in the checkpoint's weights."""


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest one in a run's directory whose every byte is right.

    Raises:
        UserError: There is none.
    """
    path = Path(path)
    if path.is_file() or is_sharded(path) or is_whole(path):
        return path
    if folder := _folder_of(path):
        return newest(folder)[0]
    found = sorted(path.glob("**/*.ckpt"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise UserError(f"{path} is no checkpoint, and no directory that holds one (*.ckpt).")
    return found[-1]


@dataclass(frozen=True, kw_only=True)
class BestCheckpoint:
    """The checkpoint of a run with the best figure."""

    path: Path
    step: int
    """Optimizer steps."""
    name: str
    """The figure by which it is the best, as in TensorBoard: `val/loss`."""
    value: float
    """That figure of its own weights."""


def best_checkpoint(run: Path) -> BestCheckpoint | None:
    """The best checkpoint in a run's directory, by the figures that the checkpoints themselves record.

    The newest one that records a figure says which figure counts, and whether less is better. Of equal ones the
    earlier step is taken. Only manifests are read: weights are compared with their checksums when they are read.

    Returns:
        None where no checkpoint records such a figure: the run had no validation, or an earlier version wrote it.
    """
    found: list[tuple[BestCheckpoint, str]] = []
    for path in whole_checkpoints(folder) if (folder := _folder_of(run)) else []:
        try:
            manifest = Manifest.read(path)
        except UserError:
            continue  # a damaged one is no candidate, as where the newest is looked for
        if (taken := manifest.monitored) and not math.isnan(taken["value"]):
            best = BestCheckpoint(path=path, step=manifest.step, name=taken["name"], value=taken["value"])
            found.append((best, taken["mode"]))
    if not found:
        return None
    name, mode = found[0][0].name, found[0][1]
    sign = 1 if mode == "min" else -1
    return min((best for best, _ in found if best.name == name), key=lambda best: (sign * best.value, best.step))


def _folder_of(run: Path) -> Path | None:
    """The folder somewhere in a run's directory with the checkpoint that was written last, where there is any."""
    folders = {manifest.parent.parent for manifest in run.glob(f"**/*.ckpt/{MANIFEST}")}
    newest_of = {folder: found[0] for folder in folders if (found := whole_checkpoints(folder))}
    return max(newest_of, key=lambda folder: newest_of[folder].stat().st_mtime_ns, default=None)


def read_checkpoint(path: Path, *, checked: bool = False, optimizer: bool = False) -> dict[str, Any]:
    """Lightning's checkpoint as a dictionary of tensors and primitives, whole on any machine.

    Args:
        path: Of a checkpoint with a manifest, or as Lightning alone writes one.
        checked: Whether its files were compared with the manifest already.
        optimizer: Whether the optimizer's state in shards is wanted too, in the place where one file has it anyway.

    Raises:
        UserError: It is not a checkpoint, is damaged, or holds code.
    """
    if not path.is_dir():
        return read_tensors_and_primitives(path)
    if is_whole(path) and not checked:
        check(path)
    if (path / FILE).is_file():
        return read_tensors_and_primitives(path / FILE)
    shards = ShardedFiles(path)
    rest = shards.read_rest()
    checkpoint = {name: value for name, value in rest.items() if name != GROUPS}
    checkpoint["state_dict"] = shards.read_whole(WEIGHTS)
    if optimizer:
        checkpoint["optimizer_states"] = [_numbered(shards.optimizer_groups(rest), shards.read_whole(OPTIMIZER))]
    return checkpoint


def write_file(checkpoint: dict[str, Any], target: Path) -> None:
    """Writes Lightning's checkpoint as the directory `target`, in one file.

    Raises:
        OSError: The disk is full, or at fault.
        RuntimeError: The same, as torch says it.
    """
    with unfinished(target) as place:
        torch.save(checkpoint, place / FILE)
        publish_checkpoint(checkpoint, place, target)


def publish_checkpoint(checkpoint: dict[str, Any], place: Path, target: Path) -> None:
    """Makes the directory `place`, which holds Lightning's checkpoint, the checkpoint `target`."""
    section = checkpoint.get(SECTION, {})
    publish(
        place,
        target,
        step=int(checkpoint["global_step"]),
        tokens_seen=section.get("tokens_seen", 0),
        monitored=section.get("monitored"),
    )


def _numbered(groups: list[dict[str, Any]], tensors: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state as torch's optimizers take it: by the numbers of weights, in the order of the groups."""
    state: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        weight, _, entry = name.rpartition(".")
        state.setdefault(weight, {})[entry] = tensor
    names = [name for group in groups for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "state": {numbers[name]: kept for name, kept in state.items()},
        "param_groups": [group | {"params": [numbers[name] for name in group["params"]]} for group in groups],
    }
