"""Writes samples into a shard."""

import io
import tarfile
from collections.abc import Mapping
from types import TracebackType
from typing import BinaryIO


class TarWriter:
    """Writes the same bytes as webdataset's own writer.

    webdataset itself imports torch, which would take seconds in every process that writes.

    Args:
        file: The file of the archive; it is not closed.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._tar = tarfile.open(fileobj=file, mode="w|")  # noqa: SIM115

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tar.close()

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Writes a sample, given its members by extension."""
        for extension in sorted(members):
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(members[extension])
            info.mode = 0o444
            self._tar.addfile(info, io.BytesIO(members[extension]))
        self._tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them, a kilobyte each
