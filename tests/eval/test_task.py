"""A task file is data: what it says is used as it is, and what it should not say is an error that names it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.errors import UserError
from fuyu_e2e.eval.task import FOLDER, READERS, load_task

GOOD = "format: shards\ndata: {shards: x.tar}\nmetrics: [accuracy]\n"


def test_paths_are_relative_to_the_file_unless_the_command_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD + "groups: [kind]\nmax_new_tokens: 5\n")
    task = load_task(str(file))
    assert (task.name, task.data, task.groups) == ("mine", {"shards": str(tmp_path / "x.tar")}, ("kind",))
    assert load_task(str(file), {"shards": "y.tar"}).data == {"shards": "y.tar"}
    monkeypatch.setenv("HOME", "/home/ada")
    file.write_text(GOOD.replace("x.tar", "~/x.tar"))
    assert load_task(str(file)).data == {"shards": "/home/ada/x.tar"}
    file.write_text(GOOD.replace("x.tar", "https://host/x.tar"))
    assert load_task(str(file)).data == {"shards": "https://host/x.tar"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "format"),
        ("metrics: [accuracy]", "format"),
        ("format: nothing\nmetrics: [accuracy]", "nothing"),
        (GOOD + "metric: accuracy", "metric"),
        (GOOD + "name: x", "name"),
        (GOOD + "max_new_tokens: many", "max_new_tokens"),
        (GOOD + "max_new_tokens: 0", "max_new_tokens"),
        (GOOD + "max_new_tokens: true", "max_new_tokens"),
        (GOOD + "groups: kind", "groups"),
        (GOOD + "groups: [1]", "groups"),
        (GOOD + "answer: guess", "guess"),
        (GOOD + "prompt: '{question}'", "prompt"),
        (GOOD.replace("accuracy", "f1"), "f1"),
        (GOOD.replace("shards: x.tar", "images: x"), "images"),
        (GOOD.replace("shards: x.tar", ""), "data.shards"),
        ("format: shards\ndata: {shards: x.tar}\n", "metrics"),
        (GOOD + "answer: perplexity", "metrics"),
        ("format: [", "read"),
        ("format: !!python/object/apply:os.system ['true']", "python"),
    ],
)
def test_a_wrong_task_is_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=named) as refused:
        load_task(str(file))
    assert "wrong.yaml" in str(refused.value)


def test_an_unknown_task_names_those_that_there_are() -> None:
    with pytest.raises(UserError, match="sort-of-clevr"):
        load_task("no-such-task")


@pytest.mark.parametrize("file", sorted(shipped(FOLDER).glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_tasks_load_with_the_data_that_they_ask_for(file: Path, tmp_path: Path) -> None:
    """Each error names the path that is still missing, until there is none."""
    data: dict[str, str] = {}
    for _ in range(10):
        try:
            task = load_task(file.stem, data)
            break
        except UserError as error:
            data[str(error).split("--data ")[1].split("=")[0]] = str(tmp_path)
    assert task.format in READERS
    assert file.read_text().startswith("# ")


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if n % 2 else "human", "value": text} for n, text in enumerate(texts)]


def test_samples_of_shards_say_what_they_ask(
    tmp_path: Path, write_shard: Callable[..., None], make_png: Callable[..., bytes]
) -> None:
    samples: list[Any] = [
        {"conversations": turns("<image>\nShape?", "square"), "groups": {"kind": "x"}, "image": "a", "choices": ["1"]},
        {"conversations": turns("<image>\nShape?", "square", "And now?", "circle")},
        {"conversations": turns("<image>\nShape?", "square"), "groups": ["x"]},
        {"conversations": turns("<image>\nShape?", "square"), "choices": [1]},
        {"conversations": turns("<image>\nShape?", "square"), "image": 3},
        {"conversations": turns("<image>\nShape?")},
        {"conversations": turns("<image>\nShape?", "")},
    ]
    write_shard(tmp_path / "x.tar", [(sample, make_png(4, 4)) for sample in samples])
    stats = SampleStats()
    first, earlier, second = READERS["shards"](shards=str(tmp_path / "*.tar"), stats=stats)
    assert (first.references, first.choices, first.image, first.groups) == (("square",), ("1",), "a", {"kind": "x"})
    assert list(first.document.texts) == ["Shape?"]
    assert (second.references, second.image) == (("circle",), "0001")
    assert list(second.document.texts) == ["Shape?", "square", "And now?"]
    assert (earlier.references, earlier.image, list(earlier.document.texts)) == (("square",), "0001", ["Shape?"])
    assert (first.turn, earlier.turn, second.turn) == (1, 1, 2)
    assert stats.read == len(samples)
    assert dict(stats.skipped) == {"json-type": 3, "chat-no-answer": 1, "no-answer": 1}


def test_a_turn_is_a_question_unless_choices_are_of_another_or_documents_are_scored_whole(
    write_shard: Callable[..., None], tmp_path: Path, make_png: Callable[..., bytes]
) -> None:
    talk = {"conversations": turns("<image>\nShape?", "square", "Red?", "no", "Large?", "yes")}
    samples = [talk, talk | {"choices": ["yes", "no"]}]
    write_shard(tmp_path / "x.tar", [(sample, make_png(4, 4)) for sample in samples])
    (tmp_path / "t.yaml").write_text("format: shards\ndata: {shards: x.tar}\nmetrics: [accuracy]")
    asked = [
        (q.document.key, q.turn, q.references[0]) for q in load_task(str(tmp_path / "t.yaml")).questions(SampleStats())
    ]
    assert asked == [
        ("0000", 1, "square"), ("0000", 2, "no"), ("0000", 3, "yes"), ("0001", 2, "no"), ("0001", 3, "yes")
    ]  # fmt: skip
    (tmp_path / "p.yaml").write_text("format: shards\ndata: {shards: x.tar}\nanswer: perplexity")
    whole = list(load_task(str(tmp_path / "p.yaml")).questions(SampleStats()))
    assert [question.references for question in whole] == [("yes",), ("yes",)]
    assert list(whole[0].document.texts) == ["Shape?", "square", "Red?", "no", "Large?"]
