"""Connectors, blocks and masks of a user's own: one file each, plugged in by a recipe.

The files are those of `tests/own_parts`, which nothing of the package knows.
"""

import sys
import tarfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
import torch

from fuyu_e2e.checkpoint.loading import TrainedModel, load_model
from fuyu_e2e.cli.main import main
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.training.settings.recipe import FuyuCLI

FOLDER = Path(__file__).parents[1] / "own_parts"
PARTS = {
    "pooled": {"connector": '{"class_path": "pooled.PooledConfig", "init_args": {"side": 3}}'},
    "parallel": {"blocks": '[{"class_path": "parallel.ParallelConfig", "init_args": {"scale": 0.5}}]'},
    "chunked": {"masks": '[{"class_path": "chunked.Chunked", "init_args": {"window": 7}}, {"window": null}]'},
    "crossing": {
        "connector": "crossing.FeaturesConfig",
        "blocks": '[{"class_path": "crossing.CrossingConfig"}, {"class_path": "DenseConfig"}]',
    },
}


@pytest.fixture(autouse=True)
def _found_by_python(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in PARTS:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def shards(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, make_png: Callable[..., bytes]
) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("shards")
    tokenizer.save(folder / "tokenizer.model")
    with tarfile.open(folder / "train.tar", "w") as tar:
        for number in range(12):
            picture = make_png(5 + 7 * (number % 5), 9 + 11 * (number % 3), seed=number)
            for ending, data in (("png", picture), ("txt", f"a square {number}".encode())):
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    return (f"--data.tokenizer={folder}/tokenizer.model", f"--data.train={folder}/train.tar")


def fit(shards: tuple[str, ...], run: Path, part: str, steps: int, *more: str) -> FuyuCLI:
    settings = {
        "trainer.max_steps": steps, "trainer.default_root_dir": run, "trainer.enable_progress_bar": "false",
        "trainer.accelerator": "cpu", "checkpoint.every_n_train_steps": 2, "data.lanes": 2, "data.budget": 96,
        "model.decoder.layers": 2, "model.decoder.width": 48, "model.decoder.heads": 3, "model.decoder.kv_heads": 3,
        "model.decoder.head_size": 16, "model.decoder.feed_forward": 64, "model.optimizer.muon_lr": 0.1,
        **{f"model.decoder.{name}": value for name, value in PARTS[part].items()},
    }  # fmt: skip
    recipe = f"--config={shipped('recipes/quickstart.yaml')}"
    args = [f"--{name}={value}" for name, value in settings.items()]
    return FuyuCLI(["fit", recipe, *shards, *args, "--allow-imports", part, *more])


@pytest.fixture(params=PARTS)
def trained(request: pytest.FixtureRequest, tmp_path: Path, shards: tuple[str, ...]) -> tuple[str, TrainedModel, Path]:
    run = tmp_path / "run"
    fit(shards, run, request.param, steps=4)
    return request.param, load_model(run), run


def test_a_part_of_ones_own_trains_and_generates(
    trained: tuple[str, TrainedModel, Path],
    check_cached_generation: Callable[[TrainedModel], None],
    make_png: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its cache gives the uncached forward, also of prompts in pieces; commands find it; stock export refuses."""
    part, model, run = trained
    check_cached_generation(model)
    picture = run / "picture.png"
    picture.write_bytes(make_png(20, 30))
    args = ["generate", "--checkpoint", str(run), "--image", str(picture), "--prompt", "a"]
    monkeypatch.setattr(sys, "argv", ["fuyu-e2e", *args, "--allow-imports", part])
    assert main() == 0
    monkeypatch.setattr(
        sys, "argv", ["fuyu-e2e", "export", "--checkpoint", str(run), "--to", "transformers", "--out", f"{run}/stock"]
    )
    capsys.readouterr()
    assert main() != 0
    assert "can't be exported as transformers' FuyuForCausalLM" in capsys.readouterr().err


@pytest.mark.parametrize("part", PARTS)
def test_it_goes_on_as_if_it_had_not_stopped(part: str, tmp_path: Path, shards: tuple[str, ...]) -> None:
    whole = fit(shards, tmp_path / "whole", part, steps=4)
    fit(shards, tmp_path / "parts", part, 4)
    first = sorted((tmp_path / "parts" / "checkpoints").iterdir())[0]
    again = fit(shards, tmp_path / "parts", part, 4, f"--ckpt_path={first}")
    for name, weight in whole.model.decoder.state_dict().items():
        assert torch.equal(again.model.decoder.state_dict()[name], weight), name


def test_a_checkpoint_imports_nothing_by_itself(
    trained: tuple[str, TrainedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    part, _, run = trained
    sys.modules.pop(part)
    with pytest.raises(
        UserError, match=rf"^The model is made with {part}\.\w+, which is not imported: say --allow-imports {part} "
    ):
        load_model(run)
    assert part not in sys.modules


def test_its_operations_are_counted(
    trained: tuple[str, TrainedModel, Path], check_operations: Callable[[TrainedModel], None]
) -> None:
    check_operations(trained[1])
