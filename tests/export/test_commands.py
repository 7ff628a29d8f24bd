"""Which checkpoint an export takes, what its card shows, and what is refused with one sentence, leaving nothing."""

import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fuyu_e2e.checkpoint.lightning_io import WEIGHTS_PREFIX, write_file
from fuyu_e2e.checkpoint.loading import StoredModel
from fuyu_e2e.checkpoint.metadata import SECTION, ModelMetadata, Provenance
from fuyu_e2e.cli import main
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.export.card import card, uses_of
from fuyu_e2e.export.folders import export_own
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.image_layout import ImagePolicy


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str]]:
    """Runs a command in a folder of its own; gives the exit code and what was printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fuyu-e2e", *arguments])
        code = main()
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.fixture
def stored(decoder: Decoder, tokenizer: Tokenizer, fitted_images: ImagePolicy) -> StoredModel:
    weights = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    return StoredModel(
        Path("made"), ModelMetadata(decoder.config, tokenizer, fitted_images), weights, Provenance(step=3)
    )


def with_images(stored: StoredModel, **limits: Any) -> StoredModel:
    images = ImagePolicy(patch_size=4, **limits)
    return replace(stored, metadata=replace(stored.metadata, images=images))


def save_checkpoint(stored: StoredModel, step: int, loss: float | None) -> None:
    """A checkpoint of a run in the working folder, with the loss of its own validation or without."""
    figure = {} if loss is None else {"monitored": {"name": "val/loss", "value": loss, "mode": "min"}}
    section = {"tokens_seen": 0, "validation": {} if loss is None else {"val/loss": loss}, **figure}
    weights = {WEIGHTS_PREFIX + name: tensor for name, tensor in stored.weights.items()}
    checkpoint = {"state_dict": weights, "global_step": step, SECTION: stored.metadata.section() | section}
    write_file(checkpoint, Path("run") / "checkpoints" / f"step={step}.ckpt")


def refused(result: tuple[int, str], *named: str) -> None:
    code, printed = result
    assert code == 2, printed
    [sentence] = printed.strip().splitlines()
    assert all(part in sentence for part in named), sentence


def test_of_a_run_the_best_checkpoint_is_exported_with_its_own_figures(run: Callable, stored: StoredModel) -> None:
    for step, loss in ((10, 1.5), (20, 0.25), (30, 0.75), (40, None)):
        save_checkpoint(stored, step, loss)
    code, printed = run("export", "--checkpoint", "run", "--out", "best")
    assert code == 0, printed
    assert "of step 20 from run/checkpoints/step=20.ckpt, the best of run by val/loss (0.25)" in printed
    text = Path("best/README.md").read_text()
    assert "| optimizer steps | 20 |" in text
    assert "| val/loss | 0.25 |" in text
    code, printed = run("export", "--checkpoint", "run/checkpoints/step=30.ckpt", "--out", "named")
    assert code == 0, printed
    assert printed.strip().endswith("of step 30 from run/checkpoints/step=30.ckpt")
    assert "| val/loss | 0.75 |" in Path("named/README.md").read_text()


def test_of_a_run_without_validation_the_newest_checkpoint_is_exported(run: Callable, stored: StoredModel) -> None:
    for step in (10, 20):
        save_checkpoint(stored, step, None)
    code, printed = run("export", "--checkpoint", "run", "--out", "newest")
    assert code == 0, printed
    assert "of step 20 from run/checkpoints/step=20.ckpt, the newest of run" in printed


@pytest.mark.parametrize(
    ("limits", "remedy"),
    [
        ({"max_patches": 99}, "--data.max_size '[36, 36]'"),
        ({"max_patches": 99, "max_size": (40, 44)}, "--data.max_patches 110"),
    ],
    ids=["no largest size", "a budget below it"],
)
def test_a_model_whose_images_would_be_scaled_otherwise_is_refused_unless_that_is_accepted(
    limits: dict[str, Any], remedy: str, run: Callable, stored: StoredModel
) -> None:
    export_own(with_images(stored, **limits), Path("own"))
    to_transformers = ("export", "--checkpoint", "own", "--out", "new/stock", "--to", "transformers")
    refused(run(*to_transformers), "own was trained", f"train with {remedy}", "--accept-other-scaling")
    assert [path.name for path in Path().iterdir()] == ["own"]
    code, printed = run(*to_transformers, "--accept-other-scaling")
    assert code == 0, printed
    assert "more than 99 patches were scaled down" in Path("new/stock/README.md").read_text()


def test_where_images_are_scaled_alike_nothing_is_asked(run: Callable, stored: StoredModel) -> None:
    export_own(stored, Path("own"))
    code, printed = run("export", "--checkpoint", "own", "--out", "stock", "--to", "transformers")
    assert code == 0, printed
    assert "scaled down" not in Path("stock/README.md").read_text().replace("scaled down to fit 64 x 96", "")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--accept-other-scaling",), "--accept-other-scaling only goes with --to transformers"),
        (("--tokenizer-json", "t.json"), "--tokenizer-json only goes with --to transformers"),
        (("--to", "transformers", "--tokenizer-json", "gone.json"), "gone.json can't be read"),
        (("--averaged",), "own holds no averaged weights"),
        (("--checkpoint", "gone"), "gone is no checkpoint"),
        (("--out", "own"), "own already holds something"),
        (("--out", "own/config.json/new"), "own/config.json/new can't be made"),
    ],
)
def test_an_export_that_is_refused_leaves_nothing(
    arguments: tuple[str, ...], named: str, run: Callable, stored: StoredModel
) -> None:
    export_own(stored, Path("own"))
    before = sorted(Path().rglob("*"))
    refused(run("export", "--checkpoint", "own", "--out", "a/b/new", *arguments), named)
    assert sorted(Path().rglob("*")) == before


def test_an_export_that_fails_leaves_no_folders(stored: StoredModel, tmp_path: Path) -> None:
    broken = replace(stored, weights=stored.weights | {"norm.weight": None})  # type: ignore[dict-item]
    with pytest.raises(Exception):  # noqa: B017, PT011
        export_own(broken, tmp_path / "a" / "b" / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--from", "gone"), "gone/config.json can't be read"),
        (("--from", "own"), "own/config.json says model_type None"),
        (("--from", "stock", "--tokenizer", "gone.model"), "The tokenizer gone.model can't be read"),
        (("--from", "stock", "--out", "own"), "own already holds something"),
        (("--from", "stock", "--out", "own/config.json/new"), "own/config.json/new can't be made"),
    ],
)
def test_an_import_that_is_refused_leaves_nothing(
    arguments: tuple[str, ...], named: str, run: Callable, stored: StoredModel
) -> None:
    pytest.importorskip("transformers", reason="needs the extra `transformers`")
    export_own(stored, Path("own"))
    assert run("export", "--checkpoint", "own", "--out", "stock", "--to", "transformers")[0] == 0
    before = sorted(Path().rglob("*"))
    refused(run("import", "--out", "a/b/new", *arguments), named)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("documents", "uses"),
    [
        ({"caption": 9}, ["caption"]),
        ({"chat": 9, "text": 3}, ["chat"]),
        ({"interleaved": 2}, ["caption"]),
        ({"caption": 1, "chat": 1}, ["caption", "chat"]),
        ({}, ["caption", "chat"]),
    ],
)
def test_a_card_shows_what_the_model_was_trained_on(
    documents: dict[str, int], uses: list[str], stored: StoredModel
) -> None:
    assert uses_of(documents) == uses
    told = replace(stored, provenance=Provenance(documents=documents))
    for for_transformers in (True, False):
        text = card(
            told, name="m", licence=None, recipe=None, for_transformers=for_transformers, question='Say "digits".'
        )
        assert text.count("```python") == len(uses)
        assert (r'"Say \"digits\"."' in text) == ("chat" in uses)
        assert ("[:, :-1]" in text) == (for_transformers and "caption" in uses)
    assert ("| documents | " in text) == bool(documents)


def test_a_checkpoint_of_before_is_shown_both_ways(run: Callable, stored: StoredModel) -> None:
    save_checkpoint(stored, 5, None)
    assert run("export", "--checkpoint", "run", "--out", "own")[0] == 0
    assert Path("own/README.md").read_text().count("```python") == 2


def test_the_extra_for_transformers_has_torchvision_and_the_one_for_tests_exchanges_no_torch(repository: Path) -> None:
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {re.split("[>=]", needed)[0] for needed in extras["transformers"]} == {"transformers", "torchvision"}
    assert [needed for needed in extras["test"] if "torchvision" in needed or "[transformers" in needed] == []
    own = re.fullmatch(r"fuyu-e2e\[(.*)\]", extras["test"][0])
    assert own is not None
    assert "transformers" not in own[1].split(",")
