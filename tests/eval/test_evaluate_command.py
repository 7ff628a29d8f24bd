"""The command: a folder of a public format and a checkpoint in, figures, answers and pictures out, with no code."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fuyu_e2e.cli import main
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.eval.checkpoint_scores import run_folder
from fuyu_e2e.tasks.picture_shards import conversation, write_picture_shards
from fuyu_e2e.training.callbacks.evaluation import EvaluationInTraining
from fuyu_e2e.training.settings.recipe import FuyuCLI

ANSWERS = ("yes", "no", "2")


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Callable[..., tuple[int, str]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fuyu-e2e", "evaluate", *arguments])
        try:
            code = main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        printed = capfd.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.fixture
def vqav2(tmp_path: Path, make_png: Callable[..., bytes]) -> list[str]:
    """Six questions about three pictures, as VQAv2 lays them out; gives the arguments that name the files."""
    images = tmp_path / "val2014"
    images.mkdir()
    head = {"info": {"version": "2.0"}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    questions, annotations = [], []
    for number in range(6):
        image, word = 40 + number // 2, ANSWERS[number % 3]
        (images / f"COCO_val2014_{image:012}.jpg").write_bytes(
            b"no picture" if image == 42 else make_png(12, 16, seed=image)
        )
        asked = {"image_id": image, "question_id": image * 1000 + number}
        questions.append(asked | {"question": "Is it red?"})
        given = [{"answer": word, "answer_confidence": "yes", "answer_id": n + 1} for n in range(10)]
        kind = {"question_type": "is it", "answer_type": "number" if word == "2" else "yes/no"}
        annotations.append(asked | kind | {"multiple_choice_answer": word, "answers": given})
    files = {
        "questions": {**head, "task_type": "Open-Ended", "questions": questions},
        "annotations": {**head, "annotations": annotations},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return ["--data", "questions=questions.json", "--data", "annotations=annotations.json", "--data", "images=val2014"]


def test_a_public_format_is_scored_with_no_code(
    run: Callable[..., Any],
    vqav2: list[str],
    exported: Path,
    tmp_path: Path,
    counts: dict[str, tuple[float | None, float]],
) -> None:
    code, printed = run("--checkpoint", str(exported), "--task", "vqav2", *vqav2, "--out", "report", "--device", "cpu")
    assert code == 0, printed
    assert counts == {"Asking vqav2": (None, 6), "Scoring vqav2": (None, 0)}
    for words in ("vqa accuracy", "answer_type yes/no", "blind: another's image", "image-unreadable 2", "report"):
        assert words in printed
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert (results["task"], results["step"], results["questions"], results["images"]) == ("vqav2", 7, 6, 3)
    assert results["task_settings"]["data"]["images"] == "val2014"
    assert results["runs"]["image"] == {
        "used": 4,
        "cut": 4,
        "scored_as_wrong": {"image-unreadable": 2},
        "examples": results["runs"]["image"]["examples"],
    }
    assert (results["device"], results["products"]) == ("cpu", "float32")
    scores = results["metrics"]["vqa_accuracy"]
    assert 0 <= scores["all"]["interval"][0] <= scores["all"]["value"] <= scores["all"]["interval"][1] <= 1
    assert scores["groups"]["answer_type"]["number"]["questions"] == 2
    assert set(results["versions"]) == {"fuyu-e2e", "torch", "numpy", "python"}
    assert len((tmp_path / "report" / "answers.jsonl").read_text().splitlines()) == 6
    assert list((tmp_path / "report" / "pictures").glob("*.png"))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_report_goes_beside_the_run_and_holds_the_first_questions(
    run: Callable[..., Any], vqav2: list[str], exported: Path, in_bfloat16: set[torch.dtype]
) -> None:
    code, printed = run("--checkpoint", str(exported), "--task", "vqav2", *vqav2, "--limit", "3")
    assert code == 0, printed
    results = json.loads((exported / "evaluate" / "vqav2" / "results.json").read_text())
    assert (results["questions"], results["limit"], results["products"]) == (3, 3, "bfloat16")
    assert in_bfloat16 == {torch.bfloat16}
    assert run_folder(Path("runs/a/checkpoints/last.ckpt")) == Path("runs/a")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--task", "vqav2"], "data.questions"),
        (["--task", "nothing"], "sort-of-clevr"),
        (["--task", "vqav2", "--data", "questions"], "KEY=PATH"),
        (["--task", "sort-of-clevr", "--data", "shards=none-*.tar"], "none-*.tar"),
        (["--task", "sort-of-clevr", "--data", "shards=x.tar", "--limit", "0"], "--limit"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    run: Callable[..., Any], exported: Path, arguments: list[str], named: str
) -> None:
    code, printed = run("--checkpoint", str(exported), *arguments)
    assert code == 2
    assert named in printed
    assert "Traceback" not in printed


def test_questions_of_which_none_can_be_asked_are_said_by_reason_with_the_first(
    run: Callable[..., Any], exported: Path, tmp_path: Path, make_png: Callable[..., bytes]
) -> None:
    turns = [("<image>\nHow many?", "3")]
    extras: list[dict[str, Any]] = [{}, {}, {"groups": {"squares": 3}}]

    def samples(numbers: range) -> Iterator[dict[str, Any]]:
        for number in numbers:
            described = conversation(f"a{number}", f"a{number}.png", turns, **extras[number])
            yield {"__key__": f"a{number}", "png": make_png(8, 8), "json": described}

    write_picture_shards(tmp_path, "test", samples, 3, processes=1, shard_size=3)
    task = 'format: shards\ndata: {shards: "test-*.tar"}\nanswer: choose\nmetrics: [accuracy]\n'
    (tmp_path / "c.yaml").write_text(task)
    code, printed = run("--checkpoint", str(exported), "--task", "c.yaml")
    assert code == 2
    told = " ".join(printed.split())
    assert "No question of c could be asked; by reason, with the first of each: 1 json-type: " in told
    assert "test-00000.tar: a2: a group or a choice is no text" in told
    assert '2 no-choices: a0 needs "choices": [...] in its JSON, see docs/evaluation.md.' in told


def test_a_recipe_turns_evaluation_on() -> None:
    recipe = [f"--config={shipped('recipes/quickstart.yaml')}", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    given = ["--evaluate.tasks=[a,b]", "--evaluate.every_n_steps=7", "--evaluate.data={a: {shards: x.tar}}"]
    [on] = [c for c in FuyuCLI(recipe + given, run=False).trainer.callbacks if isinstance(c, EvaluationInTraining)]
    assert (on.tasks, on.every_n_steps, on.data) == (("a", "b"), 7, {"a": {"shards": "x.tar"}})
    [off] = [c for c in FuyuCLI(recipe, run=False).trainer.callbacks if isinstance(c, EvaluationInTraining)]
    assert not off.tasks
