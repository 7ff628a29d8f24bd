"""Every form of source becomes the documents meant; every row is written or counted; bytes depend on nothing else."""

import csv
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from fuyu_e2e.cli.shards_write import write
from fuyu_e2e.data.document import Document, Image, Segment, Text
from fuyu_e2e.data.image import ImagePolicy, decode_image
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards import readers, writing
from fuyu_e2e.data.shards.formats import TEXT_BYTES
from fuyu_e2e.data.shards.locations import expand_patterns
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.data.shards.tables import FORMS
from fuyu_e2e.data.shards.write_plan import EXAMPLES, Settings, WriteReport
from fuyu_e2e.data.shards.writing import INTERRUPTED, write_shards
from fuyu_e2e.errors import UnusableSampleError, UserError
from fuyu_e2e.eval.shard_questions import read_shards

ALL_TRAIN = Settings(val_share=0.0)
MANY_SMALL = Settings(val_share=0.2, shard_megabytes=0.02)


def written(out: Path, pattern: str = "*.tar") -> list[Document]:
    """The documents of all shards; none may be unusable."""
    tally = SampleStats()
    documents = [document for path in sorted(out.glob(pattern)) for document in read_documents(path, tally)]
    assert not tally.skipped
    return documents


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def lines(path: Path, rows: list[Any]) -> Path:
    """Writes JSON Lines; bytes go in as they are."""
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n")
    return path


def table(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)
    return path


def parquet(path: Path, rows: list[dict], row_group_size: int = 3) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


@pytest.fixture
def images(tmp_path: Path, make_png: Callable[..., bytes]) -> dict[str, Image]:
    """Images in a folder `pics`, by the paths that rows below `tmp_path` name."""
    (tmp_path / "pics" / "sub").mkdir(parents=True)
    files = {"pics/a.png": make_png(9, 5), "pics/b c.PNG": make_png(4, 8), "pics/sub/ä.v2.png": make_png(6, 6)}
    picture = io.BytesIO()
    Pillow.new("RGB", (7, 3), "red").save(picture, "JPEG")
    files["pics/d.jpeg"] = picture.getvalue()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return {name: Image(data) for name, data in files.items()}


# Every form


def folder_of_captions(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    for name in images:
        (root / name).with_suffix(".txt").write_text(f"  caption of {name}\n")
    (root / "pics" / ".hidden.png").write_bytes(b"")
    (root / "pics" / ".cache").mkdir()
    (root / "pics" / ".cache" / "a.png").write_bytes(b"")
    (root / "pics" / "readme.md").write_text("no row")
    names = ["pics/a.png", "pics/b c.PNG", "pics/d.jpeg", "pics/sub/ä.v2.png"]
    return root / "pics", [[images[name], Text(f"caption of {name}")] for name in names]


def folder_of_text(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    (root / "texts" / "b").mkdir(parents=True)
    for name, text in [("a.txt", "one"), ("b/c.TXT", "two\nlines"), ("z.v1.txt", "three")]:
        (root / "texts" / name).write_text(text)
    return root / "texts", [[Text("one")], [Text("three")], [Text("two\nlines")]]


def captioned(images: dict[str, Image]) -> tuple[list[tuple[str, str]], list[list[Segment]]]:
    pairs = [(name, f'line "one",\nline\t{number} é') for number, name in enumerate(images)]
    return pairs, [[images[name], Text(text)] for name, text in pairs]


def csv_of_captions(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    pairs, meant = captioned(images)
    path = table(root / "t.csv", [["id", "Image", "Caption"], *([str(n), *pair] for n, pair in enumerate(pairs))])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n2,", b"\r\n\r\n2,"))  # a mark, and a blank line
    return path, meant


def tsv_of_captions(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    pairs, meant = captioned(images)
    return table(root / "t.tsv", [["filepath", "title"], *map(list, pairs)]), meant


def lines_of_captions(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    pairs, meant = captioned(images)
    rows: list[Any] = [{"image_path": str(root / name), "text": text} for name, text in pairs]
    return lines(root / "t.jsonl", [b"", *rows, b"  "]), meant


def parquet_of_captions(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    pairs, meant = captioned(images)
    return parquet(root / "t.parquet", [{"path": name, "caption": text} for name, text in pairs]), meant


def turns(*said: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(said)]


def chats(images: dict[str, Image]) -> tuple[list[dict], list[list[Segment]]]:
    names = list(images)
    twelve = [names[number % len(names)] for number in range(12)]
    rows = [
        {"id": "x,[{", "image": names[0], "conversations": turns("<image>\nWhat?", 'A "quote\\", é.')},
        {"id": 2, "conversations": turns("Who?", "I.", "Sure?", "Yes.")},
        {"image": twelve, "conversations": turns("<image>" * 12 + "Which?", "All.")},
        {"image": None, "conversations": turns("Where?", "Here.")},
    ]
    return rows, [
        [images[names[0]], Text("What?", False), Text('A "quote\\", é.')],
        [Text("Who?", False), Text("I."), Text("Sure?", False), Text("Yes.")],
        [*(images[name] for name in twelve), Text("Which?", False), Text("All.")],
        [Text("Where?", False), Text("Here.")],
    ]


def llava(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    rows, meant = chats(images)
    (root / "llava.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False))
    return root / "llava.json", meant


def lines_of_llava(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    rows, meant = chats(images)
    return lines(root / "llava.json", rows), meant


def parquet_of_llava(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    rows = [{"image": list(images), "conversations": turns("<image>" * 4 + "?", "!"), "extra": 1}]
    return parquet(root / "t.parquet", rows), [[*images.values(), Text("?", False), Text("!")]]


def interleaved(images: dict[str, Image]) -> tuple[list[dict], list[list[Segment]]]:
    (name, image), (other_name, other), *_ = images.items()
    rows: list[dict] = [
        {"segments": [{"text": "x", "loss": False}, {"image": name}, {"text": "y"}, {"image": other_name}]},
        {"segments": [{"image": name}, {"image": name}, {"text": "z", "loss": True}]},
    ]
    return rows, [[Text("x", False), image, Text("y"), other], [image, image, Text("z")]]


def lines_of_segments(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    rows, meant = interleaved(images)
    return lines(root / "t.jsonl", rows), meant


def parquet_of_segments(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    rows, meant = interleaved(images)
    return parquet(root / "t.parquet", rows), meant


def embedded(image: Image, path: str | None = "0.jpg") -> dict[str, Any]:
    """An image as Hugging Face's datasets store it, under the name that it had elsewhere."""
    return {"bytes": image.data, "path": path}


def parquet_of_images(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    rows: list[dict] = [{"image": embedded(image), "text": name, "path": "x"} for name, image in images.items()]
    rows[1]["image"] = {"bytes": None, "path": list(images)[1]}
    rows[2]["image"]["path"] = None
    return parquet(root / "t.parquet", rows), [[image, Text(name)] for name, image in images.items()]


def parquet_of_image_bytes(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    rows = [{"picture": image.data, "caption": name, "hash": b"1234"} for name, image in images.items()]
    return parquet(root / "t.parquet", rows), [[image, Text(name)] for name, image in images.items()]


def parquet_of_lists_of_one_image(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    rows = [{"images": [embedded(image)], "caption": name} for name, image in images.items()]
    return parquet(root / "t.parquet", rows), [[image, Text(name)] for name, image in images.items()]


def llava_onevision(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    """The columns of lmms-lab/LLaVA-OneVision-Data, with an image in some of the rows only."""
    image = images["pics/d.jpeg"]
    rows = [
        {"id": "0", "image": None, "conversations": turns("Who?", "I."), "data_source": "magpie"},
        {"id": "1", "image": embedded(image), "conversations": turns("<image>\nWhat?", "Red."), "data_source": "ai2d"},
        {"id": "2", "image": embedded(image), "conversations": turns("What?", "Red."), "data_source": "ai2d"},
    ]
    asked = [image, Text("What?", False), Text("Red.")]
    return parquet(root / "t.parquet", rows), [[Text("Who?", False), Text("I.")], asked, asked]


def cauldron(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    """The columns of HuggingFaceM4/the_cauldron: all images come before the first question."""
    said = [
        {"user": "What?", "assistant": "Red.", "source": "x"},
        {"user": "Sure?", "assistant": "Yes.", "source": "x"},
    ]
    rows = [
        {"images": [embedded(image) for image in images.values()], "texts": said},
        {"images": [embedded(images["pics/a.png"], None)], "texts": said[:1]},
        {"images": [], "texts": said[1:]},
    ]
    sure = [Text("Sure?", False), Text("Yes.")]
    return parquet(root / "t.parquet", rows), [
        [*images.values(), Text("What?", False), Text("Red."), *sure],
        [images["pics/a.png"], Text("What?", False), Text("Red.")],
        sure,
    ]


def parquet_of_messages(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    said = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Red."}]
    image = images["pics/a.png"]
    rows = [{"messages": said, "shown": [embedded(image)]}]
    return parquet(root / "t.parquet", rows), [[image, Text("What?", False), Text("Red.")]]


def lines_of_paired_lists(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    """The lists of HuggingFaceM4/OBELICS, with files in the place of addresses."""
    (name, image), (other_name, other), *_ = images.items()
    rows = [
        {"images": [name], "texts": [None], "metadata": "[]", "general_metadata": "{}"},
        {"images": [None, name, None, other_name], "texts": ["x", None, "y", None], "metadata": "[]"},
    ]
    return lines(root / "t.jsonl", rows), [[image], [Text("x"), image, Text("y"), other]]


def parquet_of_paired_lists(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    image = images["pics/a.png"]
    rows = [{"images": [embedded(image), None, embedded(image)], "texts": [None, "x", None]}]
    return parquet(root / "t.parquet", rows), [[image, Text("x"), image]]


def parquet_of_segments_with_images(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    image = images["pics/a.png"]
    rows = [{"segments": [{"text": "x", "image": None}, {"text": None, "image": embedded(image)}]}]
    return parquet(root / "t.parquet", rows), [[Text("x"), image]]


def lines_of_text(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    rows = [{"text": f"text {number}", "title": "t", "url": "https://x/y.png"} for number in range(5)]
    return lines(root / "t.jsonl", rows), [[Text(f"text {number}")] for number in range(5)]


def parquet_of_text(root: Path, images: dict[str, Image]) -> tuple[Path, list[list[Segment]]]:
    numbers = range(20)
    rows = [{"text": f"text {number}", "dump": "d"} for number in numbers]
    return parquet(root / "t.parquet", rows, 7), [[Text(f"text {number}")] for number in numbers]


@pytest.mark.parametrize(
    "form",
    [
        folder_of_captions,
        folder_of_text,
        csv_of_captions,
        tsv_of_captions,
        lines_of_captions,
        parquet_of_captions,
        llava,
        lines_of_llava,
        parquet_of_llava,
        lines_of_segments,
        parquet_of_segments,
        parquet_of_images,
        parquet_of_image_bytes,
        parquet_of_lists_of_one_image,
        llava_onevision,
        cauldron,
        parquet_of_messages,
        lines_of_paired_lists,
        parquet_of_paired_lists,
        parquet_of_segments_with_images,
        lines_of_text,
        parquet_of_text,
    ],
)
def test_every_form_becomes_the_documents_meant(
    tmp_path: Path, images: dict[str, Image], form: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BATCH", 2)  # several in a row group
    source, meant = form(tmp_path, images)
    report = write_shards(source, tmp_path / "out", settings=ALL_TRAIN)
    documents = written(tmp_path / "out")
    assert [list(document.segments) for document in documents] == meant
    assert [document.key for document in documents] == [f"{number:09}" for number in range(len(meant))]
    assert report.read == report.total.written == len(meant)
    # The same rows when each shard asks for some of them only.
    write_shards(source, tmp_path / "split", settings=Settings(val_share=0.5, shard_megabytes=0.003))
    parts = sorted(written(tmp_path / "split"), key=lambda document: document.key)
    assert parts == documents


def test_columns_and_the_image_folder_can_be_named(tmp_path: Path, images: dict[str, Image]) -> None:
    (tmp_path / "tables").mkdir()
    rows = [["picture", "caption", "title", "says"], ["../pics/sub/../a.png", "no", "no", "yes"]]
    source = table(tmp_path / "tables" / "t.csv", rows)
    options = {"image_column": "picture", "text_column": "says", "settings": ALL_TRAIN}
    write_shards(source, tmp_path / "out", images=tmp_path / "pics", **options)
    write_shards(source, tmp_path / "beside", **options)  # the table's own folder is no worse a start
    for out in ("out", "beside"):
        assert [document.segments for document in written(tmp_path / out)] == [(images["pics/a.png"], Text("yes"))]


QUESTION = {"groups": {"kind": "relational"}, "choices": ["a", "b"]}


@pytest.mark.parametrize("write_table", [lines, parquet], ids=["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("row", "image"),
    [
        ({"image": "pics/a.png", "caption": "a"}, "pics/a.png"),
        ({"image": "pics/a.png", "conversations": turns("?", "a")}, "pics/a.png"),
        ({"conversations": turns("?", "a")}, "000000000"),
        ({"segments": [{"image": "pics/a.png"}, {"text": "a"}]}, "000000000"),
        ({"images": ["pics/a.png", None], "texts": [None, "a"]}, "000000000"),
        ({"text": "a"}, "000000000"),
    ],
    ids=["caption", "chat", "chat without images", "interleaved", "paired lists", "text"],
)
def test_what_an_evaluation_reads_of_a_row_is_in_its_sample(
    tmp_path: Path, images: dict[str, Image], row: dict, image: str, write_table: Callable
) -> None:
    others = {"groups": {"kind": None, "place": "left"}, "choices": None}  # Parquet fills each with both keys
    source = write_table(tmp_path / f"t.{'parquet' if write_table is parquet else 'jsonl'}", [
        {**row, **QUESTION}, {**row, **others}, row,
    ])  # fmt: skip
    write_shards(source, tmp_path / "out", settings=ALL_TRAIN)
    stats = SampleStats()
    first, second, third = read_shards(str(tmp_path / "out/train-00000.tar"), stats)
    assert not stats.skipped
    assert (first.groups, first.choices, first.image) == (QUESTION["groups"], ("a", "b"), image)
    assert (second.groups, second.choices) == ({"place": "left"}, ())
    assert (third.groups, third.choices) == ({}, ())


def test_a_question_of_another_type_is_counted_and_a_column_of_it_left_out_aloud(
    tmp_path: Path, images: dict[str, Image], caplog: pytest.LogCaptureFixture
) -> None:
    row = {"image": "pics/a.png", "caption": "a"}
    wrong = [{"groups": "x"}, {"groups": {"kind": 1}}, {"choices": {"a": "b"}}, {"choices": ["a", 1]}]
    source = lines(tmp_path / "t.jsonl", [{**row, **QUESTION}, *({**row, **each} for each in wrong)])
    assert write_shards(source, tmp_path / "out", settings=ALL_TRAIN).total.skipped == {"json-type": 4}
    assert not caplog.messages
    source = table(tmp_path / "t.csv", [["image", "caption", "choices"], ["pics/a.png", "a", "yes, no"]])
    write_shards(source, tmp_path / "csv", settings=ALL_TRAIN)
    assert caplog.messages == [
        f"{source}: 'choices' is not written into the shards: an evaluation takes a JSON list of texts."
    ]


# Rows that can't be used


def assert_adds_up(report: WriteReport, out: Path) -> None:
    assert report.read == report.total.written + sum(report.total.skipped.values())
    said = json.loads((out / "report.json").read_text())
    assert said["read"] == said["written"] + sum(said["skipped"].values())
    assert said["skipped"] == report.total.skipped
    assert said["written"] == sum(split["written"] for split in said["splits"].values()) == len(written(out))
    assert said["bytes"] == sum(path.stat().st_size for path in out.glob("*.tar"))
    assert {reason: min(EXAMPLES, count) for reason, count in said["skipped"].items()} == {
        reason: len(examples) for reason, examples in said["examples"].items()
    }


@pytest.fixture
def bad_images(tmp_path: Path, images: dict[str, Image]) -> None:
    """Files that `BAD_CAPTIONS` names."""
    wide, huge, gif = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Pillow.new("1", (2_000, 1)).save(wide, "PNG")
    Pillow.new("1", (2**14, 2**12 + 1)).save(huge, "PNG")
    Pillow.new("1", (4, 4)).save(gif, "GIF")
    files = {"empty": b"", "junk": b"\x89PNG\r\n\x1a\n" + b"junk" * 9, "cut": images["pics/a.png"].data[:20]}
    for name, data in {**files, "gif": gif.getvalue(), "wide": wide.getvalue(), "huge": huge.getvalue()}.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    with (tmp_path / "fat.png").open("wb") as file:
        file.truncate(2**25 + 1)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()


BAD_PATHS = {
    "image-missing": ["nothing.png", "../nothing.png", "a\0b.png", "x" * 5_000 + ".png", ["a.png"]],
    "image-no-file": ["pipe.png", "folder.png"],
    "image-unreadable": ["junk.png", "gif.png", "cut.png"],
    "image-empty": ["empty.png"],
    "image-too-many-pixels": ["huge.png"],
    "image-aspect": ["wide.png"],
    "image-too-many-bytes": ["fat.png"],
    "image-extension": ["a.tiff", "a"],
    "image-remote": ["https://example.org/a.png", "s3://bucket/a.png"],
    "image-not-named": [None, "", 7, [], [None], {"bytes": "x"}, {"bytes": None, "path": None}, {"url": "a.png"}],
    "caption-of-several-images": [["pics/a.png", "pics/a.png"]],
}
BAD_CAPTIONS = [
    *((reason, {"image": value, "text": "t"}) for reason, values in BAD_PATHS.items() for value in values),
    ("image-not-named", {"text": "t"}),
    ("caption-empty", {"image": "pics/a.png", "text": " \n"}),
    ("caption-empty", {"image": "pics/a.png", "text": None}),
    ("caption-empty", {"image": "pics/a.png"}),
    ("text-type", {"image": "pics/a.png", "text": 5}),
    ("text-not-utf8", {"image": "pics/a.png", "text": "\ud800"}),
    ("text-not-utf8", b'{"image": "pics/a.png", "text": "\xff"}'),
    ("row-not-json", b'{"image": "pics/a.png", "text": "t"'),
    ("row-not-json", b'{"image": "pics/a.png", "text": NaN}'),
    ("row-not-json", b'["pics/a.png", "t"]'),
    ("row-not-json", b"[" * 100_000),
    ("row-not-json", b'{"image": "pics/a.png", "text": ' + b"9" * 5_000 + b"}"),
    ("text-too-long", b'{"image": "pics/a.png", "text": "' + b"t" * 2 * TEXT_BYTES + b'"}'),
]
"""Rows that can't be used, with the reason for which each is counted."""


GOOD = {"image": "pics/a.png", "text": "good"}


def test_every_row_that_cannot_be_used_is_counted_by_its_reason(tmp_path: Path, bad_images: None) -> None:
    bad = BAD_CAPTIONS
    rows = [row for _, row in bad]
    source = lines(tmp_path / "t.jsonl", [GOOD, *rows, GOOD])
    report = write_shards(source, tmp_path / "out", settings=ALL_TRAIN)
    assert report.total.skipped == Counter(reason for reason, _ in bad)
    assert report.total.written == 2
    assert [document.key for document in written(tmp_path / "out")] == ["000000000", f"{len(bad) + 1:09}"]
    assert_adds_up(report, tmp_path / "out")
    examples = {each.row: reason for reason, listed in report.total.examples.items() for each in listed}
    assert examples == {number: reason for number, (reason, _) in enumerate(bad, start=1)}
    assert {each.file for listed in report.total.examples.values() for each in listed} == {str(source)}


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (
            {"conversations": turns("?", "!")},
            [
                ("chat-speaker", {"conversations": [{"from": "ghost", "value": "boo"}]}),
                ("chat-turns", {"conversations": []}),
                ("chat-turns", {"text": "no turns"}),
                ("chat-no-answer", {"conversations": turns("?")}),
                ("chat-images", {"conversations": turns("<image>?", "!")}),
                ("chat-images", {"image": ["pics/a.png"] * 2, "conversations": turns("<image>?", "!")}),
                ("json-type", {"conversations": [{"from": "gpt", "value": 5}]}),
                ("image-extension", {"video": "a.mp4", "conversations": turns("?", "!")}),
                ("image-extension", {"image": "a.tif", "conversations": turns("?", "!")}),
                ("image-missing", {"image": [{"path": "a.jpg"}], "conversations": turns("?", "!")}),
                ("image-not-named", {"image": [{"bytes": "a"}], "conversations": turns("?", "!")}),
                (
                    "chat-speaker",
                    {"conversations": [{"user": "?", "assistant": "!"}, {"from": "robot", "value": "?"}]},
                ),
                ("json-type", {"conversations": [{"user": "?", "assistant": None}]}),
                ("json-type", {"conversations": [{"user": None, "assistant": "!"}]}),
                ("chat-images", {"image": "pics/a.png", "conversations": [{"user": "<image>" * 2, "assistant": "!"}]}),
                ("image-missing", {"images": ["b.png"], "conversations": turns("?", "!")}),
                ("image-remote", {"image": "http://x/a.jpg", "conversations": turns("<image>?", "!")}),
                ("image-missing", {"image": ["pics/a.png", "b.png"], "conversations": turns("?", "!")}),
                ("text-not-utf8", {"conversations": turns("?", "\udfff")}),
                ("sample-too-many-bytes", {"image": ["big.png"] * 9, "conversations": turns("<image>" * 9, "!")}),
            ],
        ),
        (
            {"segments": [{"text": "x"}, {"image": "pics/a.png"}]},
            [
                ("segments-list", {"segments": []}),
                ("segments-list", {"segments": "x"}),
                ("segments-list", {"text": "x"}),
                ("segments-kind", {"segments": ["x"]}),
                ("segments-kind", {"segments": [{"image": "pics/a.png", "text": "x"}]}),
                ("segments-kind", {"segments": [{"text": None}]}),
                ("segments-loss", {"segments": [{"text": "x", "loss": "no"}]}),
                ("json-type", {"segments": [{"text": 5}]}),
                ("image-missing", {"segments": [{"image": "nothing.png"}]}),
                ("image-not-named", {"segments": [{"image": 5}]}),
            ],
        ),
        (
            {"images": [None, "pics/a.png"], "texts": ["x", None]},
            [
                ("segments-list", {"images": [], "texts": []}),
                ("segments-list", {"images": ["pics/a.png"], "texts": [None, "x"]}),
                ("segments-list", {"images": None, "texts": ["x"]}),
                ("segments-list", {"images": "pics/a.png", "texts": ["x"]}),
                ("segments-list", {"text": "x"}),
                ("segments-kind", {"images": [None], "texts": [None]}),
                ("segments-kind", {"images": ["pics/a.png"], "texts": ["x"]}),
                ("segments-kind", {"images": [{"bytes": None, "path": None}], "texts": [None]}),
                ("json-type", {"images": [None], "texts": [{"user": "x", "assistant": "y"}]}),
                ("image-missing", {"images": [None, "b.png"], "texts": ["x", None]}),
                ("image-remote", {"images": [None, "https://host/b.png"], "texts": ["x", None]}),
            ],
        ),
        ({"text": "x"}, [("text-empty", {"text": ""}), ("text-empty", {}), ("text-type", {"text": []})]),
    ],
    ids=["chat", "interleaved", "paired lists", "text"],
)
def test_rows_of_other_kinds_are_counted_too(
    tmp_path: Path, images: dict[str, Image], good: dict, bad: list[tuple[str, dict]]
) -> None:
    with (tmp_path / "big.png").open("wb") as file:  # an image by its header, and 30 MiB of nothing
        file.write(images["pics/a.png"].data)
        file.truncate(30 * 2**20)
    source = lines(tmp_path / "t.jsonl", [good, *(row for _, row in bad), good])
    report = write_shards(source, tmp_path / "out", settings=ALL_TRAIN)
    assert report.total.skipped == Counter(reason for reason, _ in bad)
    assert_adds_up(report, tmp_path / "out")


def test_what_is_wrong_in_a_folder_is_counted_with_its_file(tmp_path: Path, images: dict[str, Image]) -> None:
    folder, _ = folder_of_captions(tmp_path, images)
    (folder / "alone.txt").write_text("no image")
    (folder / "alone.png").symlink_to("nowhere.png")
    (folder / "bare.png").write_bytes(images["pics/a.png"].data)
    (folder / "latin.png").write_bytes(images["pics/a.png"].data)
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "only.txt").write_text("no image")
    (folder / "two.png").write_bytes(images["pics/a.png"].data)
    (folder / "two.jpg").write_bytes(images["pics/d.jpeg"].data)
    (folder / "two.txt").write_text("which?")
    with (folder / "long.txt").open("wb") as file:
        file.truncate(TEXT_BYTES + 1)
    (folder / "long.png").write_bytes(images["pics/a.png"].data)
    report = write_shards(folder, tmp_path / "out", settings=ALL_TRAIN)
    files = {reason: [each.file for each in listed] for reason, listed in report.total.examples.items()}
    assert files == {
        "image-missing": ["alone.png", "only.txt"],
        "caption-missing": ["bare.png"],
        "text-not-utf8": ["latin.png"],
        "text-too-long": ["long.png"],
        "caption-of-several-images": ["two.jpg"],
    }
    assert report.total.written == len(images)
    assert_adds_up(report, tmp_path / "out")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_an_image_that_breaks_off_is_left_out_as_training_would(
    tmp_path: Path, make_png: Callable[..., bytes], form: str
) -> None:
    file = io.BytesIO()
    with Pillow.open(io.BytesIO(make_png(90, 200))) as noise:
        noise.save(file, form)
    extension = form.lower()
    (tmp_path / "in").mkdir()
    for name, size in (("cut", len(file.getvalue()) // 2), ("whole", None)):
        (tmp_path / "in" / f"{name}.{extension}").write_bytes(file.getvalue()[:size])
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    with pytest.raises(UnusableSampleError, match="image-unreadable"):
        decode_image((tmp_path / "in" / f"cut.{extension}").read_bytes(), ImagePolicy(patch_size=16))
    report = write_shards(tmp_path / "in", tmp_path / "out", settings=ALL_TRAIN)
    assert report.total.skipped == {"image-unreadable": 1}
    assert report.left_out() == [f"image-unreadable 1 (cut.{extension})"]
    assert [document.answer for document in written(tmp_path / "out")] == ["whole"]


def test_an_image_of_a_kind_that_is_not_read_is_not_missing(tmp_path: Path, images: dict[str, Image]) -> None:
    folder, meant = folder_of_captions(tmp_path, images)
    (folder / "drawn.svg").write_text("<svg/>")
    (folder / "drawn.txt").write_text("a drawing")
    (folder / "alone.svg").write_text("<svg/>")
    (folder / "gone.txt").write_text("no image at all")
    report = write_shards(folder, tmp_path / "out", settings=ALL_TRAIN)
    assert report.total.skipped == {"image-extension": 2, "image-missing": 1}
    assert "alone.svg: read are jpg, jpeg, jpe, jfif, png, webp" in report.total.examples["image-extension"][0].detail
    assert report.total.written == len(meant)
    (tmp_path / "drawings").mkdir()
    for name in ("drawn.svg", "drawn.txt"):
        (folder / name).rename(tmp_path / "drawings" / name)
    with pytest.raises(UserError, match="image-extension"):  # not taken for a folder of texts
        write_shards(tmp_path / "drawings", tmp_path / "none")


# Hugging Face's `imagefolder`


def described(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """Writes a metadata file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if path.suffix == ".csv":
        return table(path, [list(rows[0]), *([str(value) for value in row.values()] for row in rows)])
    return lines(path, rows) if path.suffix == ".jsonl" else parquet(path, rows)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_a_folder_with_metadata_has_each_caption_beside_its_picture(
    tmp_path: Path, images: dict[str, Image], name: str
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "pics").rename(folder / "train")
    in_folder = {name.replace("pics/", ""): image for name, image in images.items()}
    below = {name: image for name, image in in_folder.items() if name.startswith("sub/")}
    beside = {name: image for name, image in in_folder.items() if name not in below}
    described(folder / "train", name, [{"file_name": each, "text": f"caption of {each}"} for each in beside])
    rows = [{"file_name": each.removeprefix("sub/"), "text": f"caption of {each}"} for each in below]
    described(folder / "train" / "sub", name, rows)
    (folder / "train" / "LICENSE.txt").write_text("no caption")
    meant = [(image, Text(f"caption of {each}")) for each, image in (beside | below).items()]
    for source in (folder, folder / "train"):
        report = write_shards(source, tmp_path / f"out-{source.name}", settings=ALL_TRAIN)
        assert [document.segments for document in written(tmp_path / f"out-{source.name}")] == meant
        assert report.read == report.total.written == len(images)
    write_shards(folder, tmp_path / "split", settings=Settings(val_share=0.5, shard_megabytes=0.001))
    parts = sorted(written(tmp_path / "split"), key=lambda document: document.key)
    assert [document.segments for document in parts] == meant


def test_pictures_in_no_metadata_and_metadata_without_a_picture_are_counted(
    tmp_path: Path, images: dict[str, Image], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"file_name": "a.png", "text": "good"},
        {"file_name": "gone.png", "text": "x"},
        {"file_name": "a.png", "text": ""},
    ]
    described(tmp_path / "pics", "metadata.jsonl", rows)
    described(tmp_path / "pics" / "sub", "metadata.jsonl", [{"file_name": "../d.jpeg", "text": "y"}, {"file_name": 5}])
    (tmp_path / "pics" / "drawn.svg").write_text("<svg/>")
    assert write(["pics", "--out", "out", "--val-share", "0", "--processes", "1"]) == 0
    said = capsys.readouterr().out
    assert "8 read, 2 written (2 in 1 train, 0 in 0 val shards), 6 skipped" in said
    assert "image-missing 1 (row 1 of pics/metadata.jsonl)" in said
    assert "caption-empty 1 (row 2 of pics/metadata.jsonl)" in said
    assert "image-not-named 1 (row 1 of pics/sub/metadata.jsonl)" in said
    assert "caption-missing 2 (b c.PNG, sub/ä.v2.png)" in said
    assert "image-extension 1 (drawn.svg)" in said


def test_metadata_may_hold_turns_and_several_images(tmp_path: Path, images: dict[str, Image]) -> None:
    said = turns("<image><image>Which?", "Both.")
    described(tmp_path / "pics", "metadata.jsonl", [{"file_names": ["a.png", "d.jpeg"], "conversations": said}])
    write_shards(tmp_path / "pics", tmp_path / "out", settings=ALL_TRAIN)
    meant = (images["pics/a.png"], images["pics/d.jpeg"], Text("Which?", False), Text("Both."))
    assert [document.segments for document in written(tmp_path / "out")] == [meant]


def test_the_table_of_a_folder_may_be_named_itself(tmp_path: Path, images: dict[str, Image]) -> None:
    source = described(tmp_path / "pics", "metadata.csv", [{"file_name": "a.png", "prompt": "x", "hash": "1"}])
    with pytest.raises(UserError, match=r"no text column among 'file_name', 'prompt', 'hash': name it with"):
        write_shards(tmp_path / "pics", tmp_path / "out", settings=ALL_TRAIN)
    for number, named in enumerate((source, tmp_path / "pics")):
        out = tmp_path / f"out-{number}"
        write_shards(named, out, text_column="prompt", settings=ALL_TRAIN)
        assert [document.segments for document in written(out)] == [(images["pics/a.png"], Text("x"))]


def test_metadata_that_leaves_a_choice_is_refused(tmp_path: Path, images: dict[str, Image]) -> None:
    good = [{"file_name": "a.png", "text": "x"}]

    def refused(says: str, **options: Any) -> None:
        with pytest.raises(UserError, match=says) as error:
            write_shards(tmp_path / "pics", tmp_path / "out", **options)
        assert_is_a_sentence(error.value)
        assert not (tmp_path / "out").exists()

    table(tmp_path / "pics" / "sub" / "t.csv", [["image", "text"]])
    refused("no .txt beside them; it has tables: name one of them, as .*pics/sub/t.csv.$")
    described(tmp_path / "pics", "metadata.csv", [{"image": "a.png", "text": "x"}])
    refused(r"no .txt beside them, and metadata.csv has no column file_name \(it has 'image', 'text'\)")
    described(tmp_path / "pics", "metadata.csv", good)
    refused("are for tables only", images=tmp_path)
    refused("--text-column nothing is no column of .*metadata.csv", text_column="nothing")
    both = described(tmp_path / "pics", "metadata.jsonl", good)
    refused("pics has metadata.csv and metadata.jsonl: move the one or the other out of it")
    both.unlink()
    (tmp_path / "pics" / "a.txt").write_text("another caption")
    refused(r"captions in .*pics/metadata.csv and in .*pics/a.txt: move the one")
    (tmp_path / "pics" / "a.txt").unlink()
    described(tmp_path / "pics" / "sub", "metadata.csv", [{"file_name": "ä.v2.png", "caption": "x"}])
    refused(r"sub/metadata.csv has no column 'text', as .*pics/metadata.csv has: name their columns alike")
    for split in ("train", "validation"):
        described(tmp_path / "pics" / split, "metadata.csv", [{"file_name": "../a.png", "text": "x"}])
    refused(r"pics holds the splits .*pics/train, .*pics/validation, which would be mixed")


def test_links_to_folders_are_followed_once(tmp_path: Path, images: dict[str, Image]) -> None:
    folder, meant = folder_of_captions(tmp_path, images)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "linked").symlink_to(folder)
    (folder / "around").symlink_to(tmp_path / "in")
    report = write_shards(tmp_path / "in", tmp_path / "out", settings=ALL_TRAIN)
    assert report.total.written == len(meant)


def test_images_in_a_table_are_checked_as_those_in_files(tmp_path: Path, images: dict[str, Image]) -> None:
    image, gif = images["pics/d.jpeg"], io.BytesIO()
    Pillow.new("1", (4, 4)).save(gif, "GIF")
    rows = [
        {"image": embedded(image), "text": "good"},
        {"image": embedded(Image(image.data[: len(image.data) // 2])), "text": "cut"},
        {"image": embedded(Image(gif.getvalue())), "text": "of a kind that is not read"},
        {"image": embedded(Image(b"")), "text": "empty"},
        {"image": embedded(image) | {"bytes": None, "path": "nothing.png"}, "text": "named, but not there"},
        {"image": {"bytes": None, "path": None}, "text": "none"},
        {"image": embedded(Image(image.data + bytes(2**25))), "text": "too large"},
        {"image": embedded(image), "text": ""},
    ]
    source = parquet(tmp_path / "t.parquet", rows)
    report = write_shards(source, tmp_path / "out", settings=ALL_TRAIN)
    rows_of = {reason: [each.row for each in listed] for reason, listed in report.total.examples.items()}
    assert rows_of == {
        "image-unreadable": [1, 2],
        "image-empty": [3],
        "image-missing": [4],
        "image-not-named": [5],
        "image-too-many-bytes": [6],
        "caption-empty": [7],
    }
    assert "b'GIF8" in report.total.examples["image-unreadable"][1].detail
    assert_adds_up(report, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "train-00000.tar") as tar:
        assert tar.getnames() == ["000000000.jpg", "000000000.txt"]
    blue = io.BytesIO()
    Pillow.new("RGB", (7, 3), "blue").save(blue, "JPEG")
    assert len(blue.getvalue()) == len(image.data), "or the size alone would tell"
    changed = [{**rows[0], "image": embedded(Image(blue.getvalue()))}, *rows[1:]]
    with pytest.raises(UserError, match=r"fingerprint differ\): take an empty folder"):
        write_shards(parquet(tmp_path / "t.parquet", changed), tmp_path / "out", settings=ALL_TRAIN)


def test_a_column_of_images_counts_though_its_first_row_has_none(tmp_path: Path, images: dict[str, Image]) -> None:
    rows = [{"picture": None, "text": "x"}, {"picture": embedded(images["pics/a.png"]), "text": "y"}]
    report = write_shards(parquet(tmp_path / "t.parquet", rows), tmp_path / "out", settings=ALL_TRAIN)
    assert report.total.skipped == {"image-not-named": 1}
    assert [document.segments for document in written(tmp_path / "out")] == [(images["pics/a.png"], Text("y"))]


@pytest.mark.parametrize(
    ("images", "texts", "kind"),
    [([], [{"user": "?", "assistant": "!"}], "Chats"), ([None], ["x"], "PairedLists")],
)
def test_a_row_without_texts_does_not_tell_what_others_are(
    tmp_path: Path, images: list[Any], texts: list[Any], kind: str
) -> None:
    source = lines(tmp_path / "t.jsonl", [{"images": [], "texts": []}, {"images": images, "texts": texts}])
    report = write_shards(source, tmp_path / "out", settings=ALL_TRAIN)
    assert (report.kind, report.total.written) == (kind, 1)
    assert sum(report.total.skipped.values()) == 1


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"image": True, "mask": True, "text": "x"}, r"\(image, mask\): name one with --image-column"),
        ({"image": True, "mask": True, "conversations": []}, r"\(image, mask\): name one with --image-column"),
        ({"segments": [{"text": "x"}], "image": True}, "images in 'image' beside its segments: leave one"),
        ({"images": ["a.png"], "texts": ["x"], "thumb": True}, "images in 'thumb' beside its texts: leave one"),
        ({"image": True, "label": 3}, r"has images \(image\), but no text column among 'image', 'label': name it"),
        ({"picture": b"GIF89a", "text": "x"}, "bytes in 'picture': say --image-column picture if they are images"),
        (
            {"a": [{"role": "user", "content": "x"}], "b": [{"user": "x", "assistant": "y"}]},
            r"\(a, b\).*--text-column",
        ),
        ({"images": ["a.png"], "texts": "x", "captions": "y"}, "among 'images', 'texts', 'captions': name it"),
    ],
)
def test_columns_that_leave_a_choice_are_refused(
    tmp_path: Path, images: dict[str, Image], row: dict[str, Any], says: str
) -> None:
    image = embedded(images["pics/a.png"])
    source = parquet(
        tmp_path / "t.parquet", [{name: image if value is True else value for name, value in row.items()}]
    )
    with pytest.raises(UserError, match=says) as refused:
        write_shards(source, tmp_path / "out", settings=ALL_TRAIN)
    assert_is_a_sentence(refused.value)


def test_a_choice_of_columns_can_be_made(tmp_path: Path, images: dict[str, Image]) -> None:
    image, other = images["pics/a.png"], images["pics/d.jpeg"]
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    row = {
        "image": embedded(image),
        "mask": embedded(other),
        "conversations": turns("a", "b"),
        "more": asked,
        "text": "x",
    }
    source = parquet(tmp_path / "t.parquet", [row])
    meant: dict[str, list[Segment]] = {
        "conversations": [other, Text("a", False), Text("b")],
        "more": [other, Text("?", False), Text("!")],
        "text": [other, Text("x")],
    }
    for column, segments in meant.items():
        out = tmp_path / column
        write_shards(source, out, image_column="mask", text_column=column, settings=ALL_TRAIN)
        assert [list(document.segments) for document in written(out)] == [segments]


SCALARS = (
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4) | st.sampled_from(["pics/a.png", "<image>"])
)
NAMES = ["image", "images", "text", "texts", "conversations", "segments", "bytes", "path", "user", "assistant", "from"]
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*NAMES, "value"]), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=3 * settings.default.max_examples)
@given(rows=st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4), min_size=1, max_size=4))
def test_any_rows_of_json_are_read_counted_or_refused(
    tmp_path: Path, images: dict[str, Image], rows: list[dict]
) -> None:
    root = tmp_path / f"{next(counter)}"
    root.mkdir()
    try:
        report = write_shards(lines(root / "t.jsonl", rows), root / "out", images=tmp_path, settings=ALL_TRAIN)
    except UserError as error:
        assert_is_a_sentence(error)
    else:
        assert report.read == len(rows)
        assert_adds_up(report, root / "out")


ASKED = turns("<image>?", "!")
GOOD_ROWS: list[dict[str, Any]] = [
    {"image": "pics/a.png", "text": "x"},
    {"image": "pics/a.png", "conversations": ASKED},
    {"images": ["pics/a.png"], "texts": [{"user": "?", "assistant": "!"}]},
    {"images": ["pics/a.png", None], "texts": [None, "x"]},
    {"segments": [{"image": "pics/a.png"}, {"text": "x"}]},
    {"text": "x"},
]


@settings(max_examples=3 * settings.default.max_examples)
@given(data=st.data(), good=st.sampled_from(GOOD_ROWS))
def test_behind_a_good_row_any_row_of_json_is_read_or_counted(
    tmp_path: Path, images: dict[str, Image], data: st.DataObject, good: dict[str, Any]
) -> None:
    """Alike or not, in each of the layouts, in a table and as the metadata of a folder."""
    others = {name: VALUES | st.just(value) for name, value in good.items()}
    rows = [good, *data.draw(st.lists(st.fixed_dictionaries({}, optional=others), min_size=1, max_size=4))]
    root = tmp_path / f"{next(counter)}"
    root.mkdir()
    assert_read_or_counted(lines(root / "t.jsonl", rows), root / "out", len(rows), images=tmp_path)
    if {"image", "text"} <= good.keys():
        (root / "set" / "train" / "pics").mkdir(parents=True)
        (root / "set" / "train" / "pics" / "a.png").write_bytes(images["pics/a.png"].data)
        in_folder = [{("file_name" if name == "image" else name): row[name] for name in row} for row in rows]
        described(root / "set" / "train", "metadata.jsonl", in_folder)
        assert_read_or_counted(root / "set", root / "other", len(rows))


@settings(max_examples=3 * settings.default.max_examples)
@given(data=st.data())
def test_behind_a_good_row_any_row_of_parquet_is_read_or_counted(
    tmp_path: Path, images: dict[str, Image], data: st.DataObject
) -> None:
    """In each of the layouts that hold images themselves, with nulls, damage and other lengths anywhere."""
    good = images["pics/a.png"].data
    binary = st.none() | st.sampled_from([good, good[:40], b"", b"GIF89a", b"\xff\xd8\xff"])
    text = st.none() | st.sampled_from(["", "x", "pics/a.png", "a.gif", "<image>x", "human", "gpt"])

    def struct(**fields: tuple[Any, Any]) -> tuple[Any, Any]:
        kinds = [(name, kind) for name, (kind, _) in fields.items()]
        return pyarrow.struct(kinds), st.none() | st.fixed_dictionaries({name: of for name, (_, of) in fields.items()})

    def listed(of: tuple[Any, Any]) -> tuple[Any, Any]:
        return pyarrow.list_(of[0]), st.none() | st.lists(of[1], max_size=3)

    strings, blobs = (pyarrow.string(), text), (pyarrow.binary(), binary)
    image, seen = struct(bytes=blobs, path=strings), embedded(images["pics/a.png"])
    exchange, turn = struct(user=strings, assistant=strings), struct(**{"from": strings, "value": strings})
    asked = [{"user": "?", "assistant": "!"}]
    layouts: list[dict[str, tuple[tuple[Any, Any], Any]]] = [
        {"image": (image, seen), "text": (strings, "x")},
        {"picture": (blobs, good), "caption": (strings, "x")},
        {"images": (listed(image), [seen]), "text": (strings, "x")},
        {"image": (image, seen), "conversations": (listed(turn), ASKED)},
        {"images": (listed(image), [seen]), "texts": (listed(exchange), asked)},
        {"images": (listed(image), [seen, None]), "texts": (listed(strings), [None, "x"])},
        {"segments": (listed(struct(text=strings, image=image)), [{"text": "x", "image": None}])},
    ]
    layout, count = data.draw(st.sampled_from(layouts)), data.draw(st.integers(1, 4))
    columns = {
        name: pyarrow.array([first, *data.draw(st.lists(values, min_size=count, max_size=count))], kind)
        for name, ((kind, values), first) in layout.items()
    }
    root = tmp_path / f"{next(counter)}"
    root.mkdir()
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "t.parquet")
    assert_read_or_counted(root / "t.parquet", root / "out", count + 1, images=tmp_path)


def assert_read_or_counted(source: Path, out: Path, rows: int, images: Path | None = None) -> None:
    report = write_shards(source, out, images=images, settings=ALL_TRAIN)
    assert report.read == rows
    assert report.total.written >= 1
    assert_adds_up(report, out)


@pytest.mark.parametrize("value", ["a.png", "a.gif", "a.mp4", ["a.png", "b.png"]])
def test_a_table_that_names_media_in_another_column_is_no_table_of_texts(tmp_path: Path, value: Any) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "x", "shown": value}))
    with pytest.raises(UserError, match="seems to name images in 'shown'"):
        write_shards(tmp_path / "t.jsonl", tmp_path / "out", settings=ALL_TRAIN)


def test_what_is_wrong_in_other_tables_is_counted(tmp_path: Path, images: dict[str, Image]) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(
        b'image,text\npics/a.png,good\npics/a.png\npics/a.png,t,t\npics/a.png,"quoted" not\npics/a.png,\xff\n'
        + b"pics/a.png," + b"t" * 200_000 + b'\npics/a.png,good\npics/a.png,"never closed\npics/a.png,good\n'
    )  # fmt: skip
    report = write_shards(path, tmp_path / "csv", settings=ALL_TRAIN)
    assert report.total.skipped == {"row-columns": 2, "row-not-csv": 3, "text-not-utf8": 1}
    assert report.total.written == 3, "and the row after the quote that nobody closes"
    assert_adds_up(report, tmp_path / "csv")

    path = tmp_path / "t.json"
    path.write_text('[{"text": "good"}, {"text": oops}, 5, {"text": "a ]}, [{\\" b"}, {"text": "cut')
    report = write_shards(path, tmp_path / "json", settings=ALL_TRAIN)
    assert report.total.skipped == {"row-not-json": 3}
    assert [document.answer for document in written(tmp_path / "json")] == ["good", 'a ]}, [{" b']
    assert_adds_up(report, tmp_path / "json")

    path.write_text('[{"text": "good"},')  # cut between elements: what is missing counts as one row at least
    report = write_shards(path, tmp_path / "cut", settings=ALL_TRAIN)
    assert (report.read, report.total.skipped) == (2, {"row-not-json": 1})

    undecodable = pyarrow.array([b"good", b"\xff", None]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": undecodable}), tmp_path / "t.parquet")
    report = write_shards(tmp_path / "t.parquet", tmp_path / "parquet", settings=ALL_TRAIN)
    assert report.total.skipped == {"text-not-utf8": 1, "text-empty": 1}
    assert_adds_up(report, tmp_path / "parquet")

    rows = [{"conversations": [{"from": "gpt", "value": b"bytes"}]}, {"conversations": []}]
    with pytest.raises(UserError, match=r"\(text-type 1, chat-turns 1\)"):
        write_shards(parquet(tmp_path / "chat.parquet", rows), tmp_path / "chat", settings=ALL_TRAIN)


def test_the_report_shows_the_first_rows_of_each_reason_only(tmp_path: Path) -> None:
    rows = [{"text": "" if number % 2 else "x"} for number in range(100)]
    report = write_shards(lines(tmp_path / "t.jsonl", rows), tmp_path / "out", settings=MANY_SMALL)
    assert [each.row for each in report.total.examples["text-empty"]] == list(range(1, 2 * EXAMPLES, 2))
    assert report.total.skipped == {"text-empty": 50}
    assert "100 read, 50 written (" in report.summary()
    assert report.summary().endswith("50 skipped (text-empty 50)")
    assert_adds_up(report, tmp_path / "out")


counter = iter(range(10**9))


@settings(max_examples=settings.default.max_examples // 2)
@given(data=st.data())
def test_what_is_read_is_written_or_skipped(tmp_path: Path, bad_images: None, data: st.DataObject) -> None:
    root = tmp_path / f"{next(counter)}"
    root.mkdir()
    bad = [each for each in BAD_CAPTIONS if each[0] != "text-too-long"]
    chosen = data.draw(st.lists(st.sampled_from([("", GOOD), ("", GOOD), *bad]), max_size=40))
    rows = [GOOD, *(row for _, row in chosen)]
    asked = Settings(
        val_share=data.draw(st.sampled_from([0.0, 0.3, 0.9])),
        shard_megabytes=data.draw(st.sampled_from([0.001, 0.01, 1.0])),
    )
    report = write_shards(lines(root / "t.jsonl", rows), root / "out", images=tmp_path, settings=asked)
    assert report.read == len(rows)
    assert report.total.skipped == Counter(reason for reason, _ in chosen if reason)
    assert report.total.written == 1 + sum(not reason for reason, _ in chosen)
    assert_adds_up(report, root / "out")


@given(data=st.data())
def test_damaged_tables_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    root = tmp_path / f"{next(counter)}"
    root.mkdir()
    rows = [{"text": f'say "{number}", [ok]'} for number in range(8)]
    suffix = data.draw(st.sampled_from([".json", ".jsonl", ".csv"]))
    if suffix == ".csv":
        table(root / "t.csv", [["text", "n"], *([row["text"], "1"] for row in rows)])
    elif suffix == ".json":
        (root / "t.json").write_text(json.dumps(rows))
    else:
        lines(root / "t.jsonl", rows)
    source = root / f"t{suffix}"
    damaged = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(0, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.sampled_from(b'"[]{},\\\n\xff x'))
    source.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        report = write_shards(source, root / "out", text_column="text", settings=MANY_SMALL)
    except UserError as error:
        assert_is_a_sentence(error)
    else:
        assert_adds_up(report, root / "out")


# What is wrong with a whole run


def assert_is_a_sentence(error: UserError) -> None:
    said = str(error)
    assert "\n" not in said.strip(), said
    assert said.endswith("."), said


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.xlsx", b"x", FORMS),
        ("t.tar", b"x", "is a shard already, or holds files: unpack files with `tar xf "),
        ("t.tar.gz", b"x", "t.tar.gz is compressed: unpack it with `tar xzf "),
        ("t.TGZ", b"x", "t.TGZ is compressed: unpack it with `tar xzf "),
        ("t.jsonl.gz", b"x", "t.jsonl.gz is compressed: unpack it with `gunzip "),
        ("t.jsonl", b"", FORMS),
        ("t.jsonl", b"not json\n", FORMS),
        ("t.json", b"[]", FORMS),
        ("t.csv", b"image,text\n", FORMS),
        ("t.jsonl", b'{"conversations": [], "segments": []}\n', FORMS),
        ("t.jsonl", b'{"picture": "a.png", "caption": "x"}\n', FORMS),
        ("t.jsonl", b'{"caption": "x"}\n', FORMS),
        ("t.jsonl", b'{"image": "a.png", "says": "x"}\n', FORMS),
        ("t.jsonl", b"{}\n", FORMS),
        ("t.jsonl", b'{"img": "a.PNG", "text": "x"}\n', "--image-column img"),
        ("t.jsonl", b'{"image": "a.png", "path": "a.png", "text": "x"}\n', "(image, path): name one with --image-col"),
        ("t.jsonl", b'{"image": "a.png", "title": "x", "text": "x"}\n', "(title, text): name one with --text-column"),
        ("t.json", b'[{"text": "x"}] [{"text": "y"}]', "goes on after its list, at byte 15"),
        ("t.csv", b'"image"x,text\n', "The header of"),
        ("t.parquet", b"PAR1 no", "can't be read as Parquet"),
        (
            "t.jsonl",
            b'{"text": ""}\n',
            "no usable row (1 read, 0 written (0 in 0 train, 0 in 0 val shards), 1 skipped",
        ),
    ],
)
def test_a_source_of_no_known_form_is_refused_in_a_sentence(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        write_shards(tmp_path / name, tmp_path / "out")
    assert_is_a_sentence(refused.value)
    assert says in str(refused.value)
    assert str(tmp_path / name) in str(refused.value)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_folder_of_no_known_form_is_refused_in_a_sentence(tmp_path: Path, images: dict[str, Image]) -> None:
    (tmp_path / "none").mkdir()
    for folder, says in [
        ("none", "neither images nor .txt files"),
        ("pics", "no .txt beside them"),
        ("no", "neither"),
    ]:
        with pytest.raises(UserError, match=says) as refused:
            write_shards(tmp_path / folder, tmp_path / "out")
        assert_is_a_sentence(refused.value)
        assert FORMS in str(refused.value)


def test_wrong_settings_are_refused_in_a_sentence(tmp_path: Path, images: dict[str, Image]) -> None:
    captions = lines(tmp_path / "t.jsonl", [GOOD])
    chat = lines(tmp_path / "c.jsonl", [{"conversations": turns("?", "!")}])
    segments = lines(tmp_path / "s.jsonl", [{"segments": [{"text": "x"}]}])
    (tmp_path / "file").write_text("")
    out = tmp_path / "out"
    wrong: list[tuple[str, Callable[[], object]]] = [
        ("--val-share", lambda: Settings(val_share=1.0)),
        ("--val-share", lambda: Settings(val_share=float("nan"))),
        ("--shard-megabytes", lambda: Settings(shard_megabytes=0.0)),
        ("--processes", lambda: write_shards(captions, out, processes=0)),
        ("--image-column nothing is no column", lambda: write_shards(captions, out, image_column="nothing")),
        ("--text-column nothing is no column", lambda: write_shards(captions, out, text_column="nothing")),
        ("for other tables", lambda: write_shards(segments, out, text_column="segments")),
        ("--image-column nothing is no column", lambda: write_shards(chat, out, image_column="nothing")),
        ("for tables only", lambda: write_shards(tmp_path / "pics", out, text_column="text")),
        ("can't be written", lambda: write_shards(captions, tmp_path / "file" / "out")),
    ]
    for says, call in wrong:
        with pytest.raises(UserError, match=says) as refused:
            call()
        assert_is_a_sentence(refused.value)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = parquet_of_text(tmp_path, {})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'fuyu-e2e\[parquet\]'") as refused:
        write_shards(source, tmp_path / "out")
    assert_is_a_sentence(refused.value)


# The plan


def test_the_split_is_drawn_from_seed_and_row_number_alone() -> None:
    drawn = [[Settings(val_share=0.1, seed=seed).split(row) for row in range(5_000)] for seed in (0, 1)]
    for splits in drawn:
        assert 0.08 < splits.count("val") / len(splits) < 0.12
    assert 0.005 < sum(a == b == "val" for a, b in zip(*drawn, strict=True)) / 5_000 < 0.016
    more = Settings(val_share=0.2).split
    assert all(more(row) == "val" for row in range(5_000) if drawn[0][row] == "val")


def test_no_row_is_in_both_splits_and_none_is_lost(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}"} for number in range(500)]
    report = write_shards(lines(tmp_path / "t.jsonl", rows), tmp_path / "out", settings=Settings(val_share=0.1))
    splits = [{document.key for document in written(tmp_path / "out", f"{split}-*.tar")} for split in ("train", "val")]
    assert not splits[0] & splits[1]
    assert len(splits[0] | splits[1]) == len(rows)
    assert len(splits[1]) == report.splits["val"].written
    assert 25 < len(splits[1]) < 75


def test_shards_have_about_the_size_asked_for(tmp_path: Path, make_png: Callable[..., bytes]) -> None:
    for number in range(60):
        (tmp_path / f"{number}.png").write_bytes(make_png(10 + number, 20, seed=number))
    rows = [{"image": f"{number % 60}.png", "text": "x" * (1 + number % 700)} for number in range(1, 301)]
    size = 100_000
    settings = Settings(val_share=0.0, shard_megabytes=size / 1e6)
    report = write_shards(lines(tmp_path / "t.jsonl", rows), tmp_path / "out", settings=settings)
    *full, last = sorted(tmp_path.glob("out/*.tar"))
    assert len(full) > 5
    largest_sample, tar_end = 8_000, 10_240
    for path in full:
        assert size - largest_sample < path.stat().st_size <= size + tar_end
    assert last.stat().st_size <= size + tar_end
    assert report.total.written == 300


def test_rows_that_cannot_be_used_fill_shards_but_leave_no_empty_ones(tmp_path: Path) -> None:
    source = lines(tmp_path / "t.jsonl", [{"text": "x"}, *([{"text": 5}] * 150), *([{"text": "y"}] * 20)])
    report = write_shards(source, tmp_path / "out", settings=Settings(val_share=0.0, shard_megabytes=0.02))
    tars, stats = (list(tmp_path.glob(f"out/*{end}")) for end in (".tar", "_stats.json"))
    assert report.shards["train"] == len(tars) < len(stats)  # so a plan of nothing but bad rows is bounded, too
    assert_adds_up(report, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert write_shards(source, tmp_path / "out", settings=Settings(val_share=0.0, shard_megabytes=0.02)) == report
    assert contents(tmp_path / "out") == before


# The same bytes


def some_bad(path: Path, count: int) -> Path:
    """Rows of captions, some of which can't be used."""
    return lines(path, [{"image": "pics/a.png", "text": f"text {n}" if n % 9 else ""} for n in range(count)])


@pytest.fixture
def many(tmp_path: Path, images: dict[str, Image]) -> Path:
    """A source for about 30 small shards."""
    return some_bad(tmp_path / "many.jsonl", 300)


def test_two_processes_write_what_one_does(tmp_path: Path, many: Path) -> None:
    one = write_shards(many, tmp_path / "one", settings=MANY_SMALL)
    two = write_shards(many, tmp_path / "two", settings=MANY_SMALL, processes=2)
    assert len(list(tmp_path.glob("one/*.tar"))) > 20
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one == two


def test_an_interrupted_run_is_gone_on_with(tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    report = write_shards(many, out, settings=MANY_SMALL)
    whole = contents(out)
    names = sorted(path.stem for path in out.glob("*.tar"))
    (out / f"{names[0]}.tar").unlink()  # killed between the two renames
    (out / f"{names[1]}.tar").unlink()  # killed before
    (out / f"{names[1]}_stats.json").unlink()
    (out / f"{names[2]}.tar").write_bytes(whole[f"{names[2]}.tar"][:1_024])  # cut by someone else
    (out / f"{names[3]}_stats.json").write_text("{")
    (out / f"{names[4]}.tar.123.writing").write_bytes(b"half")
    (out / "report.json").unlink()
    written_again = []
    original = writing._write_shard
    monkeypatch.setattr(writing, "_write_shard", lambda *job: written_again.append(job[2].name) or original(*job))
    assert write_shards(many, out, settings=MANY_SMALL) == report
    assert sorted(written_again) == names[:4]
    assert contents(out) == whole


def test_a_failing_shard_leaves_nothing_of_itself(tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, written_rows = writing.document, iter(range(1_000))

    def full(sample: Any) -> Document:
        if next(written_rows) == 100:
            raise OSError(28, "No space left on device")
        return original(sample)

    monkeypatch.setattr(writing, "document", full)
    with pytest.raises(UserError, match="No space left on device") as refused:
        write_shards(many, tmp_path / "out", settings=MANY_SMALL)
    assert_is_a_sentence(refused.value)
    monkeypatch.undo()
    assert not list(tmp_path.glob("out/*.writing"))
    assert written(tmp_path / "out")  # the shards before it are whole
    write_shards(many, tmp_path / "out", settings=MANY_SMALL)
    write_shards(many, tmp_path / "whole", settings=MANY_SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def children(pid: int) -> Iterator[int]:
    for path in Path("/proc").glob(f"{pid}/task/*/children"):
        for child in path.read_text().split():
            yield int(child)
            yield from children(int(child))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds a killed run's processes in Linux's /proc")
def test_a_killed_run_leaves_no_process_and_is_gone_on_with(tmp_path: Path, images: dict[str, Image]) -> None:
    out, many = tmp_path / "out", some_bad(tmp_path / "many.jsonl", 600)
    code = "import sys; from fuyu_e2e.cli.shards_write import write; sys.exit(write(sys.argv[1:]))"
    arguments = [str(many), "--out", str(out), "--val-share", "0.2", "--shard-megabytes", "0.02", "--processes", "2"]
    run = subprocess.Popen([sys.executable, "-c", code, *arguments])
    deadline = time.monotonic() + 300
    while not list(out.glob("*.tar")) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    started = set(children(run.pid))
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert len(started) >= 2
    deadline = time.monotonic() + 60  # a new one: beside other work, the processes may have taken that long to begin
    while any(alive(pid) for pid in started) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(alive(pid) for pid in started)
    assert not (out / "report.json").exists()  # it was killed on its way
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    report = write_shards(many, out, settings=MANY_SMALL)
    assert len(before) < sum(report.shards.values())
    write_shards(many, tmp_path / "whole", settings=MANY_SMALL)
    assert contents(out) == contents(tmp_path / "whole")


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_folder_of_other_shards_is_refused(tmp_path: Path, images: dict[str, Image]) -> None:
    out = tmp_path / "out"
    source = lines(tmp_path / "t.jsonl", [GOOD, GOOD])
    write_shards(source, out, settings=ALL_TRAIN)
    whole = contents(out)
    changed: list[tuple[str, dict[str, Any]]] = [
        ("seed", {"settings": Settings(val_share=0.0, seed=1)}),
        ("val_share", {"settings": Settings(val_share=0.1)}),
        ("shard_megabytes", {"settings": Settings(val_share=0.0, shard_megabytes=1.0)}),
    ]
    for name, options in changed:
        with pytest.raises(UserError, match=rf"\({name} differ\): take an empty folder") as refused:
            write_shards(source, out, **options)
        assert_is_a_sentence(refused.value)
    other = lines(tmp_path / "other.jsonl", [GOOD, {**GOOD, "text": "else"}])
    with pytest.raises(UserError, match=r"fingerprint differ\): take an empty folder"):
        write_shards(other, out, settings=ALL_TRAIN)
    os.utime(tmp_path / "pics" / "a.png", (1, 1))
    with pytest.raises(UserError, match=r"fingerprint differ\): take an empty folder"):
        write_shards(source, out, settings=ALL_TRAIN)
    assert contents(out) == whole
    (out / "write-plan.json").unlink()
    with pytest.raises(UserError, match="did not write: take an empty folder"):
        write_shards(source, out, settings=ALL_TRAIN)


def test_a_source_that_yielded_nothing_leaves_nothing_and_can_be_mended_and_written_again(tmp_path: Path) -> None:
    source = lines(tmp_path / "t.jsonl", [{"text": ""}, {"text": ""}])
    with pytest.raises(UserError, match=rf"no usable row .* mend or replace text-empty 2 \(row 0 of {source}, row 1"):
        write_shards(source, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no usable row"):
        write_shards(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
    lines(source, [{"text": "x"}])
    assert write_shards(source, tmp_path / "out").total.written == 1


def test_a_source_that_shrinks_while_it_is_read_is_refused(
    tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = writing._begin

    def shrink(*planned: Any) -> None:
        original(*planned)
        os.truncate(many, 1_000)

    monkeypatch.setattr(writing, "_begin", shrink)
    with pytest.raises(UserError, match="was changed while it was read") as refused:
        write_shards(many, tmp_path / "out", settings=MANY_SMALL)
    assert_is_a_sentence(refused.value)


# The command


def test_the_command_counts_names_what_it_left_out_and_prints_the_next_commands(
    tmp_path: Path, images: dict[str, Image], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands run as they are printed, in a folder whose name a shell and a glob would take apart."""
    monkeypatch.chdir(tmp_path)
    source = lines(
        tmp_path / "t.jsonl", [GOOD, {**GOOD, "text": ""}, *[{**GOOD, "text": f"text {n}"} for n in range(9)]]
    )
    assert write([str(source), "--out", "my [own] shards", "--val-share", "0.3", "--processes", "1"]) == 0
    said = capsys.readouterr().out
    assert "11 read, 10 written (8 in 1 train, 2 in 1 val shards), 1 skipped (caption-empty 1)\n" in said
    assert f"left out: caption-empty 1 (row 1 of {source})\n" in said
    assert "2 documents to validate on are few" in said
    _, commands = said.replace("\\\n", "").split("Next:\n")
    tokenizer, fit = (shlex.split(command) for command in commands.splitlines())
    assert tokenizer[:3] == ["fuyu-e2e", "tokenizer", "train"]
    assert fit[:4] == ["fuyu-e2e", "fit", "--config", "recipes/own-pictures.yaml"]
    named = dict(zip(fit[4::2], fit[5::2], strict=True))
    assert named["--data.tokenizer"] == tokenizer[tokenizer.index("--out") + 1] == "my [own] shards/tokenizer.model"
    assert tokenizer[tokenizer.index("--shards") + 1] == named["--data.train"]
    assert f"\nto train on:    {shlex.quote(named['--data.train'])}\n" in said
    assert f"\nto validate on: {shlex.quote(named['--data.val'])}\n" in said
    assert expand_patterns(named["--data.train"]) == ("my [own] shards/train-00000.tar",)
    assert expand_patterns(named["--data.val"]) == ("my [own] shards/val-00000.tar",)


def test_without_documents_to_validate_on_the_next_commands_name_none(
    tmp_path: Path, images: dict[str, Image], capsys: pytest.CaptureFixture
) -> None:
    source = lines(tmp_path / "t.jsonl", [GOOD])
    assert write([str(source), "--out", str(tmp_path / "out"), "--val-share", "0"]) == 0
    said = capsys.readouterr().out
    assert "No documents to validate on are left.\n" in said
    assert "--data.val null\n" in said + "\n"  # or the recipe's own pattern would hold


def test_an_interrupted_command_says_how_to_go_on(
    tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    original = writing._write_shard

    def interrupted(*job: Any) -> Any:
        if job[2].name == "train-00003":
            raise KeyboardInterrupt
        return original(*job)

    monkeypatch.setattr(writing, "_write_shard", interrupted)
    arguments = [str(many), "--out", str(tmp_path / "out"), "--shard-megabytes", "0.02", "--processes", "1"]
    assert write(arguments) == INTERRUPTED == 130
    assert "the same command" in capsys.readouterr().err
    assert len(list(tmp_path.glob("out/*.tar"))) == 3
