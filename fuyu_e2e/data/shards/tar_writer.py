"""Writes samples into a shard."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from typing import BinaryIO


def write_samples(file: BinaryIO, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Writes samples, each a key and its members by extension, as the same bytes as webdataset's own writer.

    webdataset itself imports torch, which would take seconds in every process that writes.
    """
    with tarfile.open(fileobj=file, mode="w|") as tar:
        for key, members in samples:
            for extension in sorted(members):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(members[extension])
                info.mode = 0o444
                tar.addfile(info, io.BytesIO(members[extension]))
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them, a kilobyte each
