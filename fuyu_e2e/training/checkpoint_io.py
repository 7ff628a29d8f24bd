"""How Lightning writes, reads and removes checkpoints here: whole or not at all, in the background, and checked."""

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

from fuyu_e2e.checkpoint.atomic import (
    check,
    is_whole,
    link,
    remove,
    staging_directory,
    unfinished_place,
)
from fuyu_e2e.checkpoint.lightning_io import publish_checkpoint, read_checkpoint, write_file
from fuyu_e2e.checkpoint.run_checkpoints import find_checkpoint, run_checkpoints, written_last_first
from fuyu_e2e.checkpoint.run_directory import shown
from fuyu_e2e.checkpoint.sharded_files import write_shards
from fuyu_e2e.errors import UserError
from fuyu_e2e.training.gradients import local


class WholeCheckpointIO(CheckpointIO):
    """Writes a checkpoint as a directory with checksums that appears when it is whole.

    A disk that is full, or fails, costs a warning and that one checkpoint, not the run: those already written stay.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes `checkpoint`, which Lightning makes, to the directory `path`."""
        target = Path(path)
        try:
            self._write(checkpoint, target)
        except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError of a full disk
            rank_zero_warn(
                f"The checkpoint {target} could not be written ({str(error).splitlines()[0]}): training goes on, and "
                "the earlier checkpoints are as they were. Make room on the disk."
            )

    def _write(self, checkpoint: dict[str, Any], target: Path) -> None:
        write_file(checkpoint, target)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint, or of a folder of checkpoints the newest whose every byte is right; runs no code.

        Raises:
            UserError: There is none, or it is damaged.
        """
        return read_checkpoint(resolve(Path(path)), checked=True, optimizer=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint, unless it is the only one that is left: then the one in its stead failed."""
        checkpoint = Path(path)
        if not checkpoint.exists() and not checkpoint.is_symlink():
            return
        others = [other for other in written_last_first([checkpoint.parent]) if other.name != checkpoint.name]
        if is_whole(checkpoint) and not others:
            return
        remove(checkpoint)


class ShardedCheckpointIO(WholeCheckpointIO):
    """The same for a checkpoint of which each process has its parts; all of them save and load together.

    Args:
        group: All processes, with a backend that carries tensors of the CPU, and used for nothing else.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def _write(self, checkpoint: dict[str, Any], target: Path) -> None:
        trouble: list[str | None] = [None]
        with ExitStack() as stack:
            if dist.get_rank() == 0:
                try:
                    stack.enter_context(staging_directory(target))
                except OSError as error:
                    trouble = [str(error)]
            dist.broadcast_object_list(trouble, src=0, group=self.group)
            if trouble[0] is not None:
                raise OSError(trouble[0])
            place = unfinished_place(target)
            write_shards(checkpoint, place, self.group)
            if dist.get_rank() == 0:
                publish_checkpoint(checkpoint, place, target)


def resolve(path: Path) -> Path:
    """Returns the checkpoint that a path names: itself if it is right, or in a folder of checkpoints the newest that
    is.

    One process looks, and all of a run go on from the same.

    Raises:
        UserError: There is none.
    """
    if not dist.is_initialized():
        return _resolve(path)
    answer: list[Path | str] = [""]
    if dist.get_rank() == 0:
        try:
            answer = [_resolve(path)]
        except UserError as error:
            answer = [str(error)]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], str):
        raise UserError(answer[0])
    return answer[0]


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
    """Returns a copy of a state in the host's memory, and what its readers have to wait for first, where GPUs copy it.

    Copies are queued on the streams that training computes on: the host doesn't wait, and no later step changes a
    tensor before it is copied.
    """
    devices: set[torch.device] = set()

    def copy(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if not tensor.is_cuda:
            return tensor.clone()
        devices.add(tensor.device)
        # Pinned, or the host would wait for the copy; torch keeps the room for the next checkpoint.
        copied = torch.empty_like(tensor, device="cpu", pin_memory=True)
        local(copied).copy_(local(tensor), non_blocking=True)
        return copied

    copied = apply_to_collection(state, Tensor, copy)
    return copied, [torch.cuda.current_stream(device).record_event() for device in devices]


class BackgroundCheckpointIO(AsyncCheckpointIO):
    """Lightning's writing in a thread, with removals in their turn, so that none comes before its successor is there.

    What waits to be written lies in the host's memory. Lightning would keep it on the GPU: 8 to 12 bytes a weight.

    Attributes:
        stall: Seconds for which the last save held up the process: copying the state, not writing it. A GPU copies
            after that, before it goes on with training.
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        super().__init__(checkpoint_io or WholeCheckpointIO())
        self.stall = 0.0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Copies the state, and has it written while training goes on; raises what an earlier writing raised."""
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
        except BaseException as error:  # to be raised where training saves next, or ends
            self._error = error

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint once all that was to be written before is written."""
        assert self.checkpoint_io is not None
        self._later(self.checkpoint_io.remove_checkpoint, path)

    def remove_superseded(self, path: Any, successor: Any) -> None:
        """Removes a checkpoint in the same way, but keeps it where its successor could not be written."""
        self._later(self._remove_superseded, Path(path), Path(successor))

    def _remove_superseded(self, path: Path, successor: Path) -> None:
        assert self.checkpoint_io is not None
        if is_whole(successor):
            self.checkpoint_io.remove_checkpoint(path)

    def link_checkpoint(self, path: Any, name: Any) -> None:
        """Lets the name `name` lead to a checkpoint once it is written."""
        self._later(link, Path(path), Path(name))

    def _later(self, work: Callable[..., None], *arguments: Any) -> None:
        self._ensure_setup()
        assert self._executor is not None
        self._executor.submit(_warn_of_a_fault, work, *arguments)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads a checkpoint, once all that was to be written is."""
        self.teardown()
        return super().load_checkpoint(*args, **kwargs)
