"""Checkpoints as training leaves them: one file, or the shards of several processes. Nothing in them is ever run."""

from pathlib import Path
from typing import Any

import torch

from fuyu_e2e.checkpoint.atomic import (
    FILE,
    check,
    commit,
    is_whole,
    staging_directory,
)
from fuyu_e2e.checkpoint.metadata import SECTION
from fuyu_e2e.checkpoint.sharded_files import (
    GROUPS,
    OPTIMIZER,
    WEIGHTS,
    ShardedFiles,
    read_tensors_and_primitives,
)

WEIGHTS_PREFIX = "decoder."
"""What stands before the decoder's own names in the checkpoint's weights."""


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
    with staging_directory(target) as place:
        torch.save(checkpoint, place / FILE)
        publish_checkpoint(checkpoint, place, target)


def publish_checkpoint(checkpoint: dict[str, Any], place: Path, target: Path) -> None:
    """Makes the directory `place`, which holds Lightning's checkpoint, the checkpoint `target`."""
    section = checkpoint.get(SECTION, {})
    commit(
        place,
        target,
        step=int(checkpoint["global_step"]),
        tokens_seen=section.get("tokens_seen", 0),
        monitored=section.get("monitored"),
    )


def _numbered(groups: list[dict[str, Any]], tensors: dict[str, Any]) -> dict[str, Any]:
    """Returns an optimizer's state as torch's optimizers take it: by the numbers of weights, in the order of the
    groups."""
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
