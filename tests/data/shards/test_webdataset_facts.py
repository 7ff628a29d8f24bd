"""What slips through webdataset by default, row by row: never here; where it runs code or loses data, still there.

The second half of each such test uses webdataset as its own documentation does. It fails on the day that webdataset
changes, so that what we guard against can be looked at again.
"""

import io
import json
import math
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import ExifTags, ImageFile
from PIL import Image as Pillow

from fuyu_e2e.data.document import Document
from fuyu_e2e.data.image import ImagePolicy, decode_image
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.data.shards.cache import ShardCache
from fuyu_e2e.data.shards.formats import TEXT_BYTES
from fuyu_e2e.data.shards.locations import expand_patterns
from fuyu_e2e.data.shards.manifest import check_complete, facts_of, verify
from fuyu_e2e.data.shards.mixture import Source
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.data.shards.stream import Stream, StreamSource
from fuyu_e2e.errors import UnusableSampleError, UserError

POLICY = ImagePolicy(patch_size=8)
FOUR = [(f"{number}.txt", f"text {number}".encode()) for number in range(4)]


def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def ours(path: Path) -> tuple[list[Document], dict[str, int]]:
    """The usable documents of a shard, and how many were skipped by reason."""
    stats = SampleStats()
    documents = list(read_documents(path, stats))
    assert stats.read == len(documents) + stats.skipped.total()
    return documents, dict(stats.skipped)


def stock(path: Path | str, *decoders: Any, **options: Any) -> list[dict[str, Any]]:
    """The samples that webdataset gives, decoded where decoders are named."""
    dataset = webdataset.WebDataset(str(path), shardshuffle=False, **options)
    return list(dataset.decode(*decoders) if decoders else dataset)


def encode(image: Pillow.Image | np.ndarray, file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Pillow.Image) else Pillow.fromarray(image)).save(file, file_format, **options)
    return file.getvalue()


def grey_png(width: int, height: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10**9)


class Touches:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.path,)


def code(extension: str, hit: Path) -> bytes:
    """A member that makes the file `hit` when it is decoded as its extension says."""
    if extension != "pth":
        return pickle.dumps(Touches(hit))
    file = io.BytesIO()
    torch.save(Touches(hit), file)
    return file.getvalue()


# Code.


def test_a_pipe_url_is_refused_before_a_shell_sees_it(tmp_path: Path) -> None:
    shard, hit = write(tmp_path / "s.tar", FOUR), tmp_path / "HIT"
    url = f"pipe:touch {hit}; cat {shard}"
    with pytest.raises(UserError, match="would run a command of your shell"):
        expand_patterns([str(shard), url])
    assert not hit.exists()

    assert len(stock(url)) == 4
    assert hit.exists()


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "pth"])
def test_members_that_are_code_are_never_decoded(tmp_path: Path, extension: str, builder: SequenceBuilder) -> None:
    hit = tmp_path / "HIT"
    evil = code(extension, hit)
    members = [("0.txt", b"a"), (f"0.{extension}", evil), (f"1.{extension}", evil), ("2.jpg", evil), ("2.txt", b"c")]
    shard = write(tmp_path / "s.tar", members)
    documents, skipped = ours(shard)
    assert [document.key for document in documents] == ["0", "2"]
    assert skipped == {"format-unknown": 1}
    assert len(builder.build(documents[0])) > 0
    with pytest.raises(UnusableSampleError, match="image-unreadable"):
        builder.build(documents[1])
    assert not hit.exists()

    webdataset_alone = write(tmp_path / "alone.tar", members[:2])
    assert len(stock(webdataset_alone, "pil")) == 1
    assert hit.exists()


# Silent losses.


def test_the_archives_that_the_next_tests_damage_are_read_whole(tmp_path: Path) -> None:
    shard = write(tmp_path / "s.tar", FOUR)
    assert len(stock(shard)) == 4
    assert ours(shard)[1] == {}


def cut_at_a_block(data: bytes) -> bytes:
    return data[: 4 * 512]


def with_a_corrupt_header(data: bytes) -> bytes:
    return data[: 4 * 512] + b"\xff" * 40 + data[4 * 512 + 40 :]


@pytest.mark.parametrize("damaged", [cut_at_a_block, with_a_corrupt_header])
def test_what_a_damaged_archive_lost_is_reported_against_the_manifest(
    tmp_path: Path, cache: ShardCache, builder: SequenceBuilder, damaged: Callable[[bytes], bytes]
) -> None:
    shard = write(tmp_path / "s.tar", FOUR)
    facts = facts_of([str(shard)], cache)
    shard.write_bytes(damaged(shard.read_bytes()))

    assert ours(shard)[1] == {"shard-broken": 1}
    source = StreamSource(name="val", source=Source(str(shard)), shards=(str(shard),), facts=facts)
    settings: dict[str, Any] = {"cache": cache, "budget": 64, "long_documents": "skip", "lanes": 1, "shuffle": 0}
    total = SampleStats()
    for row in Stream(sources=(source,), builder=builder, **settings).rows():
        total.add(row.stats)
    lost = total.skipped["sample-missing"] + total.skipped["shard-broken"]
    assert total.read == facts[0].documents == total.used + lost
    assert lost > 1
    reasons = " ".join(fault.reason for fault in verify([str(shard)], [str(shard)], cache))
    assert f"has {total.used + 1} documents instead of 4" in reasons
    assert "unusable documents (shard-broken)" in reasons

    assert len(stock(shard)) == 2  # and not a word


def test_a_shard_of_another_size_than_its_manifest_says_is_named(tmp_path: Path, cache: ShardCache) -> None:
    shard = write(tmp_path / "s.tar", FOUR)
    facts_of([str(shard)], cache)
    shard.write_bytes(cut_at_a_block(shard.read_bytes()))
    with pytest.raises(UserError, match=r"s\.tar has 2,048 bytes, but its manifest says 10,240"):
        facts_of([str(shard)], cache)


def test_a_missing_shard_is_named(tmp_path: Path, cache: ShardCache) -> None:
    shards = [str(write(tmp_path / f"train-{number}.tar", FOUR)) for number in range(3)]
    facts_of(shards, cache)
    Path(shards[1]).unlink()
    found = expand_patterns(str(tmp_path / "train-*.tar"))
    with pytest.raises(UserError, match=r"train-1\.tar is listed in .* but is gone"):
        check_complete(found, cache)
    with pytest.raises(UserError, match=r"train-1\.tar' matches no shard"):
        expand_patterns(shards[1])

    ignoring = webdataset.ignore_and_continue
    assert len(stock(tmp_path / "train-{0..2}.tar", handler=ignoring)) == 8  # and not a word
    with pytest.raises(ValueError, match="No samples found"):  # its own check, where that was the only shard
        stock(shards[1], handler=ignoring)
    assert stock(shards[1], handler=ignoring, empty_check=False) == []


def test_a_missing_shard_of_a_brace_range_is_named(tmp_path: Path) -> None:
    for number in (0, 2):
        write(tmp_path / f"train-{number}.tar", FOUR)
    with pytest.raises(UserError, match=r"train-1\.tar"):
        expand_patterns(str(tmp_path / "train-{0..2}.tar"))


@pytest.mark.parametrize("handler", [webdataset.reraise_exception, webdataset.ignore_and_continue])
def test_a_member_that_comes_twice_in_a_sample_costs_the_sample(tmp_path: Path, handler: Callable[..., bool]) -> None:
    shard = write(tmp_path / "s.tar", [("0.txt", b"a"), ("0.txt", b"b"), ("1.txt", b"c")])
    documents, skipped = ours(shard)
    assert [document.answer for document in documents] == ["c"]
    assert skipped == {"member-duplicate": 1}

    if handler is webdataset.reraise_exception:
        with pytest.raises(ValueError, match="duplicate file name"):
            stock(shard)
    else:
        assert [sample["txt"] for sample in stock(shard, handler=handler)] == [b"a", b"c"]


def test_a_sample_that_comes_twice_apart_is_two_documents(tmp_path: Path) -> None:
    """Nothing is lost by it, so it is as good a document as any; a key is a name for errors, never a path."""
    shard = write(tmp_path / "s.tar", [("0.txt", b"a"), ("1.txt", b"b"), ("0.txt", b"c")])
    assert [(document.key, document.answer) for document in ours(shard)[0]] == [("0", "a"), ("1", "b"), ("0", "c")]
    assert [sample["txt"] for sample in stock(shard)] == [b"a", b"b", b"c"]


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/tmp/evil.txt"])
def test_names_that_lead_out_of_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    shard = write(tmp_path / "s.tar", [(name, b"x"), ("1.txt", b"b")])
    documents, skipped = ours(shard)
    assert [document.key for document in documents] == ["1"]
    assert skipped == {"member-path": 1}

    assert [sample["__key__"] for sample in stock(shard)] == [name.removesuffix(".txt"), "1"]


# Images.


def read_image(path: Path, data: bytes, spec: str = "rgb8") -> Any:
    """An image as webdataset decodes it."""
    return stock(write(path / "image.tar", [("0.png", data)]), spec)[0]["png"]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (encode(np.eye(64, dtype=np.uint8))[:-20], "image-unreadable"),
        (b"", "image-empty"),
        (b"?", "image-unreadable"),
    ],
    ids=["truncated", "empty", "garbage"],
)
def test_a_broken_image_costs_its_sample_only(
    tmp_path: Path, image: bytes, reason: str, builder: SequenceBuilder
) -> None:
    shard = write(tmp_path / "s.tar", [("0.png", image), ("0.txt", b"a"), *FOUR[1:]])
    stats = SampleStats()
    assert len(list(builder.prompts(read_documents(shard, stats), stats))) == 3
    assert stats.skipped == {reason: 1}
    assert not ImageFile.LOAD_TRUNCATED_IMAGES

    with pytest.raises(webdataset.autodecode.DecodingError):  # the run ends
        stock(shard, "rgb8")


def test_16_bit_grey_is_scaled_where_webdataset_clips_it_to_white(tmp_path: Path) -> None:
    grey = np.linspace(0, 65_535, 256).astype(np.uint16)[None].repeat(4, 0)
    data = encode(Pillow.fromarray(grey))
    assert decode_image(data, POLICY)[0, :, 0].tolist() == list(range(256))

    clipped = read_image(tmp_path, data)
    assert (clipped[:, 2:] == 255).all()


def test_transparent_pixels_are_white_where_webdataset_shows_what_hides_there(tmp_path: Path) -> None:
    data = encode(np.full((8, 8, 4), (200, 0, 0, 0), np.uint8))
    assert (decode_image(data, POLICY) == 255).all()

    assert (read_image(tmp_path, data) == (200, 0, 0)).all()


def test_a_picture_stands_upright_where_webdataset_leaves_it_lying(tmp_path: Path) -> None:
    exif = Pillow.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encode(np.zeros((8, 24, 3), np.uint8), exif=exif)
    assert decode_image(data, POLICY).shape == (24, 8, 3)

    assert read_image(tmp_path, data).shape == (8, 24, 3)


def test_a_small_file_of_100_megapixels_is_refused_by_its_header() -> None:
    bomb = grey_png(10_000, 10_000, bytes(10_001 * 10_000))
    assert len(bomb) < 100_000
    with pytest.raises(UnusableSampleError, match="image-too-many-pixels"):
        decode_image(bomb, POLICY)


def test_a_single_pixel_is_used_and_a_line_of_60_000_is_not() -> None:
    assert decode_image(encode(Pillow.new("RGB", (1, 1))), POLICY).shape == (1, 1, 3)
    for size in ((1, 60_000), (60_000, 1)):
        with pytest.raises(UnusableSampleError, match="image-aspect"):
            decode_image(encode(Pillow.new("L", size)), POLICY)


def test_other_colours_are_converted_and_an_animation_is_its_first_frame() -> None:
    red, blue = (Pillow.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    assert np.abs(decode_image(encode(red.convert("CMYK"), "JPEG"), POLICY)[0, 0].astype(int) - (255, 0, 0)).max() < 8
    assert decode_image(encode(red.convert("P")), POLICY)[0, 0].tolist() == [255, 0, 0]
    animated = encode(red, "WEBP", save_all=True, append_images=[blue], duration=100, lossless=True)
    assert decode_image(animated, POLICY)[0, 0].tolist() == [255, 0, 0]


# Text.


def test_nan_is_no_json(tmp_path: Path) -> None:
    shard = write(tmp_path / "s.tar", [("0.json", b'{"caption": "a", "score": NaN}'), ("1.txt", b"b")])
    assert [document.key for document in ours(shard)[0]] == ["1"]
    assert ours(shard)[1] == {"json-invalid": 1}

    assert math.isnan(stock(shard, "pil")[0]["json"]["score"])


@pytest.mark.parametrize("extension", ["txt", "json", "jsonl"])
@pytest.mark.parametrize(
    ("text", "reason"), [(b"\xff\xfe", "text-not-utf8"), (b" " * (TEXT_BYTES + 1), "text-too-long")]
)
def test_text_that_is_not_utf8_or_huge_is_counted(tmp_path: Path, extension: str, text: bytes, reason: str) -> None:
    member = text + json.dumps({"text": "a"}).encode()
    shard = write(tmp_path / "s.tar", [(f"0.{extension}", member), ("1.txt", b"b")])
    assert [document.key for document in ours(shard)[0]] == ["1"]
    assert ours(shard)[1] == {reason: 1}
