"""Sort-of-CLEVR: answers are what the picture shows, by its objects and by its pixels alone, and splits are apart."""

import io
import json
import tarfile
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import UInt8
from PIL import Image as Pillow

from fuyu_e2e.data.document import Image, Text
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.data.tokenizer import train_tokenizer
from fuyu_e2e.tasks.sort_of_clevr import (
    COLOURS,
    FORMS,
    GROUND,
    KINDS,
    VOCAB_SIZE,
    Asked,
    Scene,
    close_calls,
    draw_questions,
    draw_scene,
    render,
    write_shards,
)

seeds = st.integers(0, 2**32 - 1)
numbers = st.integers(1, 6)


def seen(picture: UInt8[np.ndarray, "H W 3"]) -> dict[str, tuple[str, float, float]]:
    """Shape, row and column of the object of each colour, from pixels alone."""
    found = {}
    for name, colour in COLOURS.items():
        rows, columns = np.nonzero((picture == colour).all(axis=2))
        if not len(rows):
            continue
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        found[name] = ("square" if len(rows) == box else "circle", float(rows.mean()), float(columns.mean()))
    return found


def expected(objects: dict[str, tuple[str, float, float]], text: str) -> set[str]:
    """All answers that the objects allow to a question."""
    middle = {1: 12.5, 2: 17.5, 3: 22.5, 4: 27.5, 5: 32.5, 6: 37.5}[len(objects)]
    (colour,) = (name for name in objects if f" {name} " in text)
    shape, row, column = objects[colour]
    if "on the left" in text:
        return {"yes" if column < middle else "no"}
    if "at the top" in text:
        return {"yes" if row < middle else "no"}
    if "How many" in text:
        return {str([other[0] for other in objects.values()].count(shape))}
    apart = {name: np.hypot(row - other[1], column - other[2]) for name, other in objects.items() if name != colour}
    if "closest" in text:
        return {objects[name][0] for name in apart if np.isclose(apart[name], min(apart.values()))}
    if "furthest" in text:
        return {objects[name][0] for name in apart if np.isclose(apart[name], max(apart.values()))}
    assert text.startswith(f"What shape is the {colour} object?")
    return {shape}


@given(seed=seeds, objects=numbers)
def test_objects_stand_inside_and_apart_with_a_colour_each(seed: int, objects: int) -> None:
    scene = draw_scene(np.random.default_rng(seed), objects)
    colours = [thing.colour for thing in scene]
    assert [colour for colour in ("red", "green", "blue", "orange", "yellow", "gray") if colour in colours] == colours
    assert len(colours) == objects
    for thing in scene:
        assert 5 <= thing.row <= 9 + 10 * objects
        assert 5 <= thing.column <= 9 + 10 * objects
    for one, other in combinations(scene, 2):
        assert abs(one.row - other.row) > 10 or abs(one.column - other.column) > 10


@given(seed=seeds, objects=numbers)
def test_a_picture_shows_all_of_every_object_and_nothing_else(seed: int, objects: int) -> None:
    scene = draw_scene(np.random.default_rng(seed), objects)
    picture = render(scene)
    assert picture.shape == {1: (25, 25, 3), 2: (35, 35, 3), 6: (75, 75, 3)}.get(objects, picture.shape)
    assert seen(picture) == {thing.colour: (thing.shape, thing.row, thing.column) for thing in scene}
    others = ~np.any([(picture == colour).all(axis=2) for colour in (*COLOURS.values(), GROUND)], axis=0)
    assert not others.any()


@given(seed=seeds)
def test_ten_questions_of_each_kind_have_the_one_answer_that_the_pixels_give(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = draw_scene(rng)
    questions = draw_questions(rng, scene)
    objects = seen(render(scene))
    assert [FORMS[question.form].kind for question in questions].count("relational") == 10
    assert len({question.text for question in questions}) == len(questions) == 20
    for question in questions:
        assert expected(objects, question.text) == {question.answer}


@given(seed=seeds, objects=numbers)
def test_pictures_of_fewer_objects_are_asked_what_can_be_asked(seed: int, objects: int) -> None:
    rng = np.random.default_rng(seed)
    scene = draw_scene(rng, objects)
    questions = draw_questions(rng, scene)
    seen_objects = seen(render(scene))
    assert all(expected(seen_objects, question.text) == {question.answer} for question in questions)
    kinds = [FORMS[question.form].kind for question in questions]
    assert kinds.count("non-relational") == min(10, 3 * objects)
    assert kinds.count("relational") == (1 if objects == 1 else min(10, 3 * objects))


def leads(objects: dict[str, tuple[str, float, float]]) -> dict[str, float]:
    """Of every question of distance, by how many pixels the object that answers it beats the first of other shape."""
    found = {}
    for colour, (_, row, column) in objects.items():
        others = [other for name, other in objects.items() if name != colour]
        for form, best in (("closest to", min), ("furthest from", max)):
            by_shape = [
                best(np.hypot(row - other[1], column - other[2]) for other in others if other[0] == shape)
                for shape in {other[0] for other in others}
            ]
            if others:
                lead = abs(by_shape[0] - by_shape[1]) if len(by_shape) == 2 else np.inf
                found[f"What shape is {form} the {colour} object?"] = lead
    return found


@given(seed=seeds, objects=numbers)
def test_questions_of_distance_say_by_how_much_they_are_decided(seed: int, objects: int) -> None:
    rng = np.random.default_rng(seed)
    scene = draw_scene(rng, objects)
    expected_leads = leads(seen(render(scene)))
    for question in draw_questions(rng, scene):
        assert ("lead" in question.groups) == (question.form in ("closest", "furthest"))
        if "lead" in question.groups:
            low, high = question.groups["lead"].replace("+", "-inf").split("-")
            lead = expected_leads[question.text]
            assert float(low) <= lead
            assert lead < float(high) or high == "inf"


@given(seed=seeds, objects=numbers)
def test_close_calls_are_all_questions_of_distance_decided_by_fewer_than_8_pixels(seed: int, objects: int) -> None:
    scene = draw_scene(np.random.default_rng(seed), objects)
    objects_seen = seen(render(scene))
    asked = close_calls(scene)
    assert sorted(question.text for question in asked) == sorted(
        text for text, lead in leads(objects_seen).items() if lead < 8
    )
    assert all(expected(objects_seen, question.text) == {question.answer} for question in asked)


def drawn(count: int) -> Iterator[tuple[Scene, list[Asked]]]:
    for seed in range(count):
        rng = np.random.default_rng(seed)
        scene = draw_scene(rng)
        yield scene, draw_questions(rng, scene)


def test_all_answers_of_a_form_come_up_and_none_gives_itself_away() -> None:
    answers: dict[str, list[str]] = {}
    for scene, questions in drawn(400):
        objects = seen(render(scene))
        for question in questions:
            assert expected(objects, question.text) == {question.answer}, "a tie, which is rare"
            answers.setdefault(question.form, []).append(question.answer)
    assert {form: set(own) for form, own in answers.items()} == {
        "shape": {"square", "circle"},
        "left": {"yes", "no"},
        "top": {"yes", "no"},
        "closest": {"square", "circle"},
        "furthest": {"square", "circle"},
        "count": set("123456"),
    }
    for form, own in answers.items():
        likeliest = max(own.count(answer) for answer in set(own)) / len(own)
        assert likeliest < (0.4 if form == "count" else 0.55)
        assert len(own) > 1_000


def test_every_answer_is_one_token() -> None:
    texts = [text for _, questions in drawn(60) for asked in questions for text in (asked.text, asked.answer)]
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    for answer in ("square", "circle", "yes", "no", *"123456"):
        assert len(tokenizer.encode(answer)) == 1
    assert max(len(tokenizer.encode(text)) for text in texts) == 11


def test_shards_hold_the_questions_of_each_picture_in_order(tmp_path: Path) -> None:
    written = []
    for folder in (tmp_path / "once", tmp_path / "again"):
        folder.mkdir()
        paths = write_shards(folder, split="test", count=5, seed=3, processes=1, shard_size=2)
        written.append([path.read_bytes() for path in paths])
    assert written[0] == written[1]
    assert len(written[0]) == 3
    keys = [sample["__key__"] for sample in webdataset.WebDataset([str(path) for path in paths], shardshuffle=False)]
    assert keys[0] == "test-of-6-000000-00"
    assert keys == sorted(keys)
    assert len(keys) == len(set(keys)) == 100


def samples(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """JSON and PNG of each sample of a shard."""
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    names = [name.removesuffix(".json") for name in members if name.endswith(".json")]
    return [(json.loads(members[f"{name}.json"]), members[f"{name}.png"]) for name in names]


def test_a_sample_is_one_question_with_its_picture_behind_it(tmp_path: Path) -> None:
    (both,) = write_shards(tmp_path, split="test", count=3, seed=0)
    assert both.name == "test-00000.tar"
    for described, picture in samples(both):
        question, answer = (turn["value"] for turn in described["conversations"])
        assert question.endswith("?\n<image>")
        assert expected(seen(np.asarray(Pillow.open(io.BytesIO(picture)))), question) == {answer}
        groups = described["groups"]
        assert groups["kind"] == FORMS[groups["question"]].kind
        assert described["id"].startswith(described["image"])
    assert len({described["image"] for described, _ in samples(both)}) == len({png for _, png in samples(both)}) == 3
    kinds = [described["groups"]["kind"] for described, _ in samples(both)]
    assert kinds.count("relational") == kinds.count("non-relational") == 30
    kinds_of_segments = {tuple(map(type, document.segments)) for document in read_documents(both, SampleStats())}
    assert kinds_of_segments == {(Text, Image, Text)}


def test_shards_of_either_kind_ask_about_the_same_pictures(tmp_path: Path) -> None:
    asked = {}
    for kind in KINDS:
        (path,) = write_shards(tmp_path, split="train", count=4, seed=0, objects=3, kind=kind)
        assert path.name == f"train-of-3-{kind}-00000.tar"
        asked[kind] = samples(path)
        assert {described["groups"]["kind"] for described, _ in asked[kind]} == {kind}
    (path,) = write_shards(tmp_path, split="train", count=4, seed=0, objects=3)
    written = [(described["id"], picture) for kind in KINDS for described, picture in asked[kind]]
    assert sorted(written) == [(described["id"], picture) for described, picture in samples(path)]


def test_splits_and_seeds_share_no_picture(tmp_path: Path) -> None:
    pictures = []
    for split, seed, objects in (("train", 0, 6), ("train", 1, 6), ("train", 0, 5), ("test", 0, 6), ("val", 0, 6)):
        (path,) = write_shards(tmp_path, split=split, count=20, seed=seed, objects=objects)  # type: ignore[arg-type]
        pictures.append({picture for _, picture in samples(path)})
        assert path.name == ("train-of-5-00000.tar" if objects == 5 else f"{split}-00000.tar")
    assert all(len(own) == 20 for own in pictures)
    assert len(set.union(*pictures)) == 100


def test_shards_of_close_calls_ask_about_the_pictures_of_the_relational_ones(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, split="train", count=20, seed=0, kind="close-calls")
    (relational,) = write_shards(tmp_path, split="train", count=20, seed=0, kind="relational")
    assert path.name == "train-close-calls-00000.tar"
    pictures = {described["image"]: picture for described, picture in samples(relational)}
    asked = samples(path)
    assert {described["groups"]["question"] for described, _ in asked} == {"closest", "furthest"}
    assert all(pictures[described["image"]] == picture for described, picture in asked)
    assert len({described["id"] for described, _ in asked}) == len(asked) > 40
