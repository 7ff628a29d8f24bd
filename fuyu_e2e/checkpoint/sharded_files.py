"""Checkpoints in shards: torch's distributed checkpoint, with nothing in it that could be code.

    __0_0.distcp, __1_0.distcp, …   tensors, each process's own parts: `state_dict.NAME` the weights,
                                    `optimizer.WEIGHT.NAME` what the optimizer keeps of each
    .metadata                       which part of which tensor lies where: a pickle, read with a list of the classes
                                    that may stand in it
    meta.pt                         all else that Lightning saves, and the optimizer's settings with names of weights

However the tensors were laid over processes, any other number of them can take their own parts.
Lightning's own sharded checkpoints are alike but for the optimizer, which torch would unpickle: it isn't read.
"""

import pickle
import warnings
from pathlib import Path, PurePath
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from fuyu_e2e.checkpoint.atomic import TABLE
from fuyu_e2e.errors import UserError

REST = "meta.pt"
"""All that is no tensor of weights or optimizer."""
WEIGHTS, OPTIMIZER = "state_dict.", "optimizer."
"""What stands before the names of tensors."""
GROUPS = "optimizer_groups"
"""The key in `REST` of the optimizer's settings."""


def write_shards(checkpoint: dict[str, Any], place: Path, group: dist.ProcessGroup) -> None:
    """Writes a checkpoint, of which each process of `group` has its parts, into a folder that is there and empty.

    Args:
        checkpoint: Lightning's, with the optimizer's state by names of weights.
        place: The same for all processes.
        group: One that carries tensors of the CPU.

    Raises:
        OSError: A process could not write, or went away; on all that are left.
    """
    rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
    tensors = {f"{WEIGHTS}{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    for state in checkpoint.get("optimizer_states", []):
        rest[GROUPS] = state["param_groups"]
        for weight, kept in state["state"].items():
            tensors |= {f"{OPTIMIZER}{weight}.{name}": tensor for name, tensor in kept.items()}
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(place), process_group=group)
    except (dcp.CheckpointException, RuntimeError) as error:
        causes = [str(cause[0]) for cause in getattr(error, "failures", {}).values()]
        raise OSError(next(iter(causes), str(error))) from error
    if dist.get_rank() == 0:
        torch.save(rest, place / REST)


class ShardedFiles:
    """A checkpoint in shards to be read: its tensors' sizes are known, their values come on demand.

    Raises:
        UserError: A part of it is missing, damaged, or holds code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in (TABLE, REST):
            if not (path / name).is_file():
                raise UserError(f"{path} is no whole sharded checkpoint: {name} is missing. Name another checkpoint.")
        self._reader = _ShardReader(path)
        try:
            entries = self._reader.read_metadata().state_dict_metadata
        except _UNREADABLE as error:
            raise self._unreadable(error) from error
        self.tensors = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        """Size and type of each tensor."""

    def read_rest(self) -> dict[str, Any]:
        """Returns all that is no tensor of weights or optimizer."""
        return read_tensors_and_primitives(self.path / REST)

    def read_into(self, tensors: dict[str, Tensor]) -> None:
        """Fills tensors, or the parts of them that are this process's, with what is stored by their names.

        Raises:
            UserError: A name isn't there or has another size, or the files are damaged.
        """
        try:
            with warnings.catch_warnings():
                # Each process reads by itself, as is intended.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(dict(tensors), storage_reader=self._reader, no_dist=True)
        except _UNREADABLE as error:
            raise self._unreadable(error) from error

    def read_whole(self, section: str) -> dict[str, Tensor]:
        """Returns the tensors of a section (`WEIGHTS` or `OPTIMIZER`) as wholes, by their names without the
        section's."""
        found = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in self.tensors.items()
            if name.startswith(section)
        }
        self.read_into(found)
        return {name.removeprefix(section): tensor for name, tensor in found.items()}

    def optimizer_groups(self, rest: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns the optimizer's settings, of what `read_rest` gave.

        Raises:
            UserError: Its state was stored as objects, as Lightning's own is.
        """
        if GROUPS not in rest:
            raise UserError(
                f"{self.path} has no optimizer's state that can be read without running what it holds: begin anew "
                "from its weights with --model.weights."
            )
        groups: list[dict[str, Any]] = rest[GROUPS]
        return groups

    def _unreadable(self, error: BaseException) -> UserError:
        return UserError(
            f"{self.path} can't be read as a sharded checkpoint ({str(error).splitlines()[0]}): it is damaged or "
            "something else. Name another checkpoint."
        )


def read_tensors_and_primitives(path: Path) -> dict[str, Any]:
    """Returns the dictionary in a file of torch's, which is not let run anything.

    Raises:
        UserError: It is something else, is damaged, or holds code.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # noqa: TID251
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} can't be read as a checkpoint ({str(error).splitlines()[0]}): it is damaged or something else. "
            "Name another checkpoint."
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint.")
    return checkpoint


_UNREADABLE = (
    dcp.CheckpointException,
    pickle.UnpicklingError,
    RuntimeError,
    LookupError,
    EOFError,
    OSError,
    ValueError,
)


class _TableReader(pickle.Unpickler):
    """Reads a table of contents: the classes that torch writes there, and torch's own types, are all it makes."""

    CLASSES: ClassVar[dict[tuple[str, str], Any]] = {
        **{(metadata.__name__, name): getattr(metadata, name) for name in metadata.__all__},
        (metadata.__name__, "_MEM_FORMAT_ENCODING"): metadata._MEM_FORMAT_ENCODING,
        (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
        ("torch", "Size"): torch.Size,
        # Where it was saved, which nothing reads: a path that can't be opened will do.
        **{
            (f"pathlib{part}", f"{system}Path"): PurePath
            for part in ("", "._local")
            for system in ("Posix", "Windows")
        },
        ("torch.serialization", "_get_layout"): {str(torch.strided): torch.strided}.__getitem__,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Returns the class, or a refusal."""
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        if (module, name) not in self.CLASSES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.CLASSES[module, name]


class _ShardReader(dcp.FileSystemReader):
    """torch's reader, but for the table of contents, which it would unpickle whatever stands in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns the table of contents."""
        path = Path(self.path) / TABLE
        with path.open("rb") as file:
            table = _TableReader(file).load()
        if not isinstance(table, Metadata) or not isinstance(table.storage_data, dict):
            raise pickle.UnpicklingError("it is no table of contents")
        for entry in table.storage_data.values():
            if Path(entry.relative_path).name != entry.relative_path:
                raise pickle.UnpicklingError(f"it names a file outside: {entry.relative_path!r}")
        return table
