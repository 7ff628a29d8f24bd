"""Samples from webdataset shards: tar files whose members belong together by the part of the name before the dot.

webdataset opens and walks the tar; grouping is ours, because its own lets repeated members, absolute names and cut
archives pass in silence.
"""

import glob
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import braceexpand
from webdataset.tariterators import base_plus_ext, tar_file_iterator

from fuyu_e2e.errors import UnusableSampleError, UserError
from fuyu_e2e.tally import Tally

BLOCK = 512
"""Bytes of a tar block; an archive ends with two blocks of zeros."""
MEMBER_BYTES = 2**28
"""Bytes above which a member is not kept: 256 MiB."""


@dataclass
class Sample:
    """The members of one sample, by extension: what stands behind the first dot of their names, in lower case."""

    key: str
    shard: str
    members: dict[str, bytes] = field(default_factory=dict)
    fault: UnusableSampleError | None = None
    """Why the sample can't be used, where reading it already showed that."""


def expand_patterns(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """The shards that paths, globs, brace patterns and folders name, each once, in the order named.

    Raises:
        UserError: A pattern matches nothing, or is no local path.
    """
    shards: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", pattern):
            raise UserError(
                f"{pattern}: only local shards are read so far; copy them to this machine and name the path."
            )
        found = sorted(shard for path in braceexpand.braceexpand(pattern) for shard in _expand(path))
        if not found:
            raise UserError(
                f"{pattern!r} matches no shard: quote the pattern so that the shell leaves it alone, and see that it "
                "names .tar files or a folder of them."
            )
        shards.update(dict.fromkeys(found))
    return tuple(shards)


def _expand(path: str) -> list[str]:
    if Path(path).is_dir():
        return [str(shard) for shard in Path(path).glob("*.tar")]
    return glob.glob(path, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)


def check_shards(shards: Sequence[str]) -> None:
    """Looks at the first header of each shard.

    Raises:
        UserError: A file can't be read, or is not a tar.
    """
    for shard in shards:
        try:
            with Path(shard).open("rb") as file:
                tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
        except OSError as error:
            raise UserError(f"The shard {shard} can't be read: {error.strerror}.") from error
        except tarfile.HeaderError as error:
            raise UserError(
                f"The shard {shard} is not a tar file ({error}): name only .tar files, uncompressed, as webdataset "
                "and img2dataset write them."
            ) from error


def read_samples(shard: str, tally: Tally) -> Iterator[Sample]:
    """The samples of a shard, in stored order.

    A shard that breaks off or is damaged is counted in `tally` as `shard-broken` beside the samples, since nobody
    knows how many are missing; the sample that it broke in is left out.
    """
    current: Sample | None = None
    try:
        with Path(shard).open("rb") as stream:
            for member in _members(stream):
                key, extension = base_plus_ext(member["fname"])
                key = key or member["fname"]
                if current is not None and key != current.key:
                    yield current
                    current = None
                current = current or Sample(key, shard)
                _add(current, (extension or "").lower(), member)
            _check_end(stream)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        tally.skip(UnusableSampleError("shard-broken", f"{shard}: {error}"))
        current = None
    if current is not None:
        yield current


def _members(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    def raise_all(error: Exception) -> bool:
        raise error

    # Names like __this__ in the root are webdataset's own metadata, which it passes over; below folders they are not.
    return tar_file_iterator(stream, skip_meta=None, handler=raise_all)


def _add(sample: Sample, extension: str, member: dict[str, Any]) -> None:
    name, data = member["fname"], member["data"]
    if name.startswith("/") or ".." in Path(name).parts:
        sample.fault = UnusableSampleError("member-path", f"{sample.shard}: {name}")
    elif not extension:
        sample.fault = UnusableSampleError("member-name", f"{sample.shard}: {name} has no extension")
    elif extension in sample.members:
        sample.fault = UnusableSampleError("member-duplicate", f"{sample.shard}: {name}")
    elif len(data) > MEMBER_BYTES:
        sample.fault = UnusableSampleError("member-too-many-bytes", f"{sample.shard}: {name}")
    else:
        sample.members[extension] = data


def _check_end(stream: BinaryIO) -> None:
    """Walks the headers once more: tarfile takes a damaged header behind the first for the end, without a word."""
    stream.seek(0)
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        tar.getmembers()
        stream.seek(tar.offset)
        if stream.read(2 * BLOCK) != bytes(2 * BLOCK):
            raise tarfile.ReadError(f"at byte {tar.offset} there is neither a header nor the end of the archive")
