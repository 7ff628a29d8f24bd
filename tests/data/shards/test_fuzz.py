"""Whatever is in a shard, reading it ends, runs nothing, stays small, and leaves every document used or counted.

Small valid shards of every format are damaged in ways that have names below, each from a seed, so that a failure says
which mutant to make again: `mutant("sizes in binary", 17, originals)`. The usual run takes the first few of each kind;
`FUYU_FUZZ=10000 pytest tests/data/shards/test_fuzz.py -s` takes ten thousand in all and shows what became of them.
"""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.data.shards.cache import ShardCache
from fuyu_e2e.data.shards.manifest import Manifest, ShardFacts, verify
from fuyu_e2e.data.shards.mixture import Source
from fuyu_e2e.data.shards.open_shards import OpenShards
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.data.shards.stream import Lane, Stream, StreamSource
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UnusableSampleError, UserError
from fuyu_e2e.model.image_layout import ImagePolicy

BLOCK = 512
MUTANTS = 15
"""Of each kind in the usual run."""
MORE = int(os.environ.get("FUYU_FUZZ", "0"))
"""Of all kinds together in the long run."""
CPU_SECONDS = 10
"""Of one mutant, which usually takes a hundredth of one; above it hangs."""
MEMORY = 2**29
"""Bytes that a mutant may add to those of the process."""

Members = list[tuple[str, bytes]]

# Shards to damage.


@dataclass(frozen=True)
class Original:
    """A valid shard, in a folder with its manifest."""

    kind: str
    members: Members
    data: bytes
    path: Path
    facts: ShardFacts
    headers: list[int]
    """Where the headers of its members are, those of long names included."""


def picture(rng: random.Random, file_format: str) -> bytes:
    file = io.BytesIO()
    shape = rng.randint(3, 24), rng.randint(3, 24), 3
    pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, shape, np.uint8)
    Pillow.fromarray(pixels).save(file, file_format, quality=80)
    return file.getvalue()


def sample(kind: str, key: str, rng: random.Random) -> Members:
    words = "".join(rng.choice("abc 019é?\n") for _ in range(rng.randint(3, 60))) + "x"
    turns = [{"from": "human", "value": f"<image>\n{words}"}, {"from": "gpt", "value": "yes"}]
    described: dict[str, Any] = {
        "json": {"caption": words, "url": "http://x", "width": 3},
        "chat": {"conversations": turns},
        "interleaved": {"segments": [{"text": words}, {"image": "a.png"}, {"text": "so", "loss": False}]},
    }.get(kind, {})
    text = json.dumps(described).encode()
    return {
        "jpg": lambda: [(f"{key}.jpg", picture(rng, "JPEG")), (f"{key}.txt", words.encode())],
        "png": lambda: [(f"{key}.png", picture(rng, "PNG")), (f"{key}.txt", words.encode())],
        "webp": lambda: [(f"{key}.webp", picture(rng, "WEBP")), (f"{key}.txt", words.encode())],
        "json": lambda: [(f"{key}.jpeg", picture(rng, "JPEG")), (f"{key}.json", text)],
        "chat": lambda: [(f"{key}.png", picture(rng, "PNG")), (f"{key}.json", text)],
        "interleaved": lambda: [(f"{key}.a.png", picture(rng, "PNG")), (f"{key}.json", text)],
        "txt": lambda: [(f"{key}.txt", words.encode())],
        "jsonl": lambda: [(f"{key}.jsonl", b"".join(b'{"text": "line %d"}\n' % line for line in range(3)))],
    }[kind]()


KINDS = ("jpg", "png", "webp", "json", "chat", "interleaved", "txt", "jsonl")


def packed(members: Members, tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ShardCache:
    return ShardCache(tmp_path_factory.mktemp("cache"), 10**9)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory, cache: ShardCache) -> list[Original]:
    rng = random.Random(0)
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    made = {kind: [sample(kind, f"{kind}/{number}", rng) for number in range(4)] for kind in KINDS}
    made["all"] = [sample(kind, f"{kind}ä" * 30, rng) for kind in KINDS]  # long names have headers of their own
    found = []
    for number, (kind, samples) in enumerate(made.items()):
        members = [member for sample in samples for member in sample]
        data = packed(members, formats[(number + 2) % 3])
        path = tmp_path_factory.mktemp(kind) / "shard.tar"
        path.write_bytes(data)
        facts = ShardFacts.of(path)
        assert not facts.unusable
        Manifest(str(path.parent), {path.name: facts}).save(cache)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            headers = sorted({at for info in tar for at in (info.offset, info.offset_data - BLOCK)})
        found.append(Original(kind, members, data, path, facts, headers))
    return found


# Ways to damage the bytes of a shard.

Mutate = Callable[[Original, random.Random], bytes]
FAMILIES: dict[str, Mutate] = {}


def family(name: str) -> Callable[[Mutate], Mutate]:
    def add(mutate: Mutate) -> Mutate:
        FAMILIES[name] = mutate
        return mutate

    return add


def one(rng: random.Random, *choices: Any) -> Any:
    return rng.choice(choices)


@family("bits flipped")
def _(original: Original, rng: random.Random) -> bytes:
    data = bytearray(original.data)
    for _ in range(rng.randint(1, 12)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


@family("runs of bytes overwritten")
def _(original: Original, rng: random.Random) -> bytes:
    data = bytearray(original.data)
    for _ in range(rng.randint(1, 3)):
        start, length = rng.randrange(len(data)), rng.randint(1, 700)
        run = one(rng, bytes(length), b"\xff" * length, rng.randbytes(length))
        data[start : start + length] = run[: len(data) - start]
    return bytes(data)


@family("cut")
def _(original: Original, rng: random.Random) -> bytes:
    at = rng.randrange(len(original.data))
    return original.data[: at // BLOCK * BLOCK if rng.random() < 0.4 else at]


def blocks(data: bytes) -> list[bytes]:
    return [data[start : start + BLOCK] for start in range(0, len(data), BLOCK)]


@family("blocks removed, repeated, exchanged")
def _(original: Original, rng: random.Random) -> bytes:
    listed = blocks(original.data)
    for _ in range(rng.randint(1, 3)):
        a, b = rng.randrange(len(listed)), rng.randrange(len(listed))
        match rng.randrange(4):
            case 0:
                del listed[a : a + rng.randint(1, 3)]
                listed = listed or [bytes(BLOCK)]
            case 1:
                listed[b:b] = listed[a : a + rng.randint(1, 3)]
            case 2:
                listed[a], listed[b] = listed[b], listed[a]
            case 3:
                listed[a:a] = [bytes(BLOCK)] * rng.randint(1, 3)
    return b"".join(listed)


@family("bytes inserted or lost")
def _(original: Original, rng: random.Random) -> bytes:
    at = rng.randrange(len(original.data))
    put = rng.randbytes(rng.randint(0, 3 * BLOCK))
    return original.data[:at] + put + original.data[at + one(rng, 0, rng.randint(1, 600)) :]


@family("archives in, after and around archives")
def _(original: Original, rng: random.Random) -> bytes:
    data = original.data
    return one(
        rng,
        data + data,
        data.rstrip(b"\0") + data,
        packed([("0.tar", data), ("0.txt", b"a"), ("1.jpg", data), ("1.txt", data)]),
        data + rng.randbytes(rng.randint(1, 5_000)),
        data[rng.randint(1, 4) * BLOCK :],
        gzip.compress(data),
        bz2.compress(data),
        lzma.compress(data),
        b"PK\3\4" + data,
        b"",
        bytes(rng.randint(1, 5) * BLOCK),
    )


# Ways to damage headers, whose checksums are right again.

FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "uid": (108, 8),
    "gid": (116, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "checksum": (148, 8),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "major": (329, 8),
    "prefix": (345, 155),
}


def sealed(header: bytes | bytearray) -> bytes:
    counted = bytearray(header)
    counted[148:156] = b" " * 8
    counted[148:156] = b"%06o\0 " % sum(counted)
    return bytes(counted)


def changed(header: bytes, fields: dict[str, bytes]) -> bytes:
    data = bytearray(header)
    for name, value in fields.items():
        start, length = FIELDS[name]
        data[start : start + length] = value[:length].ljust(length, b"\0")
    return bytes(data) if "checksum" in fields else sealed(data)


def with_header(original: Original, rng: random.Random, fields: dict[str, bytes]) -> bytes:
    at = rng.choice(original.headers)
    header = changed(original.data[at : at + BLOCK], fields)
    return original.data[:at] + header + original.data[at + BLOCK :]


def member(name: bytes, data: bytes, kind: bytes = b"0", size: bytes | None = None) -> bytes:
    """A header and its data."""
    number = b"%011o" % len(data) if size is None else size
    mode = b"0000644"
    header = changed(bytes(BLOCK), {"name": name, "mode": mode, "size": number, "type": kind, "magic": b"ustar\x0000"})
    return header + data + bytes(-len(data) % BLOCK)


def put(original: Original, rng: random.Random, members: bytes) -> bytes:
    """The shard with something before one of its members."""
    at = rng.choice(original.headers)
    return original.data[:at] + members + original.data[at:]


def binary(number: int) -> bytes:
    """A number as GNU tar writes the ones that are too large, or negative."""
    return (number + (0x80 << 88 if number >= 0 else 1 << 96)).to_bytes(12, "big")


@family("sizes in digits")
def _(original: Original, rng: random.Random) -> bytes:
    number = one(rng, 0, 1, 511, 513, 2**20, 2**31, 2**32 + 1, 8**11 - 1, rng.randrange(20_000), rng.randrange(8**11))
    digits = b"%011o\0" % number
    garbage = one(rng, bytes(12), b" " * 12, b"12 34", b"9" * 12, b"-0000000777", b"0x10", rng.randbytes(12))
    return with_header(original, rng, {"size": one(rng, digits, digits, garbage)})


@family("sizes in binary")
def _(original: Original, rng: random.Random) -> bytes:
    size = one(rng, 2 ** rng.randrange(88), rng.randrange(2**30), BLOCK * rng.randint(1, 60), rng.randrange(2_000))
    return with_header(original, rng, {"size": binary(one(rng, size, -size))})


@family("other fields")
def _(original: Original, rng: random.Random) -> bytes:
    name = rng.choice(sorted(FIELDS.keys() - {"size", "type"}))
    length = FIELDS[name][1]
    value = one(rng, b"", b"7" * length, b"/" * length, b"\xff" * length, rng.randbytes(length), binary(-1))
    return with_header(original, rng, {name: value})


@family("types: links, folders, devices, unknown ones")
def _(original: Original, rng: random.Random) -> bytes:
    link = one(rng, b"", b"/etc/passwd", b"../../x", b"jpg/0.jpg")
    kind = one(rng, b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"\0", b"D", b"M", b"N", b"V", b"A", rng.randbytes(1))
    if kind in (b"S", b"x", b"X", b"g", b"L", b"K"):
        kind = b"2"
    return with_header(original, rng, {"type": kind, "link": link})


@family("types of headers that speak of the next")
def _(original: Original, rng: random.Random) -> bytes:
    return with_header(original, rng, {"type": one(rng, b"x", b"X", b"g", b"L", b"K", b"S")})


@family("sparse files")
def _(original: Original, rng: random.Random) -> bytes:
    size = one(rng, 0, 100, 2**24, 2**31, 2**36, 2**62, 2**70, -1, -512)
    name = one(rng, b"s.txt", b"s.jsonl", b"s.jpg", b"s.json")
    if rng.random() < 0.5:
        header = bytearray(member(name, b"some data", b"S"))
        pieces = b"".join(b"%011o\0%011o\0" % (rng.randrange(2_000), rng.randrange(9)) for _ in range(4))
        header[386:482] = pieces
        header[482] = one(rng, 0, 0, 1)
        header[483:495] = binary(size)
        return put(original, rng, sealed(header[:BLOCK]) + header[BLOCK:])
    records = one(
        rng,
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": size},
        {"GNU.sparse.size": size, "GNU.sparse.numblocks": 1, "GNU.sparse.offset": 0, "GNU.sparse.numbytes": 5},
        {"GNU.sparse.map": f"0,5,{size},0", "GNU.sparse.size": size},
        {"GNU.sparse.realsize": size},
        {"GNU.sparse.name": "/etc/passwd", "GNU.sparse.map": "a,b"},
    )
    return put(original, rng, pax(records) + member(name, one(rng, b"1\n0\n5\nhello", b"hello", b"999999999\n0\n")))


def pax(records: dict[str, Any], kind: bytes = b"x") -> bytes:
    lines = [f" {name}={value}\n".encode(errors="surrogatepass") for name, value in records.items()]
    return member(b"pax", b"".join(str(len(line) + len(str(len(line) + 3))).encode() + line for line in lines), kind)


@family("extended headers")
def _(original: Original, rng: random.Random) -> bytes:
    size = one(rng, 0, 1, 513, 2**31, 2**62, 2**70, -1, -512, -rng.randrange(10**5), "x", "9" * 5_000)
    told = one(
        rng,
        pax({"size": size}),
        pax({"path": one(rng, "/etc/passwd", "../x.txt", "a\0b.txt", "é" * 9_000, "", "a.txt", "\ud800.txt")}),
        pax({"path": "one.txt", "hdrcharset": one(rng, "BINARY", "klingon")}),
        pax({"mtime": one(rng, "nan", "1e999", "x"), "uid": "9" * 99}),
        member(
            b"pax", one(rng, b"0 path=x\n", b"3 path=x\n", b"99999 path=x\n", b"1" * 5_000, rng.randbytes(600)), b"x"
        ),
        member(b"pax", b"12 path=abc\n", b"x", size=one(rng, b"77777777777", b"0", b"00000001000", b"x")),
    )
    if rng.random() < 0.3:
        told = told[:156] + b"g" + told[157:]
        told = sealed(told[:BLOCK]) + told[BLOCK:]
    return put(original, rng, told)


@family("extended headers that take a regular expression long to read")
def _(original: Original, rng: random.Random) -> bytes:
    return put(original, rng, member(b"pax", one(rng, b"1", b"1 ") * 200_000, one(rng, b"x", b"g")))


@family("long names")
def _(original: Original, rng: random.Random) -> bytes:
    name = one(rng, b"", b"a" * 100_000 + b".txt", b"/" * 300, b"a.txt", rng.randbytes(700), b"../" * 200 + b".txt")
    size = one(rng, None, None, b"0", b"77777777777", b"00000001000", b"x", binary(2**70))
    return put(original, rng, member(b"././@LongLink", name, one(rng, b"L", b"K"), size=size))


@family("chains of headers that speak of the next")
def _(original: Original, rng: random.Random) -> bytes:
    link = one(rng, member(b"././@LongLink", b"a.txt", one(rng, b"L", b"K")), pax({"path": "a.txt"}))
    return put(original, rng, link * one(rng, 2, 30, 2_000))


def gzip_and_tar(inner: bytes) -> bytes:
    """A member that is a gzip file from its header on, which hides in the name of gzip's own."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = deflate.compress(inner) + deflate.flush() + struct.pack("<II", zlib.crc32(inner), len(inner))
    header = bytearray(b"a" * (BLOCK - 1) + b"\0")
    header[:8] = b"\x1f\x8b\x08\x08.txt"
    header[100:156] = b"00000644" + b"0" * 16 + b"%011o " % len(data) + b"0" * 11 + b" " * 9
    header[156] = ord("0")
    header[329:345] = b"0" * 16
    header[148:156] = b"%06o  " % sum(header)
    return bytes(header) + data + bytes(-len(data) % BLOCK)


@family("members that are archives from their headers on")
def _(original: Original, rng: random.Random) -> bytes:
    hidden = one(rng, original.data, packed([("hidden.txt", b"a" * 2 ** rng.randint(1, 24))]))
    return put(original, rng, gzip_and_tar(hidden))


# Ways to damage members, in archives that are whole.


def some_member(original: Original, rng: random.Random, *extensions: str) -> int:
    """The number of a member with one of the extensions; any, where there is none."""
    fitting = [n for n, (name, _) in enumerate(original.members) if name.endswith(extensions or ("",))]
    return rng.choice(fitting or range(len(original.members)))


def with_member(original: Original, number: int, name: str | None = None, data: bytes | None = None) -> bytes:
    members = list(original.members)
    known = members[number]
    members[number] = (known[0] if name is None else name, known[1] if data is None else data)
    return packed(members)


NAMES = (
    "/etc/passwd.txt",
    "../../x.txt",
    "a/../../x.txt",
    "a/./b.txt",
    "//x.txt",
    "..",
    ".",
    "",
    ".txt",
    "..txt",
    "x.",
    "x",
    "x/",
    "a\\..\\b.txt",
    "C:\\x.txt",
    "~/x.txt",
    "$(touch HIT).txt",
    "a\0b.txt",
    "a\nb.txt",
    "\u202etxt.gpj",
    "ｅ\u0301.txt",
    "\udcff\udc80.jpg",
    "\x1b[2J.txt",
    "__meta__",
    "__a__/b.txt",
    "a/__b__.txt",
    "x" * 254 + ".txt",
    "d/" * 4_000 + "x.txt",
    "x." + "y" * 5_000,
    "x" + ".txt" * 3_000,
    "x.TXT",
    "x.jpg.txt",
    "x.txt.jpg",
    "x.json",
    "x.jsonl",
    "x.Json",
    "CON.txt",
)


@family("names")
def _(original: Original, rng: random.Random) -> bytes:
    mutated = original
    for _ in range(rng.randint(1, 3)):
        number = some_member(mutated, rng)
        stem, _, extension = mutated.members[number][0].partition(".")
        name = one(rng, rng.choice(NAMES), f"{rng.choice(NAMES)}.{extension}", f"{stem}.{rng.choice(NAMES)}")
        members = list(mutated.members)
        members[number] = (name, members[number][1])
        mutated = Original(original.kind, members, b"", original.path, original.facts, [])
    return packed(mutated.members)


@family("members lost, repeated, exchanged")
def _(original: Original, rng: random.Random) -> bytes:
    members = list(original.members)
    for _ in range(rng.randint(1, 4)):
        a, b = rng.randrange(len(members)), rng.randrange(len(members))
        match rng.randrange(5):
            case 0 if len(members) > 1:
                del members[a]
            case 1:
                members.insert(b, members[a])
            case 2:
                members[a], members[b] = members[b], members[a]
            case 3:
                members[a], members[b] = (members[a][0], members[b][1]), (members[b][0], members[a][1])
            case 4:
                members[a] = (members[a][0], b"")
    return packed(members)


class Touches:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch HIT",)


CODE = pickle.dumps(Touches())


@family("members that are code")
def _(original: Original, rng: random.Random) -> bytes:
    members = list(original.members)
    stem = rng.choice(members)[0].partition(".")[0]
    for _ in range(rng.randint(1, 4)):
        extension = one(rng, "pyd", "pkl", "pickle", "pth", "pt", "py", "npy", "npz", "tb", "mp", "cbor", "exe", "jpg")
        members.insert(rng.randrange(len(members) + 1), (f"{stem}.{extension}", CODE))
    return packed(members)


IMAGES = (".jpg", ".jpeg", ".png", ".webp")


@family("images damaged")
def _(original: Original, rng: random.Random) -> bytes:
    number = some_member(original, rng, *IMAGES)
    data = bytearray(original.members[number][1])
    match rng.randrange(4):
        case 0:
            data = data[: rng.randrange(len(data))]
        case 1:
            for _ in range(rng.randint(1, 20)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 2:
            at = rng.randrange(len(data))
            data[at : at + rng.randint(1, 40)] = rng.randbytes(rng.randint(0, 40))
        case 3:
            for _ in range(rng.randint(1, 4)):  # where headers are
                data[rng.randrange(min(40, len(data)))] = rng.randrange(256)
    return with_member(original, number, data=bytes(data))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rng: random.Random, width: int, height: int, *before: bytes) -> bytes:
    depth, colour = one(rng, (8, 0), (16, 0), (1, 0), (8, 2), (8, 3), (8, 4), (16, 6), (3, 7), (255, 255))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, one(rng, 0, 0, 1, 9)))
    rows = zlib.compress(bytes(rng.randrange(10**6)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@family("images of lying headers")
def _(original: Original, rng: random.Random) -> bytes:
    number = some_member(original, rng, *IMAGES)
    data = bytearray(original.members[number][1])
    sides = (0, 1, 2, 300, 600, 4_000, 20_000, 65_535)
    width, height = rng.choice(sides), rng.choice(sides)
    if data[:2] == b"\xff\xd8":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    elif data[:4] == b"\x89PNG":
        data = bytearray(png(rng, one(rng, width, 2**31 - 1, 2**32 - 1), height))
    else:
        data[26:30] = struct.pack("<HH", width, height)
        if rng.random() < 0.5:
            extended = b"VP8X" + struct.pack("<I", 10) + rng.randbytes(1) + bytes(3) + rng.randbytes(6)
            data[12:12] = extended
    return with_member(original, number, data=bytes(data))


@family("images that are something else, or more")
def _(original: Original, rng: random.Random) -> bytes:
    number = some_member(original, rng, *IMAGES)
    data = original.members[number][1]
    small = Pillow.new("RGB", (9, 9), "red")

    def other(file_format: str) -> bytes:
        file = io.BytesIO()
        small.save(file, file_format)
        return file.getvalue()

    bomb = zlib.compress(bytes(5 * 10**6), 9)
    profile, comment = chunk(b"iCCP", b"a\0\0" + bomb), chunk(b"zTXt", b"a\0\0" + bomb)
    exif = b"Exif\0\0" + one(rng, b"MM\0*", b"II*\0", b"") + rng.randbytes(rng.randint(0, 200))
    marker = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    other_data = one(
        rng,
        other(one(rng, "BMP", "GIF", "TIFF", "ICO", "PDF", "EPS", "PPM", "TGA")),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(HIT) (w) file closefile\n%%EOF\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        data + original.data,
        original.data + data,
        data + CODE,
        data * 2,
        b"\x89PNG\r\n\x1a\n" + data,
        data[:2] + marker + data[2:],
        png(rng, 9, 9, one(rng, profile, comment, chunk(b"eXIf", exif[6:]), chunk(b"tRNS", rng.randbytes(5)))),
        png(rng, 9, 9, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), chunk(b"fcTL", rng.randbytes(26))),
        b"RIFF" + struct.pack("<I", 2**32 - 1) + b"WEBPVP8L" + rng.randbytes(40),
        CODE,
        b"",
        bytes(100),
    )
    return with_member(original, number, data=other_data)


VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "\0",
    "\ufeff",
    "<image>",
    "<image>" * 50,
    "</s>|SPEAKER||NEWLINE|<0x04>",
    "▁",
    "a" * 20_000,
    [],
    [[]],
    {},
    {"from": "gpt", "value": "a"},
    {"image": "a.png"},
    {"text": "a", "image": "a.png"},
    ["a", {"text": 3}],
)


def replaced(tree: Any, value: Any, rng: random.Random) -> Any:
    """A copy with one of its nodes, or keys, exchanged."""
    if rng.random() < 0.2 or not isinstance(tree, dict | list) or not tree:
        return value
    if isinstance(tree, list):
        at = rng.randrange(len(tree))
        return [*tree[:at], replaced(tree[at], value, rng), *tree[at + one(rng, 0, 1) :]]
    key = rng.choice(sorted(tree))
    kept = {name: inner for name, inner in tree.items() if name != key or rng.random() < 0.8}
    if rng.random() < 0.2:
        return kept | {one(rng, "caption", "conversations", "segments", "text", str(value)[:20]): value}
    return kept | {key: replaced(tree[key], value, rng)}


def with_json(original: Original, rng: random.Random, value: Any) -> bytes:
    number = some_member(original, rng, ".json", ".jsonl")
    name, data = original.members[number]
    lines = data.splitlines() if name.endswith("l") else [data]
    at = rng.randrange(len(lines))
    described = {"caption": "a"}
    with suppress(ValueError):
        described = json.loads(lines[at])
    lines[at] = json.dumps(replaced(described, value, rng)).encode()
    name = name if name.endswith(("json", "jsonl")) else name.partition(".")[0] + ".json"
    return with_member(original, number, name, b"\n".join(lines))


@family("JSON of other values")
def _(original: Original, rng: random.Random) -> bytes:
    return with_json(original, rng, rng.choice(VALUES))


@family("JSON with half of a surrogate pair")
def _(original: Original, rng: random.Random) -> bytes:
    return with_json(original, rng, one(rng, "\ud800", "a\udfff b", "\udcff.png", {"\ud800": 1}))


@family("JSON damaged")
def _(original: Original, rng: random.Random) -> bytes:
    number = some_member(original, rng, ".json", ".jsonl")
    name, data = original.members[number]
    name = name if name.endswith(("json", "jsonl")) else name.partition(".")[0] + ".json"
    at = rng.randrange(len(data))
    text = data.decode(errors="replace")
    damaged = one(
        rng,
        data[:at],
        data[:at] + rng.randbytes(rng.randint(1, 5)) + data[at + 1 :],
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"caption": "a", "n": ' + b"9" * one(rng, 4_000, 5_000, 100_000) + b"}",
        b'{"caption": "a", "n": 1e999999}',
        b'{"caption": "a", "caption": 3}',
        b'{"caption": NaN}',
        b'{"text": -Infinity}',
        text.encode("utf-16"),
        b"\xef\xbb\xbf" + data,
        b"\xff" + data,
        data.replace(b" ", b"\n"),
        data.replace(b'"', b"'"),
        data + data,
        b"null",
        b'"text"',
        b"",
    )
    return with_member(original, number, name, damaged)


@family("text")
def _(original: Original, rng: random.Random) -> bytes:
    number = some_member(original, rng, ".txt")
    name, data = original.members[number]
    name = name.partition(".")[0] + ".txt"
    at = rng.randrange(len(data) + 1)
    broken = one(rng, b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\0", b"\xef\xbb\xbf")
    text = one(
        rng,
        data[:at] + broken + data[at:],
        broken,
        b"",
        b"\r\n\t \xe3\x80\x80",
        "▁ </s> <s> |SPEAKER| <0x04> <image>".encode(),
        b"e" + "\u0301".encode() * 5_000,
        rng.randbytes(rng.randint(1, 300)),
        "🤷🏽\u200d♀\ufe0f".encode()[: rng.randint(1, 17)],
        b"a" * 100_000,
    )
    return with_member(original, number, name, text)


@family("several at once")
def _(original: Original, rng: random.Random) -> bytes:
    data = FAMILIES[one(rng, "names", "images damaged", "JSON damaged", "text")](original, rng)
    mutated = Original(original.kind, original.members, data, original.path, original.facts, original.headers)
    return FAMILIES[one(rng, "bits flipped", "cut", "bytes inserted or lost", "sizes in digits")](mutated, rng)


def mutant(name: str, seed: int, originals: Sequence[Original]) -> tuple[Original, bytes]:
    """A damaged shard, and what it was."""
    rng = random.Random(f"{name}/{seed}")
    original = rng.choice(originals)
    return original, FAMILIES[name](original, rng)


# Bounds.


class HangError(BaseException):
    """Not an exception, so that nobody takes it for an image that can't be read."""


FORBIDDEN = {
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "ctypes.dlopen"),
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"),
    *("socket.connect", "socket.getaddrinfo", "urllib.Request"),
}
_watching = False
_caught: list[str] = []


def _watch(event: str, args: tuple) -> None:
    if _watching and (event in FORBIDDEN or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))):
        _caught.append(f"{event} {args!r}")


@pytest.fixture(scope="module", autouse=True)
def _watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing may run, and no file may be written."""
    sys.addaudithook(_watch)  # there for good, so it looks at nothing unless a mutant is read
    Pillow.init()
    before, writes_bytecode = Path.cwd(), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    os.chdir(folder := tmp_path_factory.mktemp("nothing"))
    yield
    os.chdir(before)
    sys.dont_write_bytecode = writes_bytecode
    assert not list(folder.iterdir())


@contextmanager
def bounded() -> Iterator[None]:
    """Ends what hangs, grows, or does anything but read."""

    def hang(*_: Any) -> None:
        raise HangError

    global _watching
    limits = resource.getrlimit(resource.RLIMIT_AS)
    # The second is for what waits, for a pipe say, and so takes no time of the processor.
    timers = {
        signal.ITIMER_PROF: (signal.SIGPROF, CPU_SECONDS),
        signal.ITIMER_REAL: (signal.SIGALRM, 20 * CPU_SECONDS),
    }
    handlers = {kind: signal.signal(kind, hang) for kind, _ in timers.values()}
    _caught.clear()
    try:
        for timer, (_, seconds) in timers.items():
            signal.setitimer(timer, seconds)
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (_memory(0) + MEMORY, limits[1]))
        _watching = True
        yield
    finally:
        _watching = False
        for timer in timers:
            signal.setitimer(timer, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
    assert not _caught


def _memory(column: int) -> int:
    """Bytes of the process: 0 all that it may touch, 1 what it holds."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[column]) * resource.getpagesize()


# Laws.


@dataclass(frozen=True)
class Reader:
    builder: SequenceBuilder
    cache: ShardCache

    def read(self, path: Path) -> SampleStats:
        """All that a shard holds as sequences, in stored order."""
        stats = SampleStats()
        for document in read_documents(path, stats):
            try:
                assert len(self.builder.build(document)) > 0
                stats.used += 1
            except UnusableSampleError as error:
                stats.skip(error)
        assert stats.read == stats.used + stats.skipped.total()
        assert stats.skipped.keys() == stats.examples.keys()
        return stats

    def once(self, original: Original) -> None:
        """A pass of two lanes, as validation makes it, by the manifest of the whole shard."""
        total = SampleStats()
        for lane in self._lanes(original, shuffle=0):
            while (row := lane.next_row()) is not None:
                assert len(row.batch.tokens) == self.BUDGET
                total.add(row.stats)
            assert not lane.state.waiting
            total.add(lane.stats)
        assert total.read == original.facts.documents
        assert total.read == total.used + total.skipped.total()

    def endless(self, original: Original) -> None:
        """Some rows of two lanes, as training draws them."""
        for lane in self._lanes(original, shuffle=3):
            total, rows = SampleStats(), 0
            for row in itertools.islice(iter(lane.next_row, None), 3):
                assert row is not None
                total.add(row.stats)
                rows += 1
                assert total.read == total.used + total.skipped.total() + len(lane.state.waiting)
            assert rows == 3

    BUDGET = 64

    def _lanes(self, original: Original, shuffle: int) -> list[Lane]:
        opened = OpenShards(self.cache)
        return [Lane(self.stream(original, shuffle), number, opened) for number in range(2)]

    def stream(self, original: Original, shuffle: int) -> Stream:
        shards = (str(original.path),)
        source = StreamSource(name="train", source=Source(list(shards)), shards=shards, facts=(original.facts,))
        return Stream(
            sources=(source,),
            cache=self.cache,
            builder=self.builder,
            budget=self.BUDGET,
            long_documents="cut",
            lanes=2,
            shuffle=shuffle,
        )

    def verified(self, original: Original) -> bool:
        """Whether `verify` finds the shard to be what its manifest says."""
        shards = [str(original.path)]
        return not verify(shards, shards, self.cache)


@pytest.fixture(scope="module")
def reader(tokenizer: Tokenizer, cache: ShardCache) -> Reader:
    policy = ImagePolicy(patch_size=4, max_patches=64, max_pixels=2**20)
    return Reader(SequenceBuilder(tokenizer, policy), cache)


NO_TAR = "is not a tar file"
NOTHING = "finds no usable document"
MORE_THAN_SAID = "but its manifest says"


def endure(name: str, seeds: range, originals: list[Original], reader: Reader) -> SampleStats:
    """Reads the mutants of a family in all ways; gives what became of their documents."""
    total = SampleStats()
    for seed in seeds:
        original, data = mutant(name, seed, originals)
        original.path.write_bytes(data)
        try:
            with bounded():
                total.add(_endure_one(original, data, seed, reader))
        except (Exception, HangError) as error:
            raise AssertionError(f"mutant({name!r}, {seed}, originals): {error!r}") from error
    return total


def _endure_one(original: Original, data: bytes, seed: int, reader: Reader) -> SampleStats:
    stats, no_tar = SampleStats(), False
    try:
        stats = reader.read(original.path)
    except UserError as error:
        if not (no_tar := NO_TAR in str(error)):
            raise
        stats.skipped["(no tar)"] += 1
    with _raises_user_error(NO_TAR if no_tar else None):
        assert ShardFacts.of(original.path).documents == stats.read
    more = stats.read > original.facts.documents
    expected = NO_TAR if no_tar else MORE_THAN_SAID if more else None
    if seed % 3 == 0:
        with _raises_user_error(expected):
            reader.once(original)
    elif seed % 3 == 1:
        with _raises_user_error(expected, allowed=NOTHING):
            reader.endless(original)
    else:
        assert reader.verified(original) == (data == original.data)
    return stats


@contextmanager
def _raises_user_error(expected: str | None, allowed: str | None = None) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if (expected or allowed or "no error at all") not in str(error):
            raise
    else:
        assert expected is None, f"no error says {expected!r}"


def test_the_bounds_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    breaches: list[Callable[[], Any]] = [
        lambda: os.system("true"),
        lambda: (tmp_path / "file").write_bytes(b""),
        lambda: pickle.loads(pickle.dumps(Path)),  # noqa: S301
    ]
    for breach in breaches:
        with pytest.raises(AssertionError), bounded():
            breach()
    monkeypatch.setattr(f"{__name__}.CPU_SECONDS", 0.05)
    with pytest.raises(HangError), bounded():
        any(number < 0 for number in itertools.count())
    if sys.platform == "linux":
        with pytest.raises(MemoryError), bounded():
            bytes(2 * MEMORY)


@pytest.mark.parametrize("name", FAMILIES)
def test_damaged_shards_cost_what_is_damaged_and_nothing_else(
    name: str, originals: list[Original], reader: Reader
) -> None:
    held = _memory(1)
    total = endure(name, range(MUTANTS), originals, reader)
    assert _memory(1) - held < 200 * 2**20
    assert total.used >= MUTANTS / 2, "much of what the shards held is still read"
    assert total.skipped, "and some of it isn't"


@pytest.mark.parametrize("original", range(len(KINDS) + 1))
def test_every_cut_is_reported_against_the_manifest(original: int, originals: list[Original], reader: Reader) -> None:
    shard = originals[original]
    ends = {*range(0, len(shard.data), BLOCK), *(at + 1 for at in shard.headers), len(shard.data) - 1}
    assert len(ends) > 10
    for end in sorted(ends)[:: max(1, len(ends) // 20)]:
        shard.path.write_bytes(shard.data[:end])
        assert not reader.verified(shard)
    shard.path.write_bytes(shard.data)
    assert reader.verified(shard)


def test_a_pass_counts_what_every_lane_skipped(tmp_path: Path, reader: Reader) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(packed([("0.txt", b"a"), ("1.txt", b"b"), ("2.txt", b""), ("3.txt", b"")]))
    whole = Original("txt", [], b"", path, ShardFacts.of(path), [])
    total = SampleStats()
    for row in reader.stream(whole, shuffle=0).rows():
        total.add(row.stats)
    assert total.read == 4


def test_a_member_that_is_also_gzip_is_what_tar_says(tmp_path: Path) -> None:
    path, stats = tmp_path / "shard.tar", SampleStats()
    hidden = gzip_and_tar(packed([("hidden.txt", b"a" * 10**6)]))
    path.write_bytes(packed([("0.txt", b"a")])[: 2 * BLOCK] + hidden + packed([("1.txt", b"b")]))
    assert path.stat().st_size < 20_000
    assert [document.key for document in read_documents(path, stats)] == ["0", "1"]
    assert stats.read == 3


@pytest.mark.slow
@pytest.mark.skipif(not MORE, reason="set FUYU_FUZZ to a number of mutants, 10000 say")
def test_many_more_damaged_shards(originals: list[Original], reader: Reader) -> None:
    each, held, total, failed = MORE // len(FAMILIES) + 1, _memory(1), SampleStats(), []
    for name in FAMILIES:
        started_at = time.monotonic()
        try:
            found = endure(name, range(MUTANTS, MUTANTS + each), originals, reader)
        except AssertionError as error:
            failed.append(name)
            print(f"FAILED {name}: {error}")
            continue
        total.add(found)
        seconds = time.monotonic() - started_at
        print(f"{name}: {each} in {seconds:.0f} s, holding {(_memory(1) - held) >> 20:+} MiB: {found.summary()}")
    print(f"{each * (len(FAMILIES) - len(failed))} mutants in all: {total.summary()}")
    assert not failed
    assert _memory(1) - held < 300 * 2**20
