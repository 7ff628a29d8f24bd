"""Where shards lie, and how they get to this machine.

Readers want a local file. A shard on another machine is downloaded once per host into a bounded cache that all
processes of the host share. fsspec knows the stores and their credentials; verification, bounds, and going on where a
broken download stopped are ours, because its own file cache has none of them.
"""

import base64
import contextlib
import glob
import hashlib
import os
import random
import re
import shlex
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import braceexpand
import fsspec
from filelock import FileLock, Timeout

from fuyu_e2e.data.home import with_home
from fuyu_e2e.data.shards.extensions import COMPRESSED
from fuyu_e2e.errors import UserError

CACHE_FOLDER = "~/.cache/fuyu_e2e"
"""Where shards from elsewhere are kept, unless somebody says otherwise."""
CACHE_GIGABYTES = 100.0
"""What they may take up there, likewise."""
CHUNK = 2**23
"""Bytes asked of a store, or held of a download, at once: 8 MiB."""
FIRST_DELAY, LONGEST_DELAY = 0.1, 10.0
"""Seconds before the first retry, which double with each that follows, and where they stop growing."""
PREFETCHES = 2
"""Downloads that `ShardCache.prefetch` has under way at once."""
LISTED = ("s3", "gs", "gcs", "az", "abfs", "hf")
"""Schemes of stores that fsspec can list."""
WEB = ("http", "https")
"""Schemes of servers that can't be listed."""
REMOTE = (*WEB, *LISTED)
"""Schemes of shards that are downloaded."""
PASSING = (408, 425, 429)
"""Answers below 500 that say: not now."""


class _DiffersError(Exception):
    """What came is whole, but not what the manifest says."""


class _MissingError(UserError):
    """There is no such file, or none that may be read."""


@dataclass
class Transfers:
    """What a process has downloaded so far."""

    shards: int = 0
    """Shards that arrived whole."""
    bytes: int = 0
    """Bytes that came, those of broken attempts included."""
    retries: int = 0
    """Attempts that failed and were made again."""


def expand_patterns(patterns: str | Sequence[str], *, allow_pipe: bool = False) -> tuple[str, ...]:
    """The shards that paths, globs, brace patterns, folders and URLs name, each once, in the order named.

    Globs, and folders that end in a slash, are looked up where the store can list. Whether a URL without them leads
    to a shard shows when it is fetched.

    Raises:
        UserError: A pattern matches nothing or compressed shards, its scheme is not allowed, or its store can't be
            asked.
    """
    shards: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        scheme = _scheme(pattern)
        if scheme == "pipe" and not allow_pipe:
            raise UserError(
                f"{pattern} would run a command of your shell: set data.allow_pipe to true on the command line if you "
                "trust whoever wrote it."
            )
        if scheme not in ("", "file", "pipe"):
            _check_scheme(pattern)
        try:
            # A path that is there is no pattern, whatever brackets it has. A backslash in a command is the shell's.
            is_there = is_local(pattern) and _local_path(pattern).exists()
            expanded = [pattern] if is_there else list(braceexpand.braceexpand(pattern, escape=scheme != "pipe"))
        except ValueError as error:
            raise UserError(f"{pattern!r} has braces that don't match ({error}): close each, or escape it.") from error
        found = sorted(shard for path in expanded for shard in _expand(path))
        beside = [] if found else [other for path in expanded for other in _compressed_instead(path)]
        if compressed := [shard for shard in [*found, *beside] if _is_compressed(shard)]:
            raise UserError(_unpack(compressed))
        named = (path for path in expanded if is_local(path) and not glob.has_magic(path))
        gone = [path for path in named if not _local_path(path).exists()]
        if found and gone:
            raise UserError(f"{pattern!r} names {gone[0]}, which is not there: bring it back, or leave it out.")
        if not found:
            raise UserError(
                f"{pattern!r} matches no shard: quote the pattern so that the shell leaves it alone, and see that it "
                "names .tar files or a folder of them."
            )
        shards.update(dict.fromkeys(found))
    return tuple(shards)


def is_local(shard: str) -> bool:
    """Whether a shard is a file of this machine."""
    return _scheme(shard) in ("", "file")


def folder_of(shard: str) -> str:
    """The path or URL of the folder that a shard lies in, without a query; empty for a `pipe:` shard."""
    if is_local(shard):
        return str(_local_path(shard).parent)
    return "" if _scheme(shard) == "pipe" else _without_query(shard).rpartition("/")[0]


def name_of(shard: str) -> str:
    """The last name of a shard's path or URL, without a query; the whole of a `pipe:` shard."""
    if is_local(shard):
        return _local_path(shard).name
    return shard if _scheme(shard) == "pipe" else _without_query(shard).rpartition("/")[2]


def read_bytes(location: str, *, timeout: float = 30.0, attempts: int = 6) -> bytes | None:
    """The content of a small file, local or remote; None where there is none.

    A store that forbids reading it counts as having none: without the right to list, S3 says so of every missing file.

    Raises:
        UserError: It is there, but can't be read.
    """
    try:
        if is_local(location):
            return _local_path(location).read_bytes()
        if _scheme(location) == "pipe":
            return None
        with tempfile.TemporaryDirectory() as folder:
            return ShardCache(Path(folder), 2**40, attempts=attempts, timeout=timeout).path(location).read_bytes()
    except (FileNotFoundError, _MissingError):
        return None
    except OSError as error:
        raise UserError(f"{location} can't be read ({error.strerror}): see to its permissions.") from error


def write_bytes(location: str, data: bytes) -> bool:
    """Writes a small file, local or remote, whole or not at all; False where that place can't be written."""
    if not is_local(location):
        if _scheme(location) not in LISTED:
            return False
        try:
            store, path = _store(location, 30.0)
            store.pipe_file(path, data)
        except Exception:  # each store's client has its own errors, and no file is left by any
            return False
        return True
    target = _local_path(location)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(data)
            _sync(file)
        beside.replace(target)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        return False
    return True


class ShardCache:
    """Local files for shards wherever they lie: a folder of downloads that never holds more than `max_bytes`.

    Processes of one host share the folder. It may be pickled and forked; downloads that run stay with the process that
    began them, as do its counts.
    """

    def __init__(self, folder: Path, max_bytes: int, *, attempts: int = 6, timeout: float = 30.0) -> None:
        """Nothing is made or deleted before the first shard is fetched.

        Args:
            folder: Where the downloads lie; made if need be, on a disk of this host.
            max_bytes: Above how many bytes the files used longest ago are deleted.
            attempts: How many times in a row a download may fail without getting further.
            timeout: Seconds in which a server must connect, and after which one that sends nothing has failed.
        """
        self.folder, self.max_bytes, self.attempts, self.timeout = folder, max_bytes, attempts, timeout
        self._mine = _Mine()

    @classmethod
    def at(cls, folder: str = CACHE_FOLDER, gigabytes: float = CACHE_GIGABYTES) -> "ShardCache":
        """A cache as users name it; `~` is their home."""
        return cls(Path(with_home(folder)), int(gigabytes * 1e9))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_mine"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _mine=_Mine())

    @property
    def transfers(self) -> Transfers:
        """What this process has downloaded so far."""
        return replace(self._own().transfers)

    def path(self, shard: str, size: int | None = None, sha256: str | None = None) -> Path:
        """A local file with the shard's content: its own if it is local, else the cache's.

        Open it before others are fetched: a file in use may be deleted from the folder, and stays readable.

        Args:
            shard: A path or URL, as `expand_patterns` gives it.
            size: Its bytes, where a manifest says so.
            sha256: Its checksum in hexadecimal digits, where a manifest says so.

        Raises:
            UserError: It can't be fetched, differs from `size` or `sha256`, or is larger than the cache.
        """
        if is_local(shard):
            return _local_path(shard)
        started = self._own().started.pop((shard, size, sha256), None)
        if started is not None and not started.cancel():
            started.result()
        return self._fetch(shard, size, sha256)

    def prefetch(self, shard: str, size: int | None = None, sha256: str | None = None) -> None:
        """Begins to fetch a shard in the background; `path` waits for it, and raises what went wrong."""
        mine, wanted = self._own(), (shard, size, sha256)
        if is_local(shard) or wanted in mine.started:
            return
        future = mine.started[wanted] = Future[Path]()

        def fetch() -> None:
            with mine.slots:
                if not future.set_running_or_notify_cancel():
                    return
                try:
                    future.set_result(self._fetch(*wanted))
                except Exception as error:
                    future.set_exception(error)

        # Not an executor: its threads would keep a program that has ended, or failed, from leaving.
        threading.Thread(target=fetch, name=f"prefetch {name_of(shard)}", daemon=True).start()

    def _own(self) -> "_Mine":
        if self._mine.pid != os.getpid():  # a fork copies locks that no thread of the copy will ever release
            self._mine = _Mine()
        return self._mine

    def _fetch(self, shard: str, size: int | None, sha256: str | None) -> Path:
        with self.writing():
            found = self._cached(shard, size, sha256)
            if found is not None:
                return found
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            with self._lock(_key(shard)):
                return self._cached(shard, size, sha256) or self._download(shard, size, sha256)

    def _cached(self, shard: str, size: int | None, sha256: str | None) -> Path | None:
        if sha256 is not None:
            candidates = [self._file(shard, sha256)]
        else:
            candidates = sorted(self.folder.glob(f"{_key(shard)}-*"), key=_last_used, reverse=True)
        for path in candidates:
            with contextlib.suppress(FileNotFoundError):
                if size is None or path.stat().st_size == size:
                    os.utime(path)
                    return path
        return None

    def _download(self, shard: str, size: int | None, sha256: str | None) -> Path:
        # What a killed process left is written over, so that a shard never has more than one unfinished file.
        part = self.folder / f"{_key(shard)}.part"
        try:
            with part.open("wb") as file:
                download = _Download(self, shard, part, file, size, sha256)
                download.run()
                file.truncate(download.written)
                _sync(file)
            target = self._file(shard, download.digest.hexdigest())
            part.replace(target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        self.count(shards=1)
        return target

    def make_room(self, part: Path, size: int) -> None:
        """Deletes the files used longest ago until an unfinished one may grow to `size` bytes.

        Raises:
            UserError: The cache can't hold so many.
        """
        if size > self.max_bytes:
            raise UserError(
                f"The shard cache {self.folder} holds {self.max_bytes:,} bytes and a shard has {size:,} or more: set "
                "data.cache_gigabytes to several times the largest shard."
            )
        with self.writing(), self._lock("room"):
            os.truncate(part, size)  # for all to see, so that two processes don't count on the same room
            files = []
            for path in self.folder.iterdir():
                if re.match(r"[0-9a-f]{32}(-|\.part$)", path.name):  # the folder may hold what is not ours
                    with contextlib.suppress(FileNotFoundError):
                        files.append((_last_used(path), path.stat().st_size, path))
            total = sum(size for _, size, _ in files)
            for _, size, path in sorted(files):
                if total > self.max_bytes and self._delete(path):
                    total -= size

    def _delete(self, path: Path) -> bool:
        if path.suffix != ".part":
            path.unlink(missing_ok=True)
            return True
        try:
            with self._lock(path.stem).acquire(blocking=False):
                path.unlink(missing_ok=True)
        except Timeout:  # it is being written, by us or another process
            return False
        return True

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around what touches the folder, so that its errors don't pass for those of the network."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"The shard cache {self.folder} can't be written ({error.strerror or error}): make room there, or "
                "name another folder."
            ) from error

    def count(self, *, shards: int = 0, bytes: int = 0, retries: int = 0) -> None:
        """Adds to `transfers`."""
        mine = self._own()
        with mine.lock:
            mine.transfers.shards += shards
            mine.transfers.bytes += bytes
            mine.transfers.retries += retries

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.folder / "locks" / f"{name}.lock")

    def _file(self, shard: str, sha256: str) -> Path:
        # The content's checksum is part of the name, so that a shard that was replaced is not taken for the new one.
        tail = re.sub(r"[^A-Za-z0-9._-]", "_", name_of(shard))[-40:]
        return self.folder / f"{_key(shard)}-{sha256.lower()[:32]}-{tail}"


class _Mine:
    """What belongs to one process alone."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.slots = threading.Semaphore(PREFETCHES)
        self.started: dict[tuple[str, int | None, str | None], Future[Path]] = {}
        self.transfers = Transfers()


class _Download:
    """One shard on its way into a file, over as many connections as it takes."""

    def __init__(
        self, cache: ShardCache, shard: str, part: Path, file: BinaryIO, size: int | None, sha256: str | None
    ) -> None:
        self.cache, self.shard, self.part, self.file, self.size, self.sha256 = cache, shard, part, file, size, sha256
        self.total: int | None = None
        self.tag: str | None = None
        self.reserved = 0
        self._begin_anew()

    def run(self) -> None:
        """Returns when the file has arrived and is what it should be.

        Raises:
            UserError: It can't be had.
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
                raise _MissingError(
                    f"{_shown(self.shard)} is missing or may not be read ({self._reason(error)}): check its address "
                    "and your credentials."
                ) from error
            except Exception as error:  # each store's client has its own errors
                differs = isinstance(error, _DiffersError)
                failures = 0 if self.written > furthest and not differs else failures + 1
                furthest = max(furthest, self.written)
                if failures >= self.cache.attempts:
                    raise self._given_up(error) from error
                if differs:
                    self._begin_anew()
            self.cache.count(retries=1)
            _pause(failures)

    def _attempt(self) -> None:
        with contextlib.closing(_ask(self.shard, self.written, self.tag, self.cache.timeout)) as answer:
            if answer.start and answer.total != self.total:
                self._begin_anew()
                raise ConnectionError("it changed while it was fetched")
            if answer.start != self.written:
                self._begin_anew()
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
        self.cache.count(bytes=len(chunk))

    def _begin_anew(self) -> None:
        self.written = 0
        self.digest = hashlib.sha256()
        self.file.seek(0)

    def _given_up(self, error: Exception) -> UserError:
        if isinstance(error, _DiffersError):
            return UserError(
                f"{_shown(self.shard)} differs from its manifest ({error}): upload it again, or make a new manifest."
            )
        return UserError(
            f"{_shown(self.shard)} could not be fetched ({self.cache.attempts} attempts in a row got no further, the "
            f"last: {self._reason(error)}): check its address and the network, and run again."
        )

    def _reason(self, error: Exception) -> str:
        text = (str(error).strip() or str(error.__cause__ or "").strip() or type(error).__name__).splitlines()[0]
        # Queries of signed URLs are keys, and clients put whole URLs into their errors.
        return re.sub(r"\?[^\s'\"]*", "", text) if _scheme(self.shard) in WEB else text


@dataclass(frozen=True)
class _Answer:
    """What a server, or a command, has to give."""

    start: int
    """The byte that the chunks begin with: the one asked for, or 0 where only the whole can be had."""
    total: int | None
    """Bytes of the whole file, if known."""
    tag: str | None
    """Changes when the file does, if known."""
    chunks: Iterator[bytes]
    close: Callable[[], object]
    """To be called when done with the chunks, or with as many as were wanted."""


def _ask(shard: str, start: int, tag: str | None, timeout: float) -> _Answer:
    if _scheme(shard) == "pipe":
        output = _run(shard.partition(":")[2])
        return _Answer(0, None, None, output, output.close)
    _check_scheme(shard)  # fsspec would open many more, some of which run code
    return (_ask_web if _scheme(shard) in WEB else _ask_store)(shard, start, tag, timeout)


def _ask_web(url: str, start: int, tag: str | None, timeout: float) -> _Answer:
    # Not fsspec's client, aiohttp: of a body that breaks off it throws away what had arrived and was not yet read.
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
            return _ask_web(url, 0, None, timeout)
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
    first, total = _content_range(said.get("Content-Range", ""))
    if response.status == 206 and first != start:
        response.close()
        return _ask_web(url, 0, None, timeout)
    if response.status != 206:
        start, total = 0, int(said["Content-Length"]) if "Content-Length" in said else None
        etag = said.get("ETag", "W/")
        tag = said.get("Last-Modified") if etag.startswith("W/") else etag  # a weak one may not be asked for
    return _Answer(start, total, tag, iter(lambda: response.read1(CHUNK // 8), b""), response.close)


def _content_range(header: str) -> tuple[int | None, int | None]:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", header.strip())
    if match is None:
        return None, None
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _ask_store(url: str, start: int, tag: str | None, timeout: float) -> _Answer:
    store, path = _store(url, timeout)
    store.invalidate_cache()  # a listing may be older than the file
    file = store.open(path, "rb", block_size=CHUNK, cache_type="none")
    found = next((str(file.details[name]) for name in ("ETag", "etag", "blob_id") if name in file.details), None)
    if found != tag or start > file.size:
        start = 0
    file.seek(start)
    return _Answer(start, file.size, found, iter(lambda: file.read(CHUNK), b""), file.close)


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


def _store(url: str, timeout: float) -> tuple[Any, str]:
    """fsspec's file system for a URL, and what it calls the file.

    fsspec keeps one for each process and set of options, and makes its own anew in the child of a fork.
    """
    scheme = _scheme(url)
    options: dict[str, Any] = {}
    if scheme == "s3":
        # Retries are ours: its own, five times botocore's five, would wait for minutes before we hear of it.
        options["config_kwargs"] = {
            "connect_timeout": timeout,
            "read_timeout": timeout,
            "retries": {"total_max_attempts": 1},
        }
    try:
        kind: Any = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        remedy = "install it with: pip install 'fuyu-e2e[s3]'" if scheme == "s3" else str(error)
        raise UserError(f"{_shown(url)} needs a package that is not installed: {remedy}.") from error
    store = kind(**options, **kind._get_kwargs_from_urls(url))
    if scheme == "s3":
        store.retries = 1
    return store, kind._strip_protocol(url)


def _expand(path: str) -> list[str]:
    scheme = _scheme(path)
    if scheme == "pipe":
        return [path]
    if is_local(path):
        path = str(_local_path(path))
        if Path(path).is_dir():
            return _shards_among(str(file) for file in Path(path).iterdir())
        if Path(path).exists():
            return [path]
        return glob.glob(path, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    in_folder = path.endswith("/")
    pattern = f"{path}*" if in_folder else path
    if scheme in WEB:
        # Brackets in the host are an IPv6 address, and a question mark begins the query.
        if re.search(r"[*[]", _without_query(pattern).split("/", 3)[-1]):
            raise UserError(
                f"{_shown(path)}: a web server can't be asked which files it has; name each shard, or write a range "
                "in braces, such as {000..123}.tar."
            )
        return [path]
    if not re.search(r"[*?[]", pattern):
        return [path]
    host = path.split("/")[2]
    try:
        store, within = _store(pattern, 30.0)
        store.invalidate_cache()
        found = [f"{scheme}://{host}/{name.partition('/')[2]}" for name in store.glob(within)]
        return _shards_among(found) if in_folder else found
    except UserError:
        raise
    except Exception as error:  # each store's client has its own errors
        raise UserError(f"{path} can't be listed ({error}): check its address and your credentials.") from error


def _shards_among(files: Iterable[str]) -> list[str]:
    """The files of a folder that are shards, and those that would be, were they unpacked."""
    named = set(files)
    unpacked = {path: re.sub(r"[.](tar[.]gz|tgz)$", ".tar", path, flags=re.IGNORECASE) for path in named}
    return [path for path in named if path.endswith(".tar") or (_is_compressed(path) and unpacked[path] not in named)]


def _compressed_instead(path: str) -> list[str]:
    """The compressed shards of this machine that have the names of uncompressed ones which are not there."""
    if not is_local(path) or not path.endswith(".tar"):
        return []
    stem = str(_local_path(path)).removesuffix(".tar")
    return sorted(found for end in COMPRESSED for found in glob.glob(stem + end, recursive=True))  # noqa: PTH207


def _is_compressed(shard: str) -> bool:
    return _scheme(shard) != "pipe" and name_of(shard).lower().endswith(COMPRESSED)


def _unpack(shards: Sequence[str]) -> str:
    """The sentence that refuses compressed shards, with the command that unpacks them."""
    others = f" and {len(shards) - 1:,} more" if len(shards) > 1 else ""
    said = f"{_shown(shards[0])}{others} can't be read sample by sample, being compressed: "
    local = [_local_path(shard) for shard in shards if is_local(shard)]
    if not local:
        return said + f"download it, unpack it with `gunzip {shlex.quote(name_of(shards[0]))}`, and upload the .tar."
    if len(local) <= 3:
        named = [shlex.quote(str(path)) for path in local]
    else:
        ends = {
            (str(path.parent), next(end for end in COMPRESSED if path.name.lower().endswith(end))) for path in local
        }
        named = [f"{shlex.quote(folder)}/*{end}" for folder, end in sorted(ends)]
    return said + f"unpack with `gunzip {' '.join(named)}`, and name the .tar."


def _check_scheme(url: str) -> None:
    if _scheme(url) not in REMOTE or "://" not in url:
        raise UserError(
            f"{url} has a scheme that shards are not read from: name a local path, or a URL that begins with "
            f"{', '.join(f'{scheme}://' for scheme in REMOTE)} or file://."
        )


def _scheme(shard: str) -> str:
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", shard)
    return match[1].lower() if match else ""


def _local_path(shard: str) -> Path:
    return Path(re.sub("^file:(//(localhost(?=/))?)?", "", shard, flags=re.IGNORECASE))


def _without_query(url: str) -> str:
    return re.split("[?#]", url)[0] if _scheme(url) in WEB else url


def _shown(shard: str) -> str:
    """A shard as messages name it: without the secrets of a signed URL."""
    return re.sub("(?<=//)[^/@]*@", "", _without_query(shard)) if _scheme(shard) in WEB else shard


def _key(shard: str) -> str:
    return hashlib.sha256(shard.encode()).hexdigest()[:32]


def _last_used(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # another process has just deleted it
        return 0


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def delay(failures: int) -> float:
    """Seconds to wait after `failures` without progress, partly random so that hosts don't all come back at once."""
    return min(LONGEST_DELAY, FIRST_DELAY * 2 ** max(0, failures - 1)) * random.uniform(0.5, 1)


def _pause(failures: int) -> None:
    time.sleep(delay(failures))
