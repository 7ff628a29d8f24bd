"""The shard cache: local files for shards wherever they lie.

Readers want a local file. A shard on another machine is downloaded once per host into a bounded folder that all
processes of the host share."""

import contextlib
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from fuyu_e2e.data.home import with_home
from fuyu_e2e.data.shards.downloads import Download, MissingError
from fuyu_e2e.data.shards.locations import LISTED, is_local, local_path, name_of, open_store, scheme_of
from fuyu_e2e.errors import UserError

CACHE_FOLDER = "~/.cache/fuyu_e2e"
"""Where shards from elsewhere are kept, unless somebody says otherwise."""
CACHE_GIGABYTES = 100.0
"""What they may take up there, likewise."""
PREFETCHES = 2
"""Downloads that `ShardCache.prefetch` has under way at once."""


@dataclass
class Transfers:
    """What a process has downloaded so far."""

    shards: int = 0
    """Shards that arrived whole."""
    bytes: int = 0
    """Bytes that came, those of broken attempts included."""
    retries: int = 0
    """Attempts that failed and were made again."""


def read_bytes(location: str, *, timeout: float = 30.0, attempts: int = 6) -> bytes | None:
    """Returns the content of a small file, local or remote; None where there is none.

    A store that forbids reading it counts as having none: without the right to list, S3 says so of every missing file.

    Raises:
        UserError: It is there, but can't be read.
    """
    try:
        if is_local(location):
            return local_path(location).read_bytes()
        if scheme_of(location) == "pipe":
            return None
        with tempfile.TemporaryDirectory() as folder:
            return ShardCache(Path(folder), 2**40, attempts=attempts, timeout=timeout).path(location).read_bytes()
    except (FileNotFoundError, MissingError):
        return None
    except OSError as error:
        raise UserError(f"{location} can't be read ({error.strerror}): see to its permissions.") from error


def write_bytes(location: str, data: bytes) -> bool:
    """Writes a small file, local or remote, whole or not at all; False where that place can't be written."""
    if not is_local(location):
        if scheme_of(location) not in LISTED:
            return False
        try:
            store, path = open_store(location, 30.0)
            store.pipe_file(path, data)
        except Exception:  # each store's client has its own errors, and no file is left by any
            return False
        return True
    target = local_path(location)
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
        self._mine = _ProcessState()

    @classmethod
    def at(cls, folder: str = CACHE_FOLDER, gigabytes: float = CACHE_GIGABYTES) -> "ShardCache":
        """Returns a cache as users name it; `~` is their home."""
        return cls(Path(with_home(folder)), int(gigabytes * 1e9))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_mine"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _mine=_ProcessState())

    @property
    def transfers(self) -> Transfers:
        """What this process has downloaded so far."""
        return replace(self._own().transfers)

    def path(self, shard: str, size: int | None = None, sha256: str | None = None) -> Path:
        """Returns a local file with the shard's content: its own if it is local, else the cache's.

        Open it before others are fetched: a file in use may be deleted from the folder, and stays readable.

        Args:
            shard: A path or URL, as `expand_patterns` gives it.
            size: Its bytes, where a manifest says so.
            sha256: Its checksum in hexadecimal digits, where a manifest says so.

        Raises:
            UserError: It can't be fetched, differs from `size` or `sha256`, or is larger than the cache.
        """
        if is_local(shard):
            return local_path(shard)
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

    def _own(self) -> "_ProcessState":
        if self._mine.pid != os.getpid():  # a fork copies locks that no thread of the copy will ever release
            self._mine = _ProcessState()
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
                download = Download(self, shard, part, file, size, sha256)
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


class _ProcessState:
    """What belongs to one process alone."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.slots = threading.Semaphore(PREFETCHES)
        self.started: dict[tuple[str, int | None, str | None], Future[Path]] = {}
        self.transfers = Transfers()


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
