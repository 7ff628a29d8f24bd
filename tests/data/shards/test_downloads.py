"""Shards come from wherever they lie, whole or with a sentence, over lines and servers that fail."""

import hashlib
import multiprocessing
import os
import pickle
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import fsspec
import pytest
import webdataset

from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.row_loader import RowDataset, RowLoader
from fuyu_e2e.data.shards import downloads
from fuyu_e2e.data.shards.cache import ShardCache, read_bytes, write_bytes
from fuyu_e2e.data.shards.downloads import delay
from fuyu_e2e.data.shards.locations import expand_patterns, folder_of, is_local, name_of
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UserError

# Python 3.12 warns of every fork beside threads; that forks are safe here is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")

NEVER = 300.0
"""Seconds after which what doesn't come is given up, however busy the machine."""
MEGABYTE = 2**20
Fault = int | tuple[str, int]
"""A status, or how a body ends ("drop", "close" or "stall") and after how many bytes."""


class Web(ThreadingHTTPServer):
    """A web server whose failures can be prescribed."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ranges = self.tags = self.lengths = True
        self.fault: Callable[[str], Fault | None] = lambda path: None
        self.shift = 0
        """How many bytes before those asked for an answer begins."""
        self.encoding: str | None = None
        self.seconds = 0.0
        """How long each answer takes, unless the test ends before."""
        self.asked: list[tuple[str, str | None]] = []
        """Paths and ranges of all requests."""
        self.authorizations: list[str | None] = []
        self.faults = self.busy = self.busiest = 0
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, size: int) -> bytes:
        self.files[f"/{name}"] = random.Random(name).randbytes(size)
        return self.files[f"/{name}"]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        web, path = self.server, self.path.split("?")[0]
        web.asked.append((path, self.headers["Range"]))
        web.authorizations.append(self.headers["Authorization"])
        web.busy += 1
        web.busiest = max(web.busy, web.busiest)
        web.ended.wait(web.seconds)
        fault = web.fault(path)
        web.faults += isinstance(fault, int)
        try:
            if path.startswith("/moved/"):
                self.answer(302, b"", {"Location": path.removeprefix("/moved")})
            elif path not in web.files or isinstance(fault, int):
                self.answer(fault if isinstance(fault, int) else 404, b"")
            else:
                self.give(web.files[path], fault)
        finally:
            web.busy -= 1

    def give(self, data: bytes, fault: tuple[str, int] | None) -> None:
        tag, start = f'"{hashlib.sha256(data).hexdigest()}"', 0
        headers = {"ETag": tag} if self.server.tags else {}
        if self.server.encoding:
            headers["Content-Encoding"] = self.server.encoding
        if self.server.ranges and self.headers["Range"] and self.headers["If-Range"] in (None, tag):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                self.answer(416, b"")
                return
            start -= self.server.shift
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.answer(206 if start else 200, data[start:], headers, fault)

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: tuple[str, int] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.close_connection = not self.server.lengths or fault is not None
        if self.server.lengths:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        self.server.faults += fault is not None and fault[1] < len(body)
        self.wfile.write(body if fault is None else body[: fault[1]])
        self.wfile.flush()
        if fault is not None and fault[0] == "stall":
            self.server.ended.wait(NEVER)
        if fault is not None and fault[0] == "drop":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *_: Any) -> None:
        """Not on stderr."""


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", MEGABYTE, attempts=3, timeout=60.0)


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Failures after which a wait would have been made; no time passes."""
    waited: list[int] = []
    monkeypatch.setattr(downloads, "_pause", waited.append)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return waited


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each piece that arrived, those of failed attempts included."""
    sizes: list[int] = []
    write = downloads.Download._write

    def counted(self: downloads.Download, chunk: bytes) -> None:
        write(self, chunk)
        sizes.append(len(chunk))

    monkeypatch.setattr(downloads.Download, "_write", counted)
    return sizes


def files(cache: ShardCache) -> list[Path]:
    return sorted(path for path in cache.folder.iterdir() if path.is_file())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def forked(act: Callable[[], object]) -> Any:
    """A child process that was forked from this one, exit code 0 if it finishes without an exception."""
    child = multiprocessing.get_context("fork").Process(target=act, daemon=True)
    child.start()
    return child


def waited_for(condition: Callable[[], object], seconds: float = NEVER) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came to be"
        time.sleep(0.01)


# Names


@pytest.mark.parametrize("name", ["set [1]", "a{1,2}b", "what?", "{open", "star*"])
def test_a_path_that_is_there_is_no_pattern(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    shard = folder / f"{name}.tar"
    shard.touch()
    assert expand_patterns(str(shard)) == (str(shard),)
    assert expand_patterns(str(folder)) == (str(shard),)


def test_local_patterns_name_files_globs_braces_and_folders(tmp_path: Path) -> None:
    for name in ("a-0", "a-1", "a-2", "b-0"):
        (tmp_path / f"{name}.tar").touch()
    (tmp_path / "notes.md").touch()
    everything = tuple(str(tmp_path / f"{name}.tar") for name in ("a-0", "a-1", "a-2", "b-0"))
    assert expand_patterns(str(tmp_path)) == everything
    assert expand_patterns(f"file://{tmp_path}") == everything
    assert expand_patterns(f"file://localhost{tmp_path}/a-{{0..1}}.tar") == everything[:2]
    assert expand_patterns(f"{tmp_path}/*.tar") == everything
    assert expand_patterns(f"{tmp_path}/a-{{0..2}}.tar") == everything[:3]
    assert expand_patterns([f"{tmp_path}/b-0.tar", f"{tmp_path}/*.tar"]) == (everything[3], *everything[:3])
    with pytest.raises(UserError, match=r"nothing-\*\.tar.*matches no shard: see that it names .tar files"):
        expand_patterns([str(tmp_path), f"{tmp_path}/nothing-*.tar"])
    with pytest.raises(UserError, match=r"braces that don't match"):
        expand_patterns(f"{tmp_path}/a-{{0..2.tar")


def test_compressed_shards_are_refused_with_the_command_that_unpacks_them(tmp_path: Path) -> None:
    """Whatever names them: and the command, run by a shell, makes the same pattern read them."""
    folder = tmp_path / "my shards"
    folder.mkdir()

    def pack(*names: str) -> None:
        for file in folder.iterdir():
            file.unlink()
        for name in names:
            with tarfile.open(folder / name, "w" if name.endswith(".tar") else "w:gz"):
                pass

    def unpacked_by(pattern: str) -> None:
        with pytest.raises(
            UserError, match=r"my shards/[a-e]\.\S+ (and \d more )?can't be read sample by.*compressed"
        ) as told:
            expand_patterns(pattern)
        [command] = re.findall("`(.*)`", str(told.value))
        assert command.startswith("gunzip ")
        subprocess.run(command, shell=True, check=True)

    for pattern in ("", "/*.tar", "/{a,b}.tar", "/?.tar"):
        pack("a.tar.gz", "b.tgz")
        unpacked_by(f"{folder}{pattern}")
        assert [name_of(shard) for shard in expand_patterns(f"{folder}{pattern}")] == ["a.tar", "b.tar"]
    for pattern in ("/a.tar.gz", "/*.gz"):
        pack("a.tar.gz", "b.tgz", "c.tar")
        unpacked_by(f"file://{folder}{pattern}")
        assert [name_of(shard) for shard in expand_patterns(f"{folder}/[ac].tar")] == ["a.tar", "c.tar"]
    pack("a.tar.gz", "b.tgz", "c.TAR.GZ", "d.tar.gz", "e.tar")
    (folder / "c.TAR.GZ").unlink()
    with tarfile.open(folder / "c.tgz", "w:gz"):
        pass
    unpacked_by(str(folder))
    assert [name_of(shard) for shard in expand_patterns(str(folder))] == [f"{name}.tar" for name in "abcde"]
    pack("a.tar", "a.tar.gz")  # as gunzip --keep leaves them
    assert expand_patterns(str(folder)) == (str(folder / "a.tar"),)


def test_compressed_shards_elsewhere_are_refused_before_they_are_fetched() -> None:
    for url in ("https://host/a b.tar.gz?sig=key", "s3://bucket/{a,b}.tgz"):
        with pytest.raises(UserError, match=r"download it, unpack it with `gunzip \S.*\.t\S+`, and upload") as told:
            expand_patterns(url)
        assert "key" not in str(told.value)
    assert expand_patterns("pipe:gunzip -c a.tar.gz", allow_pipe=True) == ("pipe:gunzip -c a.tar.gz",)


def test_urls_expand_without_being_asked_for() -> None:
    urls = expand_patterns(["https://host/b-{1..0}.tar?sig=x*y", "s3://bucket/a.tar", "https://host/b-1.tar?sig=x*y"])
    assert urls == ("https://host/b-0.tar?sig=x*y", "https://host/b-1.tar?sig=x*y", "s3://bucket/a.tar")
    assert expand_patterns("http://[::1]:80/a.tar") == ("http://[::1]:80/a.tar",)


@pytest.mark.parametrize(
    "pattern", ["http://u:p@host/*.tar?sig=key", "https://host/a[01].tar", "https://host/shards/"]
)
def test_a_web_server_is_not_asked_for_a_list(pattern: str) -> None:
    with pytest.raises(UserError, match=r"range in braces") as told:
        expand_patterns(pattern)
    assert "key" not in str(told.value)
    assert "u:p" not in str(told.value)


@pytest.mark.parametrize(
    "url",
    ["memory://a.tar", "ftp://host/a.tar", "ssh://host/a.tar", "github://a:b@c/d.tar", "s3:a.tar", "zip://a.tar"],
)
def test_other_schemes_are_refused(url: str, cache: ShardCache) -> None:
    with pytest.raises(UserError, match=r"scheme.*http://, https://, s3://, gs://, gcs://, az://, abfs://, hf://"):
        expand_patterns(url)
    with pytest.raises(UserError, match="scheme"):
        cache.path(url)


def test_a_command_is_refused_and_does_not_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.allow_pipe"):
        expand_patterns(f"pipe:touch {tmp_path}/HIT")
    assert read_bytes(f"pipe:touch {tmp_path}/HIT; echo 1") is None
    assert not (tmp_path / "HIT").exists()


def test_braces_of_allowed_commands_expand_and_the_rest_stays() -> None:
    pattern = r"pipe:aws s3 cp s3://b/{00..02}.tar - | awk '{print $1}' | tr '\n' x*"
    assert expand_patterns(pattern, allow_pipe=True) == tuple(
        rf"pipe:aws s3 cp s3://b/{number}.tar - | awk '{{print $1}}' | tr '\n' x*" for number in ("00", "01", "02")
    )


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, cache: ShardCache) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for scheme in ("s3", "gs"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(UserError, match=r"pip install 'fuyu-e2e\[s3\]'"):
        expand_patterns("s3://bucket/*.tar")
    with pytest.raises(UserError, match=r"pip install 'fuyu-e2e\[s3\]'"):
        cache.path("s3://bucket/a.tar")
    with pytest.raises(UserError, match="install gcsfs"):
        expand_patterns("gs://bucket/*.tar")


@pytest.mark.parametrize(
    ("shard", "folder", "name"),
    [
        ("/data/a.tar", "/data", "a.tar"),
        ("a.tar", ".", "a.tar"),
        ("file:///data/a.tar", "/data", "a.tar"),
        ("https://u:p@host/x/a.tar?path=/y/b.tar", "https://u:p@host/x", "a.tar"),
        ("s3://bucket/a.tar", "s3://bucket", "a.tar"),
        ("s3://bucket/x?/a#1.tar", "s3://bucket/x?", "a#1.tar"),
        ("pipe:cat /data/a.tar", "", "pipe:cat /data/a.tar"),
    ],
)
def test_folder_and_name(shard: str, folder: str, name: str) -> None:
    assert (folder_of(shard), name_of(shard)) == (folder, name)
    assert is_local(shard) == (folder in ("/data", "."))


# Fetching


def test_a_local_shard_is_its_own_file(cache: ShardCache, tmp_path: Path) -> None:
    assert cache.path(f"{tmp_path}/a.tar") == cache.path(f"file://{tmp_path}/a.tar") == tmp_path / "a.tar"
    cache.prefetch(f"{tmp_path}/a.tar")
    assert not cache.folder.exists()


def test_a_shard_is_fetched_once(cache: ShardCache, web: Web, waits: list[int], received: list[int]) -> None:
    data = web.files["/x/%C3%A4%20b.tar"] = web.add("a", 300_000)
    url = f"{web.url}/x/ä b.tar?sig=../../key"
    path = cache.path(url, len(data), sha256(data).upper())
    assert path.read_bytes() == cache.path(url).read_bytes() == data
    assert files(cache) == [path]
    assert path.name.endswith("-__b.tar")
    assert len(web.asked) == 1
    assert sum(received) == 300_000
    assert not waits


@pytest.mark.parametrize("tags", [True, False], ids=["tags", "no-tags"])
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no-ranges"])
def test_all_shards_arrive_whole_over_a_line_that_fails(
    tmp_path: Path, web: Web, ranges: bool, tags: bool, waits: list[int], received: list[int]
) -> None:
    web.ranges, web.tags = ranges, tags
    rng, stalls = random.Random(0), 0

    def fault(path: str) -> Fault | None:
        nonlocal stalls
        kind = rng.choice([None, None, "drop", "close", "stall", 503, 429, 408, 500])
        stalls += kind == "stall"
        if kind == "stall" and stalls > 3:  # each takes as long as the time-out
            kind = "drop"
        return (kind, rng.randrange(len(web.files[path]))) if isinstance(kind, str) else kind

    web.fault = fault
    shards = {f"{number:03}.tar": web.add(f"{number:03}.tar", rng.randrange(200_000)) for number in range(20)}
    cache = ShardCache(tmp_path, 20 * MEGABYTE, attempts=20, timeout=0.5)
    for name, data in shards.items():
        assert cache.path(f"{web.url}/{name}", len(data), sha256(data)).read_bytes() == data
    assert stalls >= 3
    assert web.faults > 20
    assert len(waits) >= web.faults  # a busy machine adds stalls of its own
    continued = [asked for _, asked in web.asked if asked]
    assert len(continued) > 5
    total = sum(map(len, shards.values()))
    assert sum(received) == total if ranges else sum(received) > total
    assert len(files(cache)) == len(shards)


def test_only_attempts_that_get_no_further_count(cache: ShardCache, web: Web, waits: list[int]) -> None:
    data = web.add("a.tar", 500_000)
    web.fault = lambda path: ("close", 20_000)
    assert cache.path(f"{web.url}/a.tar").read_bytes() == data
    assert len(web.asked) == 25
    assert set(waits) == {0}
    web.asked.clear()
    web.add("b.tar", 500_000)
    web.ranges = False
    with pytest.raises(UserError, match=r"b\.tar could not be fetched \(3 attempts in a row"):
        cache.path(f"{web.url}/b.tar")
    assert len(web.asked) == 1 + 3


def test_waits_double_up_to_a_bound() -> None:
    assert all(0.05 <= delay(failures) <= 0.1 for failures in (0, 1))
    assert 0.2 <= delay(3) <= 0.4
    assert 5 <= delay(1000) <= 10
    assert delay(8) != delay(8)


@pytest.mark.parametrize("status", [401, 403, 404, 410, 400])
def test_a_refusal_is_reported_at_once(cache: ShardCache, web: Web, status: int) -> None:
    web.fault = lambda path: status
    with pytest.raises(UserError, match=rf"/x/gone\.tar is missing or may not be read \(HTTP {status}") as told:
        cache.path(f"{web.url}/x/gone.tar?sig=secret")
    assert len(web.asked) == 1
    assert "secret" not in str(told.value)
    assert not files(cache)


def test_the_last_failure_is_named(cache: ShardCache, web: Web, waits: list[int]) -> None:
    web.add("a.tar", 10)
    web.fault = lambda path: 502
    with pytest.raises(UserError, match=r"a\.tar could not be fetched .*HTTP 502 Bad Gateway\): check"):
        cache.path(f"{web.url}/a.tar?sig=secret")
    assert len(web.asked) == 3
    assert len(waits) == 2
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with pytest.raises(UserError, match=r"could not be fetched .*Connection refused") as told:
        cache.path(f"http://127.0.0.1:{port}/a.tar?sig=secret")
    assert "secret" not in str(told.value)


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, web: Web) -> None:
    web.add("a.tar", 10)
    web.seconds = NEVER
    with pytest.raises(UserError, match=r"could not be fetched \(2 attempts in a row.*timed out"):
        ShardCache(tmp_path, MEGABYTE, attempts=2, timeout=0.3).path(f"{web.url}/a.tar")


@pytest.mark.parametrize(
    ("size", "tags"),
    [
        (40_000, True),
        (50_000, True),
        (60_000, True),
        (10_000, True),
        (40_000, False),
        (60_000, False),
        (10_000, False),
    ],
)
def test_a_shard_that_changes_on_the_way_is_not_mixed(cache: ShardCache, web: Web, size: int, tags: bool) -> None:
    web.add("a.tar", 50_000)
    web.tags = tags

    def fault(path: str) -> Fault | None:
        if len(web.asked) == 1:
            return ("close", 20_000)
        if len(web.asked) == 2:
            web.files["/a.tar"] = b"\1" * size
        return None

    web.fault = fault
    assert cache.path(f"{web.url}/a.tar").read_bytes() == b"\1" * size


def test_a_shard_that_differs_from_its_manifest_is_fetched_again_then_reported(
    cache: ShardCache, web: Web, received: list[int]
) -> None:
    data = web.add("a.tar", 1000)
    good, web.files["/a.tar"] = data, data[:-1] + bytes([data[-1] ^ 1])

    def heal(path: str) -> None:
        if len(web.asked) == 2:
            web.files[path] = good

    for size, digest in ((None, sha256(good)), (1001, None), (999, None)):
        web.asked.clear()
        with pytest.raises(UserError, match=r"a\.tar differs from its manifest"):
            cache.path(f"{web.url}/a.tar", size, digest)
        assert len(web.asked) == 3
        assert not files(cache)
    assert sum(received) == 3 * 1000  # a wrong length shows before the body comes
    web.lengths = False
    with pytest.raises(UserError, match=r"a\.tar differs from its manifest \(it has 1,000 bytes, not 999\)"):
        cache.path(f"{web.url}/a.tar", 999)
    web.lengths = True
    web.asked.clear()
    web.fault = heal
    assert cache.path(f"{web.url}/a.tar", 1000, sha256(good)).read_bytes() == good


def test_a_short_body_without_a_length_shows_by_the_size(cache: ShardCache, web: Web, waits: list[int]) -> None:
    data = web.add("a.tar", 50_000)
    web.lengths = web.ranges = False
    web.fault = lambda path: ("close", 30_000) if len(web.asked) == 1 else None
    assert cache.path(f"{web.url}/a.tar", 50_000).read_bytes() == data
    assert len(waits) == 1
    web.fault = lambda path: ("close", 30_000)
    with pytest.raises(UserError, match=r"ended after 30,000 of 50,001 bytes"):
        cache.path(f"{web.url}/a.tar", 50_001)


def test_a_shard_that_was_replaced_is_fetched_anew(cache: ShardCache, web: Web) -> None:
    old = web.add("a.tar", 1000)
    first = cache.path(f"{web.url}/a.tar")
    new = web.files["/a.tar"] = old[::-1]
    assert cache.path(f"{web.url}/a.tar", 1000, sha256(new)).read_bytes() == new
    assert first.read_bytes() == old
    web.files["/a.tar"] = new * 2
    assert cache.path(f"{web.url}/a.tar", 2000).read_bytes() == new * 2


def test_a_shard_that_moved_is_followed(cache: ShardCache, web: Web) -> None:
    data = web.add("a.tar", 50_000)
    web.fault = lambda path: ("close", 20_000)
    assert cache.path(f"{web.url}/moved/a.tar").read_bytes() == data
    assert [asked for path, asked in web.asked if path == "/a.tar"] == [None, "bytes=20000-", "bytes=40000-"]


def test_a_server_that_gives_another_range_is_asked_for_the_whole(cache: ShardCache, web: Web) -> None:
    data = web.add("a.tar", 50_000)
    web.shift = 5
    web.fault = lambda path: ("close", 20_000) if len(web.asked) == 1 else None
    assert cache.path(f"{web.url}/a.tar").read_bytes() == data
    assert [asked for _, asked in web.asked] == [None, "bytes=20000-", None]


def test_a_server_that_gives_a_part_unasked_is_reported(cache: ShardCache, web: Web) -> None:
    web.add("a.tar", 10)
    web.fault = lambda path: 206
    with pytest.raises(UserError, match="sends a part of it, asked for the whole"):
        cache.path(f"{web.url}/a.tar")
    assert len(web.asked) == 3


def test_a_server_that_compresses_unasked_is_reported(cache: ShardCache, web: Web) -> None:
    web.add("a.tar", 10)
    web.encoding = "gzip"
    with pytest.raises(UserError, match="the server compresses what it sends"):
        cache.path(f"{web.url}/a.tar")


def test_names_and_passwords_in_urls_are_sent_and_not_told(cache: ShardCache, web: Web) -> None:
    web.add("a.tar", 10)
    url = web.url.replace("//", "//me:pass%40word@")
    cache.path(f"{url}/a.tar")
    assert web.authorizations == ["Basic bWU6cGFzc0B3b3Jk"]
    with pytest.raises(UserError) as told:
        cache.path(f"{url}/gone.tar")
    assert "word" not in str(told.value)


# The bound


def test_the_shards_used_longest_ago_make_room(cache: ShardCache, web: Web) -> None:
    cache.folder.mkdir()
    (cache.folder / "mine.tar").write_bytes(b"x" * MEGABYTE)
    shards = [f"{web.url}/{name}.tar" for name in "abcdef"]
    for name in "abcdef":
        web.add(f"{name}.tar", 300_000)
    paths = [cache.path(shard) for shard in shards[:3]]
    with paths[1].open("rb") as read:
        cache.path(shards[0])
        fourth = cache.path(shards[3], 300_000)
        assert [path.exists() for path in paths] == [True, False, True]
        assert len(read.read()) == 300_000
    for shard in shards[4:] + shards[:3]:
        assert cache.path(shard).exists()
        assert sum(path.stat().st_size for path in files(cache)) <= 2 * MEGABYTE
    assert not fourth.exists()
    assert (cache.folder / "mine.tar").exists()


def test_what_a_killed_process_left_makes_room_and_what_is_written_does_not(
    cache: ShardCache, web: Web, received: list[int]
) -> None:
    web.add("slow.tar", 500_000)
    web.add("a.tar", 400_000)
    web.fault = lambda path: ("stall", 1000) if path == "/slow.tar" and not web.ended.is_set() else None
    cache.prefetch(f"{web.url}/slow.tar")
    waited_for(lambda: sum(received) == 1000)
    (written,) = files(cache)
    assert written.stat().st_size == 500_000
    left = cache.folder / f"{'0' * 32}.part"
    left.write_bytes(b"x" * 500_000)
    cache.path(f"{web.url}/a.tar")
    assert written.exists()
    assert not left.exists()
    web.ended.set()
    assert cache.path(f"{web.url}/slow.tar").read_bytes() == web.files["/slow.tar"]


def test_a_shard_larger_than_the_cache_is_reported_before_it_is_fetched(
    cache: ShardCache, web: Web, received: list[int]
) -> None:
    web.add("a.tar", MEGABYTE + 1)
    with pytest.raises(UserError, match=r"data\.cache_gigabytes"):
        cache.path(f"{web.url}/a.tar", MEGABYTE + 1)
    assert not web.asked
    with pytest.raises(UserError, match=r"data\.cache_gigabytes"):
        cache.path(f"{web.url}/a.tar")
    assert not received
    web.lengths = False
    with pytest.raises(UserError, match=r"data\.cache_gigabytes"):
        cache.path(f"{web.url}/a.tar")
    assert len(web.asked) == 2
    assert not files(cache)


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path, web: Web) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"shard cache .*/file/cache can't be written"):
        ShardCache(tmp_path / "file" / "cache", MEGABYTE).path(f"{web.url}/a.tar")


def test_a_full_disk_is_not_taken_for_the_network(
    cache: ShardCache, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.add("a.tar", 10)

    def truncate(path: Path, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "truncate", truncate)
    with pytest.raises(UserError, match=r"shard cache .* can't be written \(No space left on device\)"):
        cache.path(f"{web.url}/a.tar")
    assert len(web.asked) == 1


# Processes and threads


def test_processes_that_want_the_same_shard_fetch_it_once(cache: ShardCache, web: Web) -> None:
    data = web.add("a.tar", 100_000)
    web.seconds = 0.3

    def fetch() -> None:
        assert cache.path(f"{web.url}/a.tar").read_bytes() == data

    children = [forked(fetch) for _ in range(3)]
    fetch()
    for child in children:
        child.join(NEVER)
        assert child.exitcode == 0
    assert len(web.asked) == 1


def test_a_process_killed_on_the_way_leaves_neither_a_lock_nor_a_shard(cache: ShardCache, web: Web) -> None:
    data = web.add("a.tar", 100_000)
    web.fault = lambda path: ("stall", 50_000) if len(web.asked) == 1 else None
    child = forked(lambda: cache.path(f"{web.url}/a.tar"))
    waited_for(lambda: web.faults)
    waited_for(lambda: files(cache) and files(cache)[0].stat().st_size)
    os.kill(child.pid, signal.SIGKILL)
    child.join(NEVER)
    assert [path.suffix for path in files(cache)] == [".part"]
    path = cache.path(f"{web.url}/a.tar")
    assert path.read_bytes() == data
    assert files(cache) == [path]


def test_a_forked_process_fetches_too_even_while_its_parent_does(cache: ShardCache, web: Web) -> None:
    first, second, _ = (web.add(f"{name}.tar", 1000) for name in ("a", "b", "slow"))
    assert cache.path(f"{web.url}/a.tar").read_bytes() == first
    web.fault = lambda path: ("stall", 500) if path == "/slow.tar" else None
    cache.prefetch(f"{web.url}/slow.tar")
    waited_for(lambda: web.faults)

    def fetch() -> None:
        cache.prefetch(f"{web.url}/b.tar")
        assert cache.path(f"{web.url}/b.tar").read_bytes() == second

    child = forked(fetch)
    child.join(NEVER)
    assert child.exitcode == 0


def test_a_cache_can_be_pickled_while_it_fetches(cache: ShardCache, web: Web) -> None:
    data = web.add("a.tar", 1000)
    web.seconds = 0.2
    cache.prefetch(f"{web.url}/a.tar")
    copy = pickle.loads(pickle.dumps(cache))  # noqa: S301 (our own)
    assert copy.path(f"{web.url}/a.tar").read_bytes() == data
    assert (copy.max_bytes, copy.attempts, copy.timeout) == (MEGABYTE, 3, 60)


def test_prefetching_goes_on_in_the_background_two_at_a_time(cache: ShardCache, web: Web) -> None:
    shards = {f"{web.url}/{number}.tar": web.add(f"{number}.tar", 1000) for number in range(6)}
    answers = threading.Event()
    web.fault = lambda path: None if answers.wait(NEVER) else 503
    for shard in shards:
        cache.prefetch(shard)
        cache.prefetch(shard)
    waited_for(lambda: web.busy == 2)
    answers.set()
    waited_for(lambda: len(web.asked) >= 4)
    for shard, data in shards.items():
        assert cache.path(shard).read_bytes() == data
    assert len(web.asked) == 6
    assert web.busiest in (2, 3)  # the one waited for need not wait for its turn


def test_errors_of_prefetching_show_when_the_shard_is_wanted(cache: ShardCache, web: Web) -> None:
    cache.prefetch(f"{web.url}/a.tar")
    waited_for(lambda: web.asked)
    with pytest.raises(UserError, match=r"a\.tar is missing"):
        cache.path(f"{web.url}/a.tar")
    assert len(web.asked) == 1
    data = web.add("a.tar", 10)
    assert cache.path(f"{web.url}/a.tar").read_bytes() == data


def test_a_program_that_ends_does_not_wait_for_what_it_prefetches(cache: ShardCache, web: Web) -> None:
    web.add("a.tar", 1000)
    web.seconds = 2 * NEVER
    program = (
        "import sys; from pathlib import Path; from fuyu_e2e.data.shards.cache import ShardCache\n"
        "ShardCache(Path(sys.argv[1]), 10**6, timeout=1e6).prefetch(sys.argv[2])\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", program, cache.folder, f"{web.url}/a.tar"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as running:
        waited_for(lambda: web.asked)
        running.communicate(timeout=NEVER)
    assert running.returncode == 0
    assert len(web.asked) == 1


# Commands


def test_a_command_gives_a_shard(cache: ShardCache, tmp_path: Path) -> None:
    data = random.Random(0).randbytes(200_000)
    (tmp_path / "a.tar").write_bytes(data)
    shard = f"pipe:cat {tmp_path}/a.tar | cat; echo >> {tmp_path}/runs"
    assert cache.path(shard, 200_000, sha256(data)).read_bytes() == data
    assert cache.path(shard).read_bytes() == data
    assert (tmp_path / "runs").read_text() == "\n"


def test_a_command_that_fails_is_run_again_then_reported(cache: ShardCache, tmp_path: Path) -> None:
    shard = f"pipe:echo half; echo >> {tmp_path}/runs; echo first >&2; echo no such bucket >&2; exit 3"
    with pytest.raises(UserError, match=r"could not be fetched .*exit code 3: no such bucket"):
        cache.path(shard)
    assert (tmp_path / "runs").read_text() == "\n" * 4  # the first got further than nothing
    shard = f"pipe:echo whole; test -e {tmp_path}/hit || {{ touch {tmp_path}/hit; exit 1; }}"
    assert cache.path(shard).read_bytes() == b"whole\n"
    with pytest.raises(UserError, match=r"data\.cache_gigabytes"):
        cache.path("pipe:yes; sleep 60")


# Small files


def test_small_files_are_read_and_written(tmp_path: Path, web: Web) -> None:
    name = f"{tmp_path}/manifest.json"
    assert read_bytes(name) is None
    assert write_bytes(name, b"one")
    assert write_bytes(f"file://{name}", b"two")
    assert read_bytes(name) == read_bytes(f"file://{name}") == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert not write_bytes(f"{tmp_path}/gone/manifest.json", b"")
    assert not write_bytes(f"{name}/manifest.json", b"")
    with pytest.raises(UserError, match="can't be read"):
        read_bytes(str(tmp_path))
    url = f"{web.url}/manifest.json"
    assert read_bytes(url) is None
    assert not write_bytes(url, b"")
    assert not write_bytes("pipe:cat", b"")
    data = web.add("manifest.json", 3000)
    web.fault = lambda path: 503 if len(web.asked) < 4 else None
    assert read_bytes(url) == data
    web.fault = lambda path: 403
    assert read_bytes(url) is None
    web.fault = lambda path: 500
    with pytest.raises(UserError, match="HTTP 500"):
        read_bytes(url, attempts=2)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = tmp_path / "manifest.json"
    name.write_bytes(b"old")

    def fsync(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    assert not write_bytes(str(name), b"new")
    assert name.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


# S3


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A bucket of a store that only the environment names."""
    s3fs = pytest.importorskip("s3fs")
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "key",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"b{abs(hash(request.node.name))}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


def test_a_store_lists_gives_and_takes(bucket: str, cache: ShardCache) -> None:
    shards = [f"{bucket}/train/a-{number}.tar" for number in range(3)]
    for number, shard in enumerate(shards):
        assert write_bytes(shard, bytes([number]) * 1000)
    assert write_bytes(f"{bucket}/train/notes.md", b"")
    assert expand_patterns(f"{bucket}/train/*.tar") == tuple(shards)
    assert expand_patterns(f"{bucket}/train/") == tuple(shards)
    assert expand_patterns(f"{bucket}/tr*/a-[12].tar") == tuple(shards[1:])
    assert expand_patterns([f"{bucket}/train/a-{{2..1}}.tar", f"{bucket}/train/*"])[:3] == (*shards[1:], shards[0])
    others = pytest.importorskip("s3fs").S3FileSystem(skip_instance_cache=True)
    others.pipe_file(f"{bucket}/train/a-3.tar", b"")
    assert len(expand_patterns(f"{bucket}/train/*.tar")) == 4
    others.pipe_file(f"{bucket}/train/a-3.tar", b"now with content")
    # With the time-out that listing has, so that fsspec takes the same object, which remembers the list.
    assert ShardCache(cache.folder, MEGABYTE).path(f"{bucket}/train/a-3.tar").read_bytes() == b"now with content"
    with pytest.raises(UserError, match="matches no shard"):
        expand_patterns(f"{bucket}/valid/*.tar")
    assert write_bytes(f"{bucket}/train/a-4.tgz", b"")
    with pytest.raises(UserError, match=r"a-4\.tgz can't be read .* download it, unpack it with `gunzip a-4\.tgz`"):
        expand_patterns(f"{bucket}/train/")
    for number, shard in enumerate(shards):
        data = bytes([number]) * 1000
        assert cache.path(shard, 1000, sha256(data)).read_bytes() == data
        assert read_bytes(shard) == data
    assert len(files(cache)) == 4


def test_a_forked_process_asks_a_store_that_its_parent_asked(bucket: str, cache: ShardCache) -> None:
    for name in ("a", "b"):
        write_bytes(f"{bucket}/{name}.tar", name.encode())
    cache.path(f"{bucket}/a.tar")

    def fetch() -> None:
        assert expand_patterns(f"{bucket}/*.tar") == (f"{bucket}/a.tar", f"{bucket}/b.tar")
        assert cache.path(f"{bucket}/b.tar").read_bytes() == b"b"

    child = forked(fetch)
    child.join(NEVER)
    assert child.exitcode == 0


def test_what_a_store_lacks_is_reported_at_once(bucket: str, cache: ShardCache, waits: list[int]) -> None:
    for shard in (f"{bucket}/gone.tar", f"{bucket}-gone/a.tar"):
        with pytest.raises(UserError, match=r"\.tar is missing or may not be read"):
            cache.path(shard)
        assert read_bytes(shard) is None
    assert not waits
    assert not write_bytes(f"{bucket}-gone/a.tar", b"")


@pytest.mark.parametrize("replaced", [False, True])
def test_a_store_that_fails_is_asked_for_the_rest(
    bucket: str,
    cache: ShardCache,
    monkeypatch: pytest.MonkeyPatch,
    replaced: bool,
    waits: list[int],
    received: list[int],
) -> None:
    s3fs = pytest.importorskip("s3fs")
    data, other = random.Random(0).randbytes(10_000), random.Random(1).randbytes(10_000)
    write_bytes(f"{bucket}/a.tar", data)
    fetch_range, asked = s3fs.S3File._fetch_range, []

    def failing(self: Any, start: int, end: int) -> bytes:
        asked.append(start)
        if len(asked) % 4 == 0:
            raise ConnectionResetError("by peer")
        if len(asked) == 2 and replaced:
            write_bytes(f"{bucket}/a.tar", other)
        return fetch_range(self, start, end)

    monkeypatch.setattr(s3fs.S3File, "_fetch_range", failing)
    monkeypatch.setattr(downloads, "CHUNK", 1000)
    assert cache.path(f"{bucket}/a.tar").read_bytes() == (other if replaced else data)
    if not replaced:
        assert asked == [0, 1000, 2000, 3000, 3000, 4000, 5000, 6000, 6000, 7000, 8000, 9000, 9000]
        assert sum(received) == 10_000
    assert len(waits) >= 3


def test_a_store_that_never_answers_is_given_up(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with pytest.raises(UserError, match=r"could not be fetched .*[tT]imeout"):
            ShardCache(tmp_path, MEGABYTE, attempts=2, timeout=0.3).path("s3://bucket/a.tar")


# Runs


@pytest.fixture
def local(tmp_path: Path, tokenizer: Tokenizer, make_png: Callable[..., bytes]) -> FuyuDataModule:
    """Data of four small shards on this machine."""
    (tmp_path / "shards").mkdir()
    for shard in range(4):
        with webdataset.TarWriter(str(tmp_path / "shards" / f"{shard}.tar"), encoder=False) as writer:
            for number in range(12):
                text = f"picture {number} of {shard}".encode()
                writer.write({"__key__": f"{shard}-{number}", "png": make_png(8, 4 + number, shard), "txt": text})
    tokenizer.save(tmp_path / "tokenizer.model")
    data = remote(tmp_path, str(tmp_path / "shards"))
    assert data.stream_sources("train")
    return data


def remote(tmp_path: Path, train: str) -> FuyuDataModule:
    cache = str(tmp_path / "cache")
    return FuyuDataModule(
        str(tmp_path / "tokenizer.model"), 4, train=train, budget=128, lanes=4, shuffle=10, cache_dir=cache
    )


def rows(data: FuyuDataModule, workers: int) -> list[list[Any]]:
    loader = RowLoader(RowDataset(data.stream("train"), 0, 1), None, batch_size=None, num_workers=workers)
    return [[row.keys, row.batch.tokens.tolist(), row.batch.patches.tolist()] for row in islice(loader, 40)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_over_a_server_that_fails_at_random_has_the_same_batches(
    local: FuyuDataModule, tmp_path: Path, web: Web, workers: int
) -> None:
    for file in (tmp_path / "shards").iterdir():
        web.files[f"/{file.name}"] = file.read_bytes()
    chance = random.Random(0)

    def fault(path: str) -> Fault | None:
        if path.endswith(".json"):
            return None
        ends: list[Fault | None] = [
            503,
            429,
            ("drop", chance.randrange(9_000)),
            ("stall", chance.randrange(9_000)),
            None,
        ]
        return chance.choice(ends)

    web.fault = fault
    data = remote(tmp_path, f"{web.url}/{{0..3}}.tar")
    data.cache = ShardCache(tmp_path / "cache", MEGABYTE, attempts=40, timeout=0.2)
    assert rows(data, workers) == rows(local, 0)
    assert web.faults > 0
    assert len(files(data.cache)) == 4


class Throttled(BaseHTTPRequestHandler):
    """Passes requests on to a store, slowly, and says no to every third."""

    protocol_version = "HTTP/1.1"
    store = ""
    requests = refused = 0

    def pass_on(self) -> None:
        Throttled.requests += 1
        if Throttled.requests % 3 == 0:
            Throttled.refused += 1
            body = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>"
            self.answer(503, {"Content-Type": "application/xml"}, body)
            return
        request = Request(f"{self.store}{self.path}", headers=dict(self.headers.items()), method=self.command)
        try:
            with urlopen(request) as response:
                self.answer(response.status, dict(response.headers.items()), response.read())
        except HTTPError as error:
            self.answer(error.code, dict(error.headers.items()), error.read())

    do_GET = do_HEAD = pass_on  # noqa: N815

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "content-length", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        length = headers.get("Content-Length", str(len(body))) if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            for start in range(0, len(body), 4_096):
                time.sleep(0.005)
                self.wfile.write(body[start : start + 4_096])

    def log_message(self, *_: Any) -> None:
        """Not on stderr."""


def test_a_throttled_store_is_streamed(
    local: FuyuDataModule,
    tmp_path: Path,
    bucket: str,
    s3_server: str,
    monkeypatch: pytest.MonkeyPatch,
    waits: list[int],
) -> None:
    for file in (tmp_path / "shards").iterdir():
        write_bytes(f"{bucket}/{file.name}", file.read_bytes())
    found = expand_patterns(f"{bucket}/*.tar")
    with ThreadingHTTPServer(("127.0.0.1", 0), Throttled) as server:
        server.daemon_threads = True
        Throttled.store = s3_server
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        data = remote(tmp_path, "")
        data.patterns["train"] = list(found)
        assert rows(data, 0) == rows(local, 0)
        assert Throttled.refused > 3
        assert waits
        server.shutdown()
        thread.join()
