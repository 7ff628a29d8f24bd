"""The shard cache: local files for shards from any location.

Readers need a local file. A remote shard is downloaded once per host, into a bounded folder that all processes of the
host share."""

import contextlib
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from fuyu_e2e.data.home import with_home
from fuyu_e2e.data.shards.downloads import Download, MissingError
from fuyu_e2e.data.shards.locations import LISTED, is_local, local_path, name_of, open_store, scheme_of
from fuyu_e2e.errors import UserError

CACHE_FOLDER = "~/.cache/fuyu_e2e"
"""Default folder for downloaded shards."""
CACHE_GIGABYTES = 100.0
"""Default limit of that folder."""
PREFETCHES = 2
"""Downloads that `ShardCache.prefetch` runs at once."""


def read_bytes(location: str, *, timeout: float = 30.0, attempts: int = 6) -> bytes | None:
    """Returns the content of a small local or remote file; None if there is none.

    A file that the store forbids to read counts as missing: without the right to list, S3 forbids every missing file.

    Raises:
        UserError: The file exists but can't be read.
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
    """Writes a small local or remote file atomically; returns False if that place can't be written."""
    if not is_local(location):
        if scheme_of(location) not in LISTED:
            return False
        try:
            store, path = open_store(location, 30.0)
            store.pipe_file(path, data)
        except Exception:  # clients raise errors of their own; none leaves a file
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
    """Local files for shards from any location: a folder of downloads that never holds more than `max_bytes`.

    Processes of one host share the folder. The cache may be pickled and forked; running downloads stay with the
    process that started them.
    """

    def __init__(self, folder: Path, max_bytes: int, *, attempts: int = 6, timeout: float = 30.0) -> None:
        """Creates and deletes nothing until the first shard is fetched.

        Args:
            folder: The folder of downloads, on a disk of this host; created if needed.
            max_bytes: The most bytes in the folder; the least recently used files are deleted above it.
            attempts: How often in a row a download may fail without progress.
            timeout: Seconds for a server to connect, and seconds without data after which it has failed.
        """
        self.folder, self.max_bytes, self.attempts, self.timeout = folder, max_bytes, attempts, timeout
        self._mine = _ProcessState()

    @classmethod
    def at(cls, folder: str = CACHE_FOLDER, gigabytes: float = CACHE_GIGABYTES) -> "ShardCache":
        """Returns a cache from a user's settings; expands `~` in `folder`."""
        return cls(Path(with_home(folder)), int(gigabytes * 1e9))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_mine"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _mine=_ProcessState())

    def path(self, shard: str, size: int | None = None, sha256: str | None = None) -> Path:
        """Returns a local file with the shard's content: the shard itself if it is local, else one in the cache.

        Open it before you fetch others: a file in use may be deleted from the folder, and stays readable only if open.

        Args:
            shard: A path or URL from `expand_patterns`.
            size: Its bytes according to a manifest, if there is one.
            sha256: Its hexadecimal checksum according to a manifest, if there is one.

        Raises:
            UserError: The shard can't be fetched, differs from `size` or `sha256`, or is larger than the cache.
        """
        if is_local(shard):
            return local_path(shard)
        started = self._own().started.pop((shard, size, sha256), None)
        if started is not None and not started.cancel():
            started.result()
        return self._fetch(shard, size, sha256)

    def prefetch(self, shard: str, size: int | None = None, sha256: str | None = None) -> None:
        """Starts to fetch a shard in the background; `path` waits for it and raises its error."""
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

        # Not an executor: its threads would keep a finished or failed program from exiting.
        threading.Thread(target=fetch, name=f"prefetch {name_of(shard)}", daemon=True).start()

    def _own(self) -> "_ProcessState":
        if self._mine.pid != os.getpid():  # a fork copies locks that no thread in the child releases
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
        # Overwrites what a killed process left, so that a shard never has more than one unfinished file.
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
        return target

    def make_room(self, part: Path, size: int) -> None:
        """Deletes the least recently used files until an unfinished one may grow to `size` bytes.

        Raises:
            UserError: The cache can't hold so many bytes.
        """
        if size > self.max_bytes:
            raise UserError(
                f"The shard cache {self.folder} holds {self.max_bytes:,} bytes and a shard has {size:,} or more: set "
                "data.cache_gigabytes to several times the largest shard."
            )
        with self.writing(), self._lock("room"):
            os.truncate(part, size)  # visible to all, so that two processes don't claim the same room
            files = []
            for path in self.folder.iterdir():
                if re.match(r"[0-9a-f]{32}(-|\.part$)", path.name):  # the folder may contain other files
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
        """Turns an OSError in the block, which accesses the folder, into a UserError, apart from network errors."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"The shard cache {self.folder} can't be written ({error.strerror or error}): make room there, or "
                "name another folder."
            ) from error

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.folder / "locks" / f"{name}.lock")

    def _file(self, shard: str, sha256: str) -> Path:
        # The name contains the content's checksum, so that a replaced shard is not mistaken for the new one.
        tail = re.sub(r"[^A-Za-z0-9._-]", "_", name_of(shard))[-40:]
        return self.folder / f"{_key(shard)}-{sha256.lower()[:32]}-{tail}"


class _ProcessState:
    """State that belongs to one process only."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.slots = threading.Semaphore(PREFETCHES)
        self.started: dict[tuple[str, int | None, str | None], Future[Path]] = {}


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
