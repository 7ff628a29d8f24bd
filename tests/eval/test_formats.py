"""Files laid out as the public ones are become questions, and what is wrong with one is said with the entry's name."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.data.document import Image, Text
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.errors import UserError
from fuyu_e2e.eval.formats import READERS
from fuyu_e2e.eval.question import Question

LICENSE = {"url": "http://creativecommons.org/licenses/by/4.0/", "name": "Creative Commons Attribution 4.0"}
VQA_INFO = {
    "description": "This is v2.0 of the VQA dataset.",
    "url": "http://visualqa.org",
    "version": "2.0",
    "year": 2017,
    "contributor": "VQA Team",
    "date_created": "2017-04-26 17:00:44",
}


def vqa_answers(*texts: str) -> list[dict[str, Any]]:
    return [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(texts, 1)]


VQA_QUESTIONS = {
    "info": VQA_INFO,
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "license": LICENSE,
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 42, "question": "Is the dog {waiting}?", "question_id": 42001},
        {"image_id": 42, "question": "What color is it?", "question_id": 42002},
        {"image_id": 262148, "question": "How many?", "question_id": 262148000},
    ],
}
VQA_ANNOTATIONS = {
    "info": VQA_INFO,
    "license": LICENSE,
    "data_subtype": "val2014",
    "annotations": [
        {
            "question_type": "how many",
            "multiple_choice_answer": "2",
            "answers": vqa_answers(*["2"] * 8, "3", "two"),
            "image_id": 262148,
            "answer_type": "number",
            "question_id": 262148000,
        },
        {
            "question_type": "is the",
            "multiple_choice_answer": "yes",
            "answers": vqa_answers(*["yes"] * 10),
            "image_id": 42,
            "answer_type": "yes/no",
            "question_id": 42001,
        },
        {
            "question_type": "what color is",
            "multiple_choice_answer": "brown",
            "answers": vqa_answers(*["brown"] * 9, "tan"),
            "image_id": 42,
            "answer_type": "other",
            "question_id": 42002,
        },
    ],
    "data_type": "mscoco",
}
COCO = {
    "info": {"description": "This is stable 1.0 version of the 2014 MS COCO dataset.", "year": 2014},
    "images": [
        {
            "license": 3,
            "file_name": "COCO_val2014_000000391895.jpg",
            "coco_url": "http://mscoco.org/images/391895",
            "height": 360,
            "width": 640,
            "date_captured": "2013-11-14 11:18:45",
            "flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg",
            "id": 391895,
        },
        {"license": 2, "file_name": "COCO_val2014_000000060623.jpg", "height": 427, "width": 640, "id": 60623},
    ],
    "licenses": [{"url": "http://creativecommons.org/licenses/by-nc-sa/2.0/", "id": 1, "name": "Attribution"}],
    "annotations": [
        {"image_id": 391895, "id": 770337, "caption": "A man with a red helmet on a small moped. "},
        {"image_id": 60623, "id": 1, "caption": "A young girl smells a lit candle."},
        {"image_id": 391895, "id": 771687, "caption": "Man riding a motor bike on a dirt road."},
    ],
    "type": "captions",
}
TEXTVQA = {
    "dataset_type": "val",
    "dataset_name": "textvqa",
    "dataset_version": "0.5.1",
    "data": [
        {
            "question": "what is the brand of this camera?",
            "image_id": "003a8ae2ef43b901",
            "image_classes": ["Cassette deck", "Printer"],
            "flickr_original_url": "https://farm2.staticflickr.com/4/7_o.jpg",
            "flickr_300k_url": "https://c4.staticflickr.com/4/7_z.jpg",
            "image_width": 1024,
            "image_height": 664,
            "answers": ["nous les gosses", "dakota", "clos culombu", *["dakota digital"] * 7],
            "question_tokens": ["what", "is", "the", "brand", "of", "this", "camera"],
            "question_id": 34602,
            "set_name": "val",
        }
    ],
}
DOCVQA = {
    "dataset_name": "SP-DocVQA",
    "dataset_version": "1.0",
    "dataset_split": "val",
    "data": [
        {
            "questionId": 49153,
            "question": "What is the ‘actual’ value per 1000?",
            "question_types": ["figure/diagram", "form"],
            "image": "documents/pybv0228_81.png",
            "docId": 14465,
            "ucsf_document_id": "pybv0228",
            "ucsf_document_page_no": "81",
            "answers": ["0.28", ".28"],
            "data_split": "val",
        }
    ],
}
IMAGES = {
    "vqav2": ["COCO_val2014_000000000042.jpg", "COCO_val2014_000000262148.jpg"],
    "coco_captions": ["COCO_val2014_000000391895.jpg", "COCO_val2014_000000060623.jpg"],
    "textvqa": ["003a8ae2ef43b901.jpg"],
    "docvqa": ["documents/pybv0228_81.png"],
}
FILES: dict[str, dict[str, Any]] = {
    "vqav2": {"questions": VQA_QUESTIONS, "annotations": VQA_ANNOTATIONS},
    "coco_captions": {"annotations": COCO},
    "textvqa": {"annotations": TEXTVQA},
    "docvqa": {"annotations": DOCVQA},
}


@dataclass
class Benchmark:
    """A benchmark on disk, whose files can be changed before it is read."""

    folder: Path
    name: str
    files: dict[str, Any]

    def read(self, **prompt: str) -> list[Question]:
        self.stats = SampleStats()
        for role, content in self.files.items():
            (self.folder / f"{role}.json").write_text(json.dumps(content))
        paths = {role: str(self.folder / f"{role}.json") for role in self.files}
        return list(READERS[self.name](**paths, images=str(self.folder / "images"), stats=self.stats, **prompt))


def lay_out(folder: Path, name: str) -> Benchmark:
    for image in IMAGES[name]:
        path = folder / "images" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.encode())
    return Benchmark(folder, name, copy.deepcopy(FILES[name]))


def image_of(question: Question) -> Image:
    segment = question.document.segments[0]
    assert isinstance(segment, Image)
    return segment


def test_vqav2_keeps_ten_answers_and_its_types(tmp_path: Path) -> None:
    benchmark = lay_out(tmp_path, "vqav2")
    dog, colour, count = benchmark.read(prompt="Q: {question} A:")
    assert [question.document.key for question in (dog, colour, count)] == ["42001", "42002", "262148000"]
    assert dog.document.segments == (
        Image(b"COCO_val2014_000000000042.jpg"),
        Text("Q: Is the dog {waiting}? A:", loss=False),
    )
    assert dog.image == colour.image == "COCO_val2014_000000000042.jpg"
    assert image_of(count) == Image(b"COCO_val2014_000000262148.jpg")
    assert count.references == ("2",) * 8 + ("3", "two")
    assert count.groups == {"answer_type": "number", "question_type": "how many"}
    assert benchmark.stats.read == 3


def test_captions_of_an_image_are_its_references(tmp_path: Path) -> None:
    man, girl = lay_out(tmp_path, "coco_captions").read()
    assert man.document.key == "391895"
    assert man.document.segments == (Image(b"COCO_val2014_000000391895.jpg"),)
    assert man.references == (
        "A man with a red helmet on a small moped. ",
        "Man riding a motor bike on a dirt road.",
    )
    assert girl.references == ("A young girl smells a lit candle.",)
    assert girl.image == "COCO_val2014_000000060623.jpg"


def test_textvqa_finds_images_by_their_id(tmp_path: Path) -> None:
    (camera,) = lay_out(tmp_path, "textvqa").read()
    assert camera.document.key == "34602"
    assert camera.document.segments[1] == Text("what is the brand of this camera?", loss=False)
    assert image_of(camera) == Image(b"003a8ae2ef43b901.jpg")
    assert camera.references.count("dakota digital") == 7
    assert len(camera.references) == 10


def test_docvqa_groups_by_each_of_its_types(tmp_path: Path) -> None:
    benchmark = lay_out(tmp_path, "docvqa")
    (value,) = benchmark.read()
    assert value.document.key == "49153"
    assert image_of(value) == Image(b"documents/pybv0228_81.png")
    assert value.references == ("0.28", ".28")
    assert value.groups == {"figure/diagram": "yes", "form": "yes"}
    del benchmark.files["annotations"]["data"][0]["question_types"]
    assert benchmark.read()[0].groups == {}


@pytest.mark.parametrize("name", READERS)
def test_prompts_carry_no_loss_and_an_answer_is_begun_as_in_training(
    name: str, tmp_path: Path, builder: SequenceBuilder, make_png: Callable[..., bytes]
) -> None:
    benchmark = lay_out(tmp_path, name)
    for image in IMAGES[name]:
        (tmp_path / "images" / image).write_bytes(make_png(8, 8))
    for question in benchmark.read():
        sequence = builder.prompt(question.document)
        assert not sequence.loss.any()
        asked = len(question.document.segments) == 2
        assert (sequence.tokens[-1] == builder.tokenizer.answer_id) == asked


def test_a_prompt_without_a_place_for_the_question_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must hold \{question\}"):
        lay_out(tmp_path / "a", "textvqa").read(prompt="{qestion}")
    with pytest.raises(UserError, match=r"captions answer no question"):
        lay_out(tmp_path / "b", "coco_captions").read(prompt="{question}")
    (man, _) = lay_out(tmp_path / "c", "coco_captions").read(prompt="Describe it.")
    assert man.document.segments[1] == Text("Describe it.", loss=False)


ESCAPES = ["../secret.png", "documents/../../secret.png", "/etc/hostname", "..\\secret.png", "C:secret.png"]


@pytest.mark.parametrize("escape", [*ESCAPES, "ABSOLUTE"])
@pytest.mark.parametrize(("name", "field"), [("docvqa", "image"), ("coco_captions", "file_name")])
def test_no_name_leads_out_of_the_folder_of_images(escape: str, name: str, field: str, tmp_path: Path) -> None:
    benchmark = lay_out(tmp_path, name)
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    listed = "data" if name == "docvqa" else "images"
    benchmark.files["annotations"][listed][0][field] = str(secret) if escape == "ABSOLUTE" else escape
    with pytest.raises(UserError, match="leads out of its folder"):
        benchmark.read()


def test_no_id_leads_out_of_it_either(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"secret")
    textvqa = lay_out(tmp_path, "textvqa")
    textvqa.files["annotations"]["data"][0]["image_id"] = "../x"
    with pytest.raises(UserError, match="leads out of its folder"):
        textvqa.read()
    vqa = lay_out(tmp_path, "vqav2")
    vqa.files["questions"]["data_subtype"] = "/../../x"
    with pytest.raises(UserError, match="leads out of its folder"):
        vqa.read()


@pytest.mark.parametrize("name", READERS)
def test_a_missing_image_is_found_before_the_first_question(name: str, tmp_path: Path) -> None:
    benchmark = lay_out(tmp_path, name)
    (tmp_path / "images" / IMAGES[name][-1]).unlink()
    with pytest.raises(UserError, match=rf"{len(IMAGES[name])} images, but 1 of them .* {IMAGES[name][-1]!r}"):
        benchmark.read()
    assert benchmark.stats.read == 0


@pytest.mark.parametrize("odd", ["a" * 5000 + ".png", "a\0.png", "a\ud800.png", "", "documents"])
def test_a_name_that_no_file_can_have_is_missing(odd: str, tmp_path: Path) -> None:
    benchmark = lay_out(tmp_path, "docvqa")
    benchmark.files["annotations"]["data"][0]["image"] = odd
    with pytest.raises(UserError, match="no files in"):
        benchmark.read()


def change(benchmark: Benchmark, role: str, path: tuple[str | int, ...], value: Any) -> None:
    """Sets or, for None, takes away what is at a path."""
    place = benchmark.files[role]
    for step in path[:-1]:
        place = place[step]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value


@pytest.mark.parametrize(
    ("name", "role", "path", "value", "message"),
    [
        ("vqav2", "questions", ("questions",), None, "questions.json: questions is missing, but must be a list"),
        ("vqav2", "questions", ("questions", 1), 7, r"questions.json: questions\[1\] is 7, but must be an object"),
        ("vqav2", "questions", ("questions", 1, "question"), 7, r"questions\[1\]: question is 7, but must be a text"),
        ("vqav2", "questions", ("questions", 2, "image_id"), 1.5, r"questions\[2\]: image_id is 1.5"),
        ("vqav2", "questions", ("questions", 2, "question_id"), True, r"questions\[2\]: question_id is True"),
        ("vqav2", "questions", ("questions", 1, "question_id"), 42001, "two entries are called '42001'"),
        ("vqav2", "questions", ("data_subtype",), None, "questions.json: data_subtype is missing"),
        ("vqav2", "annotations", ("annotations", 1), None, r"questions\[0\]: .* has no annotation of question 42001"),
        ("vqav2", "annotations", ("annotations", 0, "question_id"), 42001, r"annotations\[1\]: there is another"),
        ("vqav2", "annotations", ("annotations", 0, "answers"), [], r"annotations\[0\]: answers is \[\]"),
        ("vqav2", "annotations", ("annotations", 0, "answers", 3, "answer"), None, r"answers\[3\]: answer is missing"),
        ("vqav2", "annotations", ("annotations", 0, "answer_type"), None, r"annotations\[0\]: answer_type is missing"),
        ("coco_captions", "annotations", ("annotations", 1), None, r"images\[1\]: there is no caption of image 60623"),
        ("coco_captions", "annotations", ("annotations", 1, "image_id"), 5, r"annotations\[1\]: there is no image 5"),
        (
            "coco_captions",
            "annotations",
            ("images", 1, "id"),
            391895,
            "two entries are called '391895'|no image 60623",
        ),
        ("textvqa", "annotations", ("data", 0, "answers"), None, r"data\[0\]: answers is missing, .* test split"),
        ("textvqa", "annotations", ("data", 0, "answers", 2), 7, r"data\[0\]: answers is \['nous les gosses'"),
        ("docvqa", "annotations", ("data", 0, "question_types"), "form", r"data\[0\]: question_types is 'form'"),
        ("docvqa", "annotations", ("data", 0, "answers"), [], r"data\[0\]: answers is \[\]"),
    ],
)
def test_a_malformed_entry_is_named(
    name: str, role: str, path: tuple[str | int, ...], value: Any, message: str, tmp_path: Path
) -> None:
    benchmark = lay_out(tmp_path, name)
    benchmark.read()
    change(benchmark, role, path, value)
    with pytest.raises(UserError, match=message):
        benchmark.read()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is no JSON"),
        (b"\xff\xfe{", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", r"holds \[\], but must hold an object"),
        (None, "can't be read: No such file"),
    ],
)
def test_a_file_that_is_no_json_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "val.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"val.json {message}"):
        READERS["docvqa"](annotations=path, images=tmp_path, stats=SampleStats())


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for step, below in inner for found in [(*path, step), *places(below, (*path, step))]]


json_values = st.sampled_from(
    [None, 0, -1, 1.5, True, "", "../x", "a\0b", [], {}, [[]], [{}], ["a"], {"a": 1}, 10**30]
)


@given(st.sampled_from(sorted(READERS)), st.data())
def test_whatever_a_file_holds_it_is_questions_or_a_users_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    benchmark = lay_out(tmp_path_factory.mktemp("fuzz"), name)
    role = data.draw(st.sampled_from(sorted(benchmark.files)))
    change(benchmark, role, data.draw(st.sampled_from(places(benchmark.files[role]))), data.draw(json_values))
    try:
        questions = benchmark.read()
    except UserError:
        return
    assert all(question.references and image_of(question).data.decode() in IMAGES[name] for question in questions)
    assert benchmark.stats.read == len(questions)
