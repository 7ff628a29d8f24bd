"""Sharded checkpoints: torch's distributed checkpoint, without anything that could be code.

    __0_0.distcp, __1_0.distcp, …   tensors, each process's parts: weights as `state_dict.NAME`,
                                    optimizer state as `optimizer.WEIGHT.NAME`
    .metadata                       where each part of each tensor is: a pickle, read with a list of allowed classes
    meta.pt                         everything else that Lightning saves, and the optimizer's settings with the names
                                    of weights

Any number of processes can read its parts, however the tensors were sharded. Lightning's own sharded checkpoints
differ only in the optimizer state, which torch would unpickle: it isn't read.
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
"""The file of everything but the tensors of weights and optimizer."""
WEIGHTS, OPTIMIZER = "state_dict.", "optimizer."
"""Prefixes of tensor names."""
GROUPS = "optimizer_groups"
"""The key of the optimizer's settings in `REST`."""


def write_shards(checkpoint: dict[str, Any], place: Path, group: dist.ProcessGroup) -> None:
    """Writes a checkpoint, of which each process of `group` has its parts, into an existing empty folder.

    Args:
        checkpoint: Lightning's checkpoint, with the optimizer state by weight names.
        place: The folder, the same for all processes.
        group: A process group for CPU tensors.

    Raises:
        OSError: A process could not write or is gone; raised on all that are left.
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
    """Reads a sharded checkpoint: tensor sizes at once, values on demand.

    Raises:
        UserError: A part of it is missing, damaged, or contains code.
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
        """Size and dtype of each tensor."""

    def read_rest(self) -> dict[str, Any]:
        """Returns everything but the tensors of weights and optimizer."""
        return read_tensors_and_primitives(self.path / REST)

    def read_into(self, tensors: dict[str, Tensor]) -> None:
        """Fills tensors, or this process's parts of them, with the stored values of their names.

        Raises:
            UserError: A name is missing or has another size, or the files are damaged.
        """
        try:
            with warnings.catch_warnings():
                # Intended: each process reads independently.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(dict(tensors), storage_reader=self._reader, no_dist=True)
        except _UNREADABLE as error:
            raise self._unreadable(error) from error

    def read_whole(self, section: str) -> dict[str, Tensor]:
        """Returns the whole tensors of a section (`WEIGHTS` or `OPTIMIZER`), by their names without its prefix."""
        found = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in self.tensors.items()
            if name.startswith(section)
        }
        self.read_into(found)
        return {name.removeprefix(section): tensor for name, tensor in found.items()}

    def optimizer_groups(self, rest: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns the optimizer's settings from the result of `read_rest`.

        Raises:
            UserError: The optimizer state was stored as objects, as in Lightning's own checkpoints.
        """
        if GROUPS not in rest:
            raise UserError(
                f"{self.path} has no optimizer's state that can be read without running what it holds: start over "
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
    """Returns the dictionary in a torch file, without running anything in it.

    Raises:
        UserError: The file is something else, is damaged, or contains code.
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
    """Unpickles a table of contents, allowing only the classes that torch writes there, and torch's dtypes.

    torch's own restricted unpickler can't read the pickle protocol that torch writes it in.
    """

    CLASSES: ClassVar[dict[tuple[str, str], Any]] = {
        **{(metadata.__name__, name): getattr(metadata, name) for name in metadata.__all__},
        (metadata.__name__, "_MEM_FORMAT_ENCODING"): metadata._MEM_FORMAT_ENCODING,
        (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
        ("torch", "Size"): torch.Size,
        # The paths of the saving machine, which nothing reads: a path class that can't be opened will do.
        **{
            (f"pathlib{part}", f"{system}Path"): PurePath
            for part in ("", "._local")
            for system in ("Posix", "Windows")
        },
        ("torch.serialization", "_get_layout"): {str(torch.strided): torch.strided}.__getitem__,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Returns the class if it is allowed, and raises otherwise."""
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        if (module, name) not in self.CLASSES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.CLASSES[module, name]


class _ShardReader(dcp.FileSystemReader):
    """torch's reader, except that it doesn't unpickle arbitrary objects in the table of contents."""

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
