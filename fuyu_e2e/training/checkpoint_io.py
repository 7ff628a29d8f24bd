"""Writes, reads and removes Lightning's checkpoints: atomically, in the background, and verified."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from fuyu_e2e.checkpoint.atomic import check, is_whole, link, remove, staging_directory
from fuyu_e2e.checkpoint.lightning_io import publish_checkpoint, read_checkpoint, write_file
from fuyu_e2e.checkpoint.run_checkpoints import find_checkpoint, run_checkpoints, written_last_first
from fuyu_e2e.checkpoint.run_directory import shown
from fuyu_e2e.checkpoint.sharded_files import write_shards
from fuyu_e2e.distributed import from_first
from fuyu_e2e.errors import UserError
from fuyu_e2e.training.gradients import local


class WholeCheckpointIO(CheckpointIO):
    """Writes a checkpoint as a directory with checksums, which appears only when it is complete.

    If the disk is full or fails, the run loses this one checkpoint with a warning and continues; earlier ones remain.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes Lightning's `checkpoint` to the directory `path`."""
        target = Path(path)
        try:
            self._write(checkpoint, target)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
            rank_zero_warn(
                f"The checkpoint {target} could not be written ({str(error).splitlines()[0]}): training goes on, and "
                "the earlier checkpoints are as they were. Make room on the disk."
            )

    def _write(self, checkpoint: dict[str, Any], target: Path) -> None:
        write_file(checkpoint, target)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint, or the newest intact one of a folder; runs no code from it.

        Raises:
            UserError: There is none, or it is damaged.
        """
        return read_checkpoint(resolve(Path(path)), checked=True, optimizer=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint, unless it is the only one left because its successor failed."""
        checkpoint = Path(path)
        if not checkpoint.exists() and not checkpoint.is_symlink():
            return
        others = [other for other in written_last_first([checkpoint.parent]) if other.name != checkpoint.name]
        if is_whole(checkpoint) and not others:
            return
        remove(checkpoint)


class ShardedCheckpointIO(WholeCheckpointIO):
    """Writes and reads sharded checkpoints, to which each process contributes its parts; a collective.

    Args:
        group: All processes, with a backend for CPU tensors, and without other use.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def _write(self, checkpoint: dict[str, Any], target: Path) -> None:
        with ExitStack() as stack:
            place = from_first(lambda: stack.enter_context(staging_directory(target)), OSError, self.group)
            write_shards(checkpoint, place, self.group)
            if dist.get_rank() == 0:
                publish_checkpoint(checkpoint, place, target)


def resolve(path: Path) -> Path:
    """Returns the checkpoint that a path names: itself if it is intact, or the newest intact one of a folder.

    One process decides, and all processes of a run use its choice.

    Raises:
        UserError: There is none.
    """
    return from_first(lambda: _resolve(path), UserError)


def _resolve(path: Path) -> Path:
    if is_whole(path):
        check(path)
        return path
    if not path.is_dir() or not run_checkpoints(path):
        return path
    found = find_checkpoint(path)
    rank_zero_info(f"Reading the checkpoint {shown(found)}.")  # which may yet be refused
    return found


def _warn_of_a_fault(work: Callable[..., None], *arguments: Any) -> None:
    try:
        work(*arguments)
    except OSError as error:
        rank_zero_warn(f"Checkpoints are as they were, for one could not be linked or removed ({error}).")


def _copy_to_host(state: Any) -> tuple[Any, list[torch.cuda.Event]]:
    """Returns a copy of a state in host memory, and the events that its readers must wait for if GPUs copy it.

    Copies are queued on the streams that training computes on: the host doesn't wait, and no later step can change a
    tensor before it is copied.
    """
    devices: set[torch.device] = set()

    def copy(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if not tensor.is_cuda:
            return tensor.clone()
        devices.add(tensor.device)
        # Pinned, since the host would wait for the copy otherwise; torch reuses the memory for the next checkpoint.
        copied = torch.empty_like(tensor, device="cpu", pin_memory=True)
        local(copied).copy_(local(tensor), non_blocking=True)
        return copied

    copied = apply_to_collection(state, Tensor, copy)
    return copied, [torch.cuda.current_stream(device).record_event() for device in devices]


class BackgroundCheckpointIO(AsyncCheckpointIO):
    """Runs Lightning's checkpoint writing in a thread. Deletes run on the save queue, after the replacement is
    written.

    States that wait to be written lie in host memory. Lightning would keep them on the GPU: 8 to 12 bytes a weight.

    Attributes:
        stall: Seconds that the last save held up the process to copy the state, without writing it. A GPU copies
            after that, before it continues training.
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        super().__init__(checkpoint_io or WholeCheckpointIO())
        self.stall = 0.0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Copies the state and queues it for writing; raises the error of an earlier write, if there was one."""
        started_at = time.perf_counter()
        self._ensure_setup()
        assert self._executor is not None
        self._executor.submit(self._write, *_copy_to_host(checkpoint), path, storage_options)
        if self._error:
            raise self._error
        self.stall = time.perf_counter() - started_at

    def _write(
        self, checkpoint: dict[str, Any], copies: list[torch.cuda.Event], path: Any, storage_options: Any
    ) -> None:
        assert self.checkpoint_io is not None
        try:
            for copy in copies:
                copy.synchronize()
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)
        except BaseException as error:  # raised at the next save or at the end of training
            self._error = error

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint after everything queued before is written."""
        assert self.checkpoint_io is not None
        self._later(self.checkpoint_io.remove_checkpoint, path)

    def remove_superseded(self, path: Any, successor: Any) -> None:
        """Queues the removal of a checkpoint; keeps it if its successor could not be written."""
        self._later(self._remove_superseded, Path(path), Path(successor))

    def _remove_superseded(self, path: Path, successor: Path) -> None:
        assert self.checkpoint_io is not None
        if is_whole(successor):
            self.checkpoint_io.remove_checkpoint(path)

    def link_checkpoint(self, path: Any, name: Any) -> None:
        """Queues the link `name` to a checkpoint."""
        self._later(link, Path(path), Path(name))

    def _later(self, work: Callable[..., None], *arguments: Any) -> None:
        self._ensure_setup()
        assert self._executor is not None
        self._executor.submit(_warn_of_a_fault, work, *arguments)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads a checkpoint after everything queued is written."""
        self.teardown()
        return super().load_checkpoint(*args, **kwargs)
