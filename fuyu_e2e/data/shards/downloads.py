"""Downloads of shards: over as many connections as needed, verified, resumed if a connection breaks.

fsspec knows the stores and their credentials. But its file caches verify nothing, have no bound, and start over after
a broken download, and its HTTP client discards what had arrived. huggingface_hub's resumes without `If-Range`, so it
would join two versions of a file. So these parts are ours."""

import base64
import contextlib
import hashlib
import os
import random
import re
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from fuyu_e2e.data.shards.locations import WEB, check_scheme, open_store, scheme_of, shown
from fuyu_e2e.errors import UserError

if TYPE_CHECKING:
    import fuyu_e2e.data.shards.cache

CHUNK = 2**23
"""Bytes read from a store, or held of a download, at once: 8 MiB."""
FIRST_DELAY, LONGEST_DELAY = 0.1, 10.0
"""Seconds before the first retry, doubled for each further one, and their upper limit."""
PASSING = (408, 425, 429)
"""HTTP statuses below 500 that mean: try again later."""


class _DiffersError(Exception):
    """The download is complete but differs from the manifest."""


class MissingError(UserError):
    """The file doesn't exist, or may not be read."""


class Download:
    """One download of a shard into a file, over as many connections as needed."""

    def __init__(
        self,
        cache: "fuyu_e2e.data.shards.cache.ShardCache",
        shard: str,
        part: Path,
        file: BinaryIO,
        size: int | None,
        sha256: str | None,
    ) -> None:
        self.cache, self.shard, self.part, self.file, self.size, self.sha256 = cache, shard, part, file, size, sha256
        self.total: int | None = None
        self.tag: str | None = None
        self.reserved = 0
        self._restart()

    def run(self) -> None:
        """Downloads the file; returns when it is complete and verified.

        Raises:
            UserError: The file can't be downloaded.
        """
        if self.size is not None:
            self._reserve(self.size)
        furthest = failures = 0
        while True:
            try:
                self._attempt()
                return
            except UserError:
                raise
            except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
                raise MissingError(
                    f"{shown(self.shard)} is missing or may not be read ({self._reason(error)}): check its address "
                    "and your credentials."
                ) from error
            except Exception as error:  # each store's client has its own errors
                differs = isinstance(error, _DiffersError)
                failures = 0 if self.written > furthest and not differs else failures + 1
                furthest = max(furthest, self.written)
                if failures >= self.cache.attempts:
                    raise self._given_up(error) from error
                if differs:
                    self._restart()
            _pause(failures)

    def _attempt(self) -> None:
        with contextlib.closing(_request(self.shard, self.written, self.tag, self.cache.timeout)) as answer:
            if answer.start and answer.total != self.total:
                self._restart()
                raise ConnectionError("it changed while it was fetched")
            if answer.start != self.written:
                self._restart()
            self.total, self.tag = answer.total, answer.tag
            if self.size is not None and self.total not in (None, self.size):
                raise _DiffersError(f"it has {self.total:,} bytes, not {self.size:,}")
            expected = self.size if self.total is None else self.total
            if expected is not None:
                self._reserve(expected)
            for chunk in answer.chunks:
                self._write(chunk)
        if expected is not None and self.written < expected:
            raise ConnectionError(f"it ended after {self.written:,} of {expected:,} bytes")
        if self.size is not None and self.written != self.size:
            raise _DiffersError(f"it has {self.written:,} bytes, not {self.size:,}")
        if self.sha256 is not None and self.digest.hexdigest() != self.sha256.lower():
            raise _DiffersError(f"its sha256 is {self.digest.hexdigest()}, not {self.sha256}")

    def _reserve(self, size: int) -> None:
        self.cache.make_room(self.part, size)
        self.reserved = size

    def _write(self, chunk: bytes) -> None:
        needed = self.written + len(chunk)
        if needed > self.reserved:
            self._reserve(max(needed, min(needed + CHUNK, self.cache.max_bytes)))
        with self.cache.writing():
            self.file.write(chunk)
        self.written += len(chunk)
        self.digest.update(chunk)

    def _restart(self) -> None:
        self.written = 0
        self.digest = hashlib.sha256()
        self.file.seek(0)

    def _given_up(self, error: Exception) -> UserError:
        if isinstance(error, _DiffersError):
            return UserError(
                f"{shown(self.shard)} differs from its manifest ({error}): upload it again, or make a new manifest."
            )
        return UserError(
            f"{shown(self.shard)} could not be fetched ({self.cache.attempts} attempts in a row got no further, the "
            f"last: {self._reason(error)}): check its address and the network, and run again."
        )

    def _reason(self, error: Exception) -> str:
        text = (str(error).strip() or str(error.__cause__ or "").strip() or type(error).__name__).splitlines()[0]
        # Queries of signed URLs are secrets, and clients put whole URLs into their errors.
        return re.sub(r"\?[^\s'\"]*", "", text) if scheme_of(self.shard) in WEB else text


@dataclass(frozen=True)
class _Response:
    """The response of a server or a command."""

    start: int
    """The offset of the first chunk: the one asked for, or 0 if only the whole file is available."""
    total: int | None
    """Bytes of the whole file, if known."""
    tag: str | None
    """A tag that changes when the file does, if known."""
    chunks: Iterator[bytes]
    close: Callable[[], object]
    """To be called after the last chunk that is needed."""


def _request(shard: str, start: int, tag: str | None, timeout: float) -> _Response:
    if scheme_of(shard) == "pipe":
        output = _run(shard.partition(":")[2])
        return _Response(0, None, None, output, output.close)
    check_scheme(shard)  # fsspec opens many more schemes, some of which run code
    return (_request_web if scheme_of(shard) in WEB else _request_store)(shard, start, tag, timeout)


def _request_web(url: str, start: int, tag: str | None, timeout: float) -> _Response:
    # Not fsspec's client, aiohttp: if a response breaks off, it discards data that had arrived but wasn't read yet.
    parts = urllib.parse.urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    address = urllib.parse.quote(parts._replace(netloc=host, fragment="").geturl(), safe="%/:?=&+,;@!$'()*[]~")
    request = urllib.request.Request(address, headers={"Accept-Encoding": "identity"})
    if user:
        key = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {key}")
    if start:
        request.add_header("Range", f"bytes={start}-")
        if tag:
            request.add_header("If-Range", tag)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:
            return _request_web(url, 0, None, timeout)
        reason = f"HTTP {error.code} {error.reason}"
        if error.code in (404, 410):
            raise FileNotFoundError(reason) from error
        if error.code < 500 and error.code not in PASSING:
            raise PermissionError(reason) from error
        raise ConnectionError(reason) from error
    said = response.headers
    if said.get("Content-Encoding", "identity") != "identity":
        response.close()
        raise ConnectionError("the server compresses what it sends")
    if response.status == 206:
        part = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", said.get("Content-Range", "").strip())
        if part is None or int(part[1]) != start:
            response.close()
            if not start:
                raise ConnectionError("the server sends a part of it, asked for the whole")
            return _request_web(url, 0, None, timeout)
        total = None if part[2] == "*" else int(part[2])
    else:
        start, total = 0, int(said["Content-Length"]) if "Content-Length" in said else None
        etag = said.get("ETag", "W/")
        tag = said.get("Last-Modified") if etag.startswith("W/") else etag  # a weak tag can't be used in If-Range
    return _Response(start, total, tag, iter(lambda: response.read1(CHUNK // 8), b""), response.close)


def _request_store(url: str, start: int, tag: str | None, timeout: float) -> _Response:
    store, path = open_store(url, timeout)
    store.invalidate_cache()  # a listing may be older than the file
    file = store.open(path, "rb", block_size=CHUNK, cache_type="none")
    found = next((str(file.details[name]) for name in ("ETag", "etag", "blob_id") if name in file.details), None)
    if found != tag or start > file.size:
        start = 0
    file.seek(start)
    return _Response(start, file.size, found, iter(lambda: file.read(CHUNK), b""), file.close)


def _run(command: str) -> Generator[bytes, None, None]:
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
        )
        with process, contextlib.ExitStack() as unfinished:
            unfinished.callback(process.kill)
            assert process.stdout is not None
            while chunk := process.stdout.read(CHUNK):
                yield chunk
            unfinished.pop_all()
        if process.returncode:
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4096))
            last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise ConnectionError(f"exit code {process.returncode}: {''.join(last) or 'nothing on stderr'}")


def delay(failures: int) -> float:
    """Returns the seconds to wait after `failures` without progress, partly random so that hosts don't return
    together."""
    return min(LONGEST_DELAY, FIRST_DELAY * 2 ** max(0, failures - 1)) * random.uniform(0.5, 1)


def _pause(failures: int) -> None:
    time.sleep(delay(failures))
