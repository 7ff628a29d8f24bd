"""Checkpoints as Lightning leaves them: one file, or the directory of a sharded strategy. Nothing in them is ever run.

A file holds tensors and primitives, which torch reads without running anything. A sharded one is torch's distributed
checkpoint, whose table of contents is a pickle: it is read with a list of the classes that may stand in it.
"""

import pickle
from pathlib import Path, PurePath
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from fuyu_e2e.checkpoint.whole import FILE, MANIFEST, check, is_whole, newest, whole_checkpoints
from fuyu_e2e.errors import UserError

WEIGHTS_PREFIX = "decoder."
"""What stands before the decoder's own names in the checkpoint's weights."""
TABLE = ".metadata"
"""The table of contents of a sharded checkpoint."""
REST = "meta.pt"
"""Where Lightning keeps all of a sharded checkpoint but weights and optimizer."""


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest one in a run's directory whose every byte is right.

    Raises:
        UserError: There is none.
    """
    path = Path(path)
    if path.is_file() or (path / TABLE).is_file() or is_whole(path):
        return path
    folders = {manifest.parent.parent for manifest in path.glob(f"**/*.ckpt/{MANIFEST}")}
    if folders:
        return newest(max(folders, key=lambda folder: whole_checkpoints(folder)[0].stat().st_mtime_ns))[0]
    found = sorted(path.glob("**/*.ckpt"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise UserError(f"{path} is no checkpoint, and no directory that holds one (*.ckpt).")
    return found[-1]


def read_checkpoint(path: Path, checked: bool = False) -> dict[str, Any]:
    """Lightning's checkpoint as a dictionary of tensors and primitives; of a sharded one without its optimizer.

    Args:
        path: Of a checkpoint with a manifest, or as Lightning alone writes one.
        checked: Whether its files were compared with the manifest already.

    Raises:
        UserError: It is not a checkpoint, is damaged, or holds code.
    """
    if not path.is_dir():
        return _read_file(path)
    if is_whole(path) and not checked:
        check(path)
    return _read_file(path / FILE) if (path / FILE).is_file() else _read_sharded(path)


def _read_file(path: Path) -> dict[str, Any]:
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
        """The class, or a refusal."""
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        if (module, name) not in self.CLASSES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.CLASSES[module, name]


class _ShardReader(dcp.FileSystemReader):
    """torch's reader, but for the table of contents, which it would unpickle whatever stands in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table of contents."""
        path = Path(self.path) / TABLE
        with path.open("rb") as file:
            table = _TableReader(file).load()
        if not isinstance(table, Metadata) or not isinstance(table.storage_data, dict):
            raise pickle.UnpicklingError("it is no table of contents")
        for entry in table.storage_data.values():
            if Path(entry.relative_path).name != entry.relative_path:
                raise pickle.UnpicklingError(f"it names a file outside: {entry.relative_path!r}")
        return table


def _read_sharded(path: Path) -> dict[str, Any]:
    if not (path / TABLE).is_file() or not (path / REST).is_file():
        missing = TABLE if not (path / TABLE).is_file() else REST
        raise UserError(f"{path} is no whole sharded checkpoint: {missing} is missing. Name another checkpoint.")
    try:
        reader = _ShardReader(path)
        section = "state_dict."
        weights = {
            name.removeprefix(section): torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if name.startswith(section) and isinstance(entry, TensorStorageMetadata)
        }
        dcp.load({"state_dict": weights}, storage_reader=reader, no_dist=True)
    except (
        dcp.CheckpointException,
        pickle.UnpicklingError,
        RuntimeError,
        LookupError,
        EOFError,
        OSError,
        ValueError,
    ) as error:
        raise UserError(
            f"{path} can't be read as a sharded checkpoint ({str(error).splitlines()[0]}): it is damaged or something "
            "else. Name another checkpoint."
        ) from error
    return _read_file(path / REST) | {"state_dict": weights}
