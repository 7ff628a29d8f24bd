"""Reads documents of a local webdataset shard by number: a tar whose members are grouped by the name before the dot.

A shard is scanned once, headers only, to find its samples; each is then read alone, in any order. That lets a stream
shuffle without a buffer and resume from a number. We don't use webdataset's grouping: it silently accepts repeated
members, links, scattered members, absolute names and truncated archives, and reads a gzip member as an archive. Like
webdataset, this skips directories and hidden files, such as the `._x` that macOS adds before each `x`.
"""

import io
import os
import re
import shlex
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int64

from fuyu_e2e.data.document import Document
from fuyu_e2e.data.progress_bar import Advance, untold
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.extensions import is_media
from fuyu_e2e.data.shards.formats import Sample, document, is_text
from fuyu_e2e.errors import UnusableSampleError, UserError

BLOCK = 512
"""Bytes of a tar block; an archive ends with two blocks of zeros."""
RECORD = 20 * BLOCK
"""Writers pad archives with zeros to a multiple of this many bytes; a longer file of zeros alone has lost its data."""
GZIP = b"\x1f\x8b"
"""The first bytes of gzip data."""
SAMPLE_BYTES = 2**28
"""Bytes of a sample, including headers, above which it is not read: 256 MiB."""
MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)$")
"""webdataset's `base_plus_ext`; importing webdataset takes seconds."""
NAME_BYTES = 2**14
"""Bytes of a header about the next one, such as a long name, above which it counts as damaged."""


class Shard:
    """A shard whose documents are read by number.

    A truncated or damaged shard ends with one unreadable document, which represents an unknown number of lost ones:
    the documents read are then always those used plus those skipped.

    Args:
        path: A tar file on this machine.
        name: What errors call it; by default the path.

    Raises:
        UserError: The file can't be read, or is not a tar.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or str(path)
        self.broken: str | None = None
        """Where and how the archive is damaged; None if it isn't."""
        self._starts: Int64[np.ndarray, " documents"]
        self._sizes: Int64[np.ndarray, " documents"]
        self._apart: frozenset[int] = frozenset()
        """Documents that are only an image or only a text, with the other half elsewhere in the shard."""
        self._line_samples: list[tuple[int, int, str]] = []  # (first document, last + 1, key) of each
        try:
            with path.open("rb") as file:
                check_header(file, self.name)
                spans = list(self._scan(file))
        except OSError as error:
            raise UserError(f"The shard {self.name} can't be read: {error.strerror}.") from error
        self._starts, self._sizes = np.array(spans, np.int64).reshape(-1, 2).T

    def __len__(self) -> int:
        return len(self._starts)

    def sample(self, number: int) -> Sample:
        """Returns the sample of a document by number.

        Raises:
            UnusableSampleError: `shard-broken` for the last document of a damaged shard, `sample-missing` after it;
                `sample-too-many-bytes`; `member-path`, `member-name`, `member-link` or `member-duplicate` for an
                invalid member; `members-apart` if an image and its text don't follow each other.
            OSError: The file is gone or the machine is at fault.
        """
        if number >= len(self):
            raise UnusableSampleError("sample-missing", f"{self.name} has no document {number}")
        start, size = int(self._starts[number]), int(self._sizes[number])
        if size < 0:
            raise UnusableSampleError("shard-broken", f"{self.name}: {self.broken}")
        if size > SAMPLE_BYTES:
            raise UnusableSampleError("sample-too-many-bytes", f"{self.name}: {size:,} bytes from byte {start}")
        with self.path.open("rb", buffering=0) as file:  # small samples take a third less time
            file.seek(start)
            data = _read_all(file, size)
        before = bisect_right(self._line_samples, number, key=lambda lines: lines[0]) - 1
        if before >= 0 and number < self._line_samples[before][1]:
            first, _, key = self._line_samples[before]
            return Sample(f"{key}/{number - first}", self.name, {"jsonl": data})
        sample = self._grouped(data)
        if number in self._apart:
            raise UnusableSampleError(
                "members-apart",
                f"{self.name}: {sample.key} has only {', '.join(sorted(sample.members))}, and its other half "
                "is elsewhere: write the members of a sample one after the other, under one name, as "
                "`tar --sort=name` does in one folder",
            )
        return sample

    def _grouped(self, data: bytes) -> Sample:
        members: dict[str, bytes] = {}
        key = ""
        try:
            with _opened(io.BytesIO(data)) as tar:
                for info in _headers(tar, len(data)):
                    key, extension = _split(info.name)
                    self._check(info.name, extension, members)
                    if not info.isreg():
                        raise UnusableSampleError(
                            "member-link",
                            f"{self.name}: {info.name} is a link to {info.linkname}: pack files, as "
                            "`tar --dereference --hard-dereference` does",
                        )
                    content = tar.extractfile(info)
                    assert content is not None
                    members[extension] = content.read()
        except DAMAGE as error:  # the file changed since it was scanned
            raise UnusableSampleError("sample-unreadable", f"{self.name}: {error}") from error
        return Sample(key, self.name, members)

    def _check(self, name: str, extension: str, known: Any) -> None:
        where = f"{self.name}: {name}"
        if name.startswith("/") or ".." in Path(name).parts:
            raise UnusableSampleError("member-path", where)
        if not extension:
            raise UnusableSampleError("member-name", f"{where} has no extension")
        if extension in known:
            raise UnusableSampleError("member-duplicate", where)

    def _scan(self, file: BinaryIO) -> Iterator[tuple[int, int]]:
        """Yields (start, bytes) of each document; a size of -1 is the damage at the end."""
        documents = 0
        current: list[tarfile.TarInfo] = []
        halves = _Halves()
        try:
            with _opened(file) as tar:
                for info in _headers(tar, os.fstat(file.fileno()).st_size):
                    if current and _split(info.name)[0] != _split(current[0].name)[0]:
                        halves.add(documents, current)
                        for span in self._spans(file, current, documents, info.offset):
                            documents += 1
                            yield span
                        current.clear()
                    current.append(info)
                end = tar.offset
                file.seek(end)
                # tarfile silently takes a damaged header after the first for the end.
                if file.read(2 * BLOCK) != bytes(2 * BLOCK):
                    raise tarfile.ReadError(f"at byte {end} is neither a header nor the end of the archive")
            if current:
                halves.add(documents, current)
                yield from self._spans(file, current, documents, end)
                current.clear()
            _check_nothing_behind(file, end)
        except DAMAGE as error:
            self.broken = str(error)
            yield 0, -1  # also replaces the sample before it, which may be incomplete
        self._apart = halves.apart()

    def _spans(self, file: BinaryIO, infos: list[tarfile.TarInfo], first: int, end: int) -> Iterator[tuple[int, int]]:
        extensions = [_split(info.name)[1] for info in infos]
        start, size = infos[0].offset, end - infos[0].offset
        if "jsonl" not in extensions or size > SAMPLE_BYTES:
            yield start, size
            return
        try:
            for number, (info, extension) in enumerate(zip(infos, extensions, strict=True)):
                self._check(info.name, extension, extensions[:number])
        except UnusableSampleError:
            yield start, size  # found again, and counted, when it is read
            return
        lines = infos[extensions.index("jsonl")]
        file.seek(lines.offset_data)
        position = lines.offset_data
        spans = []
        for line in file.read(lines.size).split(b"\n"):
            if line.strip():
                spans.append((position, len(line)))
            position += len(line) + 1
        spans = spans or [(position, 0)]  # a file without lines is one unusable document
        self._line_samples.append((first, first + len(spans), _split(lines.name)[0]))
        yield from spans


class _Halves:
    """Images without a text and texts without an image, by the last part of their names."""

    def __init__(self) -> None:
        # The number of each document and the hash of its name, 16 bytes: a shard may contain a million texts.
        self._found = {True: array("q"), False: array("q")}

    def add(self, number: int, infos: list[tarfile.TarInfo]) -> None:
        """Examines the members of document number `number`."""
        key, _ = _split(infos[0].name)
        extensions = [_split(info.name)[1] for info in infos]
        has_image = any(map(is_media, extensions))
        if has_image != any(map(is_text, extensions)):
            self._found[has_image].extend((number, hash(key.rpartition("/")[2])))

    def apart(self) -> frozenset[int]:
        """Returns the numbers of the documents whose other half was seen, too."""
        images, texts = (np.array(self._found[has_image], np.int64).reshape(-1, 2) for has_image in (True, False))
        same = np.intersect1d(images[:, 1], texts[:, 1])
        return frozenset(number for half in (images, texts) for number in half[np.isin(half[:, 1], same), 0].tolist())


def _check_nothing_behind(file: BinaryIO, end: int) -> None:
    file.seek(end)
    while block := file.read(2**16):
        if block.strip(b"\0"):
            raise tarfile.ReadError(
                f"goes on after the end of the archive at byte {end}: `tar --concatenate` joins archives, cat doesn't"
            )


def read_documents(
    path: Path, stats: SampleStats, name: str | None = None, advance: Advance = untold
) -> Iterator[Document]:
    """Yields the usable documents of a local shard, in stored order.

    Counts every document as read, and unusable ones by reason. Adds 1 to `advance` over the whole shard.

    Args:
        path: The shard.
        stats: Counts documents.
        name: What errors call the shard; by default its path.
        advance: Counts the work done.

    Raises:
        UserError: The file can't be read, or is not a tar; or the reader of a format is at fault.
    """
    shard = Shard(path, name)
    for number in range(len(shard)):
        stats.read += 1
        try:
            yield document(shard.sample(number))
        except UnusableSampleError as error:
            stats.skip(error)
        advance(1 / len(shard))


def check_header(file: BinaryIO, name: str) -> None:
    """Checks the first header of a shard, or the end of one without members, and seeks back to its start.

    Raises:
        UserError: The file is not a tar.
    """
    said = "uncompressed, as webdataset and img2dataset write them"
    header = file.read(RECORD + 1)
    if not header:
        raise UserError(f"The shard {name} is not a tar file but empty, 0 bytes: write it again, or leave it out.")
    if header.startswith(GZIP):
        quoted = shlex.quote(name)
        remedy = f"unpack it with `gunzip < {quoted} > NEW.tar`, and name that"
        if name.startswith("pipe:"):
            remedy = "let its command end in `| gunzip`"
        raise UserError(f"The shard {name} is not a tar file but one that gzip compressed: {remedy}.")
    if len(header) > RECORD or len(header) < 2 * BLOCK or header.strip(b"\0"):
        try:
            tarfile.TarInfo.frombuf(header[:BLOCK], "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise UserError(f"The shard {name} is not a tar file ({error}): name only .tar files, {said}.") from error
    file.seek(0)


DAMAGE = (tarfile.TarError, EOFError, ValueError, RecursionError)
"""Errors that tarfile raises for invalid headers."""


class _Header(tarfile.TarInfo):
    """A header that can't make tarfile read, hold or search more than a name is worth."""

    SPEAKS_OF_NEXT = (
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
    )

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        info = super().frombuf(buf, encoding, errors)
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"{info.name} is a sparse file")
        if info.size < 0 or (info.type in cls.SPEAKS_OF_NEXT and info.size > NAME_BYTES):
            raise tarfile.ReadError(f"a header of {info.name} has {info.size:,} bytes")
        return info

    def _proc_gnusparse_10(self, *_: Any) -> None:  # its list of pieces may be as long as the archive
        raise tarfile.ReadError("a sparse file")


def _opened(file: Any) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="r:", tarinfo=_Header)


def _headers(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """Yields the members of samples, including links; omits what webdataset skips.

    That is directories, hidden files, and names like `__this__` in the root. The archive has `size` bytes. Bytes of a
    name that are not UTF-8 are escaped, as in `\\xb0`.
    """
    while True:
        if tar.offset > size:
            raise tarfile.ReadError("unexpected end of data")
        if (info := tar.next()) is None:
            return
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them, a kilobyte each
        # An extended header may state a size that the archive has no room for.
        if info.issparse() or (info.isreg() and not 0 <= info.size <= tar.offset - info.offset_data):
            raise tarfile.ReadError(f"{info.name} has {info.size:,} bytes, which the archive has no room for")
        info.name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        if (info.isreg() or info.islnk() or info.issym()) and not _is_passed_over(info.name):
            yield info


def _is_passed_over(name: str) -> bool:
    last = name.rpartition("/")[2]
    if last.startswith(".") or name.startswith("__MACOSX/"):
        return True
    return name == last and name.startswith("__") and name.endswith("__")


def _split(name: str) -> tuple[str, str]:
    """Returns the key and extension of a member, split like webdataset at the first dot of the file's name."""
    found = MEMBER.match(name)
    return (found[1], found[2].lower()) if found else (name, "")


def _read_all(file: Any, size: int) -> bytes:
    pieces = []
    while size > 0 and (piece := file.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
