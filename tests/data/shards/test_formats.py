"""Every format of sample becomes a document; every sample that can't is counted by reason."""

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from fuyu_e2e.data.document import Document, Image, Segment, Text
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards import formats
from fuyu_e2e.data.shards.formats import TEXT_BYTES, Sample, document
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.errors import UnusableSampleError, UserError

Shard = Callable[[dict[str, bytes | str | dict | list]], Path]


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """Writes a tar of members by name."""

    def write(members: dict[str, Any]) -> Path:
        path = tmp_path / "shard.tar"
        with tarfile.open(path, "w") as tar:
            for name, content in members.items():
                data = (
                    content
                    if isinstance(content, bytes)
                    else content.encode()
                    if isinstance(content, str)
                    else json.dumps(content).encode()
                )
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


def read(path: Path) -> list[Document]:
    stats = SampleStats()
    found = list(read_documents(path, stats))
    assert stats.read == len(found)
    assert not stats.skipped
    return found


def reasons(path: Path) -> dict[str, int]:
    stats = SampleStats()
    used = len(list(read_documents(path, stats)))
    assert stats.read == used + stats.skipped.total()
    assert len(stats.examples) == len(stats.skipped)
    return dict(stats.skipped)


A, B = Image(b"jpeg a"), Image(b"png b")


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "JPG"])
def test_caption_in_text(shard: Shard, extension: str) -> None:
    assert read(shard({f"0.{extension}": A.data, "0.txt": "\ufeffa cat\n"})) == [Document("0", (A, Text("a cat")))]


def test_caption_in_json_and_both_as_img2dataset_writes_them(shard: Shard) -> None:
    described = {
        "caption": "from json",
        "url": "http://x",
        "key": "0",
        "status": "success",
        "width": 256,
        "exif": "{}",
    }
    assert read(shard({"0.jpg": A.data, "0.json": described})) == [Document("0", (A, Text("from json")))]
    both = {"0.jpg": A.data, "0.txt": "from text", "0.json": described}
    assert read(shard(both)) == [Document("0", (A, Text("from text")))]


def test_shards_of_webdatasets_own_writer(tmp_path: Path, make_png: Callable[..., bytes]) -> None:
    with webdataset.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(7):
            sample = {
                "__key__": f"{number:09}",
                "png": make_png(9, 5),
                "txt": f"picture {number}",
                "json": {"width": 5},
            }
            writer.write({**sample, "png": sample["png"]})
    found = [document for file in sorted(tmp_path.glob("*.tar")) for document in read(file)]
    assert [document.answer for document in found] == [f"picture {number}" for number in range(7)]
    assert found[0].segments[0] == Image(make_png(9, 5))


def test_chat_in_llavas_form(shard: Shard) -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    asked = [Text("What is it?", False), Text("A cat."), Text("Sure?", False), Text("Yes.")]
    described = {"id": "7", "image": "7.jpg", "conversations": turns}
    assert read(shard({"7.jpg": A.data, "7.json": described})) == [Document("7", (A, *asked))]
    no_image = {"conversations": [{**turn, "value": turn["value"].removeprefix("<image>\n")} for turn in turns]}
    assert read(shard({"7.json": no_image})) == [Document("7", tuple(asked))]
    assert read(shard({"7.jpg": A.data, "7.json": no_image})) == [Document("7", (A, *asked))]


def test_chat_images_stand_where_their_placeholders_stand(shard: Shard) -> None:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "user", "value": "Compare <image>\nwith\n<image>"},
        {"from": "assistant", "value": "Same."},
    ]
    found = read(shard({"7.0.jpg": A.data, "7.1.png": B.data, "7.json": {"conversations": turns}}))
    expected = (Text("Be brief.", False), Text("Compare ", False), A, Text("with", False), B, Text("Same."))
    assert found == [Document("7", expected)]


TURNS = {
    "LLaVA's, as Megatron-LM's and NeMo's converters for Energon write it": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
    ],
    "of a chat template": [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "A cat."},
    ],
    "of both, filled up with nulls": [
        {"from": "human", "value": "<image>\nWhat is it?", "role": None, "content": None},
        {"from": None, "value": None, "role": "assistant", "content": "A cat."},
    ],
}


@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
def test_a_list_of_turns_is_the_conversation_that_an_object_would_hold(shard: Shard, turns: list[dict]) -> None:
    meant = [Document("7", (A, Text("What is it?", False), Text("A cat.")))]
    assert read(shard({"7.jpg": A.data, "7.json": turns})) == meant
    assert read(shard({"7.jpg": A.data, "7.json": {"conversations": turns}})) == meant
    assert reasons(shard({"7.json": turns})) == {"chat-images": 1}, "its image is missing"
    both = shard({"7.jpg": A.data, "7.json": turns, "7.txt": "a caption"})
    assert read(both) == read(shard({"7.jpg": A.data, "7.json": {"conversations": turns}, "7.txt": "a caption"}))


def test_images_pickled_into_one_member_are_not_missed_in_silence(shard: Shard) -> None:
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]
    for name in ("jpgs", "videos"):
        assert reasons(shard({f"7.{name}": b"pickled", "7.json": turns})) == {"image-extension": 1}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["human", "gpt", "<image>", "x.jpg"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["from", "value", "role", "content", "conversations", "segments", "text", "image", "images", "caption"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=5 * settings.default.max_examples)
@given(parsed=JSON, image=st.booleans())
def test_any_json_is_read_or_counted(parsed: Any, image: bool) -> None:
    images = {"jpg": b"x"} if image else {}
    said = ""
    try:
        assert document(Sample("7", "s.tar", {**images, "json": json.dumps(parsed).encode()})).key == "7"
    except UnusableSampleError as error:
        said = str(error)
    assert not said or "s.tar: 7" in said


def test_interleaved_images_and_text(shard: Shard) -> None:
    segments = [
        {"text": "one"},
        {"image": "0.jpg"},
        {"text": "two", "loss": False},
        {"image": "1.png"},
        {"image": "0.jpg"},
    ]
    found = read(shard({"3.json": {"segments": segments}, "3.0.jpg": A.data, "3.1.png": B.data}))
    assert found == [Document("3", (Text("one"), A, Text("two", False), B, A))]


def test_several_images_come_by_number_or_as_the_json_lists_them(shard: Shard) -> None:
    images = {f"7.{number}.png": str(number).encode() for number in range(12)}
    chat = {"conversations": [*turn("human", "<image>" * 12)["conversations"], *turn()["conversations"]]}

    def order(described: dict) -> list[int]:
        [document] = read(shard({**images, "7.json": described}))
        return [int(segment.data) for segment in document.segments if isinstance(segment, Image)]

    assert order(chat) == [*range(12)]
    assert order(chat | {"image": [f"elsewhere/{number}.png" for number in "ab"]}) == [*range(12)]
    backwards = [*range(11, -1, -1)]
    assert order(chat | {"image": [f"folder/7.{number}.PNG" for number in backwards]}) == backwards
    assert reasons(shard({**images, "7.json": chat | {"images": ["7.1.png", "7.12.png"]}})) == {"chat-images": 1}


@pytest.mark.parametrize("beside", ['{"caption": "x", "score": NaN}', "[1]", '{"caption": '])
def test_a_caption_needs_no_json(shard: Shard, beside: str) -> None:
    found = read(shard({"0.jpg": A.data, "0.txt": "a caption", "0.json": beside}))
    assert found == [Document("0", (A, Text("a caption")))]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({f"v1.{number:06}.{kind}": b"x" for number in range(50) for kind in ("jpg", "txt")}, "50 samples with dots"),
        ({"img_2.5x.jpg": b"x", "img_2.5x.txt": b"x"}, "a sample with dots"),
    ],
)
def test_names_with_dots_are_counted_in_one_short_sentence(shard: Shard, members: dict, said: str) -> None:
    stats = SampleStats()
    assert list(read_documents(shard(members), stats)) == []
    sentence = stats.examples["format-unknown"]
    assert said in sentence
    assert len(sentence) < 300


def test_plain_text_and_lines_of_json(shard: Shard) -> None:
    assert read(shard({"0.txt": "hello"})) == [Document("0", (Text("hello"),))]
    lines = b'{"text": "a"}\n\n{"text": " b "}\n{"conversations": [{"from": "gpt", "value": "c"}]}\n'
    found = read(shard({"0.jsonl": lines}))
    assert [(document.key, document.answer) for document in found] == [("0/0", "a"), ("0/1", " b "), ("0/2", "c")]


def test_a_json_of_unknown_keys_is_told_by_them(shard: Shard) -> None:
    stats = SampleStats()
    assert list(read_documents(shard({"0.jpg": b"x", "0.json": {"prompt": "?", "answer": "x"}}), stats)) == []
    assert "0 has only jpg, json, whose json has only 'prompt', 'answer'" in stats.examples["format-unknown"]


@pytest.mark.parametrize("name", ["0.json", "0.jsonl"])
def test_messages_are_conversations(shard: Shard, name: str) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"},
             {"role": "assistant", "content": "So."}]  # fmt: skip
    [named], [known] = (read(shard({name: json.dumps({key: turns})})) for key in ("messages", "conversations"))
    assert named.segments == known.segments == (Text("Be brief.", False), Text("Why?", False), Text("So."))


def of_answer(described: dict[str, Any], images: dict[str, Image], sample: Sample) -> tuple[Segment, ...]:
    return (*images.values(), Text(described["answer"]))


def test_a_format_is_no_text_alone_unless_its_line_says_so(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formats.FORMATS, "answer", of_answer)
    assert read(shard({"0.jpg": A.data, "0.json": {"answer": "a"}})) == [Document("0", (A, Text("a")))]
    alone = shard({"0.json": {"answer": "a"}})
    assert reasons(alone) == {"image-missing": 1}
    monkeypatch.setattr(formats, "TEXT_ALONE", (*formats.TEXT_ALONE, "answer"))
    assert read(alone) == [Document("0", (Text("a"),))]


WRONG_READERS = {
    "raises KeyError: 'b' (test_formats.py, line ": lambda described, images, sample: (Text(described["b"]),),
    "raises Type": lambda described, images, sample: (Text(5),),  # the tests' own type checker comes first
    "raises UnidentifiedImageError: cannot identify": lambda described, images, sample: Pillow.open(io.BytesIO()),
    "raises TypeError: <lambda>() takes 0 positional": lambda: (),
    "returns a NoneType, where a tuple of Text and Image is expected": lambda described, images, sample: None,
    "returns a generator, where": lambda described, images, sample: (image for image in images.values()),
    "returns a str at place 1, where Text or Image": lambda described, images, sample: (*images.values(), "a"),
}


@pytest.mark.parametrize(("said", "reader"), WRONG_READERS.items(), ids=WRONG_READERS)
def test_a_mistake_in_a_reader_is_said_with_the_sample(
    shard: Shard, said: str, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(formats.FORMATS, "answer", reader)
    path = shard({"a/7.jpg": A.data, "a/7.json": {"answer": "a"}})
    with pytest.raises(UserError, match=re.escape(f"{path}: a/7: the reader of 'answer' {said}")):
        read(path)


def turn(speaker: object = "gpt", value: object = "a") -> dict:
    return {"conversations": [{"from": speaker, "value": value}]}


BAD = {
    "empty caption": ({"0.jpg": b"x", "0.txt": " \n"}, "caption-empty"),
    "empty text": ({"0.txt": ""}, "text-empty"),
    "image alone": ({"0.jpg": b"x"}, "format-unknown"),
    "nothing known": ({"0.npy": b"x"}, "format-unknown"),
    "film": ({"0.mp4": b"x", "0.txt": "x"}, "image-extension"),
    "image of a kind that is not read": ({"0.GIF": b"x", "0.json": turn()}, "image-extension"),
    "chat about a film": (
        {"0.json": {"conversations": [*turn("human", "<video>\nWhat?")["conversations"], *turn()["conversations"]]}},
        "image-extension",
    ),
    "image named but not there": ({"0.json": {"image": "0.jpg", **turn()}}, "image-missing"),
    "images named but not there": ({"0.json": {"images": ["0.jpg"], "caption": "x"}}, "image-missing"),
    "line that names an image": ({"0.jsonl": '{"image": "0.jpg", "text": "x"}'}, "image-missing"),
    "code": ({"0.pyd": b"x", "0.pkl": b"x", "0.pth": b"x", "0.pickle": b"x"}, "format-unknown"),
    "two images for a caption": ({"0.a.jpg": b"x", "0.b.jpg": b"x", "0.txt": "x"}, "caption-of-several-images"),
    "invalid UTF-8": ({"0.txt": b"\xff\xfe"}, "text-not-utf8"),
    "huge text": ({"0.txt": b"a" * (TEXT_BYTES + 1)}, "text-too-long"),
    "NaN": ({"0.json": '{"caption": "x", "score": NaN}', "0.jpg": b"x"}, "json-invalid"),
    "no object": ({"0.json": "[1]"}, "json-invalid"),
    "list of turns and something else": ({"0.json": [*turn()["conversations"], 1]}, "json-invalid"),
    "list of no turns": ({"0.jpg": b"x", "0.json": []}, "json-invalid"),
    "turns without an answer": ({"0.jpg": b"x", "0.json": [{"role": "user", "content": "x"}]}, "chat-no-answer"),
    "turn in parts": ({"0.json": [{"role": "assistant", "content": [{"type": "text", "text": "x"}]}]}, "json-type"),
    "deep nesting": ({"0.json": "[" * 100_000}, "json-invalid"),
    "broken JSON": ({"0.json": '{"caption": '}, "json-invalid"),
    "caption of another type": ({"0.json": {"caption": 3}, "0.jpg": b"x"}, "json-type"),
    "chat without turns": ({"0.json": {"conversations": []}}, "chat-turns"),
    "chat of strings": ({"0.json": {"conversations": ["hi"]}}, "chat-speaker"),
    "unknown speaker": ({"0.json": turn("robot")}, "chat-speaker"),
    "speaker of another type": ({"0.json": turn(["gpt"])}, "chat-speaker"),
    "chat without an answer": ({"0.json": turn("human")}, "chat-no-answer"),
    "turn without text": ({"0.json": turn(value=None)}, "json-type"),
    "more placeholders than images": ({"0.jpg": b"x", "0.json": turn(value="<image> <image>")}, "chat-images"),
    "segments of another type": ({"0.json": {"segments": "x"}}, "segments-list"),
    "segment of no kind": ({"0.json": {"segments": [{"video": "x"}]}}, "segments-kind"),
    "segment image missing": ({"0.json": {"segments": [{"image": "9.jpg"}]}}, "segments-image"),
    "segment loss of another type": ({"0.json": {"segments": [{"text": "x", "loss": "no"}]}}, "segments-loss"),
    "line of nothing known": ({"0.jsonl": '{"title": "x"}'}, "format-unknown"),
    "line that is empty text": ({"0.jsonl": '{"text": " "}'}, "text-empty"),
}


@pytest.mark.parametrize(("members", "reason"), BAD.values(), ids=BAD)
def test_bad_samples_are_counted_and_the_next_one_is_read(shard: Shard, members: dict, reason: str) -> None:
    path = shard({**members, "good.txt": "still read"})
    assert reasons(path) == {reason: 1}
    assert [document.answer for document in read_documents(path, SampleStats())] == ["still read"]
