"""Reads and writes training checkpoints, in one file or in shards, without running anything in them."""

from pathlib import Path
from typing import Any

import torch

from fuyu_e2e.checkpoint.atomic import FILE, check, commit, is_whole, staging_directory
from fuyu_e2e.checkpoint.metadata import SECTION
from fuyu_e2e.checkpoint.sharded_files import GROUPS, OPTIMIZER, WEIGHTS, ShardedFiles, read_tensors_and_primitives

WEIGHTS_PREFIX = "decoder."
"""Prefix of the decoder's names in a checkpoint's weights."""


def read_checkpoint(path: Path, *, checked: bool = False, optimizer: bool = False) -> dict[str, Any]:
    """Returns Lightning's checkpoint as a dictionary of tensors and primitives, whole on any machine.

    Args:
        path: A checkpoint with a manifest, or one that Lightning alone wrote.
        checked: Whether its files were compared with the manifest already.
        optimizer: Whether to read the optimizer state of shards too, to the key that a single file has it under.

    Raises:
        UserError: It is not a checkpoint, is damaged, or contains code.
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
        OSError: The disk is full or fails.
        RuntimeError: The same, from torch.
    """
    with staging_directory(target) as place:
        torch.save(checkpoint, place / FILE)
        publish_checkpoint(checkpoint, place, target)


def publish_checkpoint(checkpoint: dict[str, Any], place: Path, target: Path) -> None:
    """Turns the directory `place`, which contains Lightning's checkpoint, into the checkpoint `target`."""
    section = checkpoint.get(SECTION, {})
    commit(
        place,
        target,
        step=int(checkpoint["global_step"]),
        tokens_seen=section.get("tokens_seen", 0),
        monitored=section.get("monitored"),
    )


def _numbered(groups: list[dict[str, Any]], tensors: dict[str, Any]) -> dict[str, Any]:
    """Returns an optimizer's state in torch's form, with weights numbered in the order of the groups."""
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
