"""Every shipped recipe says what it is, loads, and builds."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping

from fuyu_e2e.cli.shards_write import VOCAB_SIZE
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.export.transformers import scales_alike
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.training.callbacks.checkpoints import Checkpoints
from fuyu_e2e.training.settings.recipe import FuyuCLI

RECIPES = sorted(shipped("recipes").glob("*.yaml"))


def first_line(recipe: Path) -> str:
    return recipe.read_text().splitlines()[0]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_what_it_shows_and_builds(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = first_line(recipe)
    assert first.startswith("# ")
    assert re.search("CPU|GPU", first)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cli = FuyuCLI([f"--config={recipe}", "--trainer.accelerator=cpu", "--trainer.devices=1"], run=False)
    assert cli.trainer.max_steps > 0
    assert cli.datamodule.images.patch_size == cli.model.config.patch_size
    assert scales_alike(cli.datamodule.images), "what it trains could not be exported to transformers"
    with torch.device("meta"):
        assert sum(weight.numel() for weight in Decoder(cli.model.config).parameters()) > 1e5


def test_recipes_for_gpus_have_long_rows_and_compile() -> None:
    """The host takes as long to start a short row's kernels as a fast GPU to compute them."""
    recipes = {recipe.stem: yaml.safe_load(recipe.read_text()) for recipe in RECIPES if "GPU" in first_line(recipe)}
    assert "captions" in recipes
    for name, recipe in recipes.items():
        assert 16_384 <= recipe["data"]["budget"] <= 32_768, name
        assert recipe["model"]["compile"] is True, name


def test_the_recipe_for_captions_validates_each_checkpoint() -> None:
    """Where an interval counts micro-batches and the other one steps."""
    cli = FuyuCLI([f"--config={shipped('recipes/captions.yaml')}", "--trainer.accelerator=cpu"], run=False)
    [kept] = [callback for callback in cli.trainer.callbacks if isinstance(callback, Checkpoints)]
    assert cli.trainer.val_check_interval == kept._every_n_train_steps * cli.trainer.accumulate_grad_batches


def test_the_readme_names_every_recipe(repository: Path) -> None:
    readme = (repository / "README.md").read_text()
    assert [recipe.name for recipe in RECIPES if f"recipes/{recipe.name}" not in readme] == []


def test_a_task_of_drawn_pictures_names_the_module_that_draws_them(repository: Path) -> None:
    heads = [task.read_text().partition("\nformat:")[0] for task in shipped("recipes/tasks").glob("*.yaml")]
    drawing = {path.name for path in (repository / "fuyu_e2e/tasks").glob("*.py")} - {
        "__init__.py",
        "picture_shards.py",
    }
    assert {name for name in drawing if not any(f"fuyu_e2e/tasks/{name}" in head for head in heads)} == set()


def test_shards_write_advises_a_tokenizer_of_the_size_that_its_recipe_has() -> None:
    recipe = yaml.safe_load((shipped("recipes") / "own-pictures.yaml").read_text())
    assert recipe["model"]["decoder"]["vocab_size"] == VOCAB_SIZE


def test_the_recipe_for_own_pictures_scales_as_stock_transformers_does_and_stops_early() -> None:
    recipe = shipped("recipes") / "own-pictures.yaml"
    cli = FuyuCLI([f"--config={recipe}", "--trainer.accelerator=cpu", "--trainer.callbacks.patience=20"], run=False)
    assert scales_alike(cli.datamodule.images)
    [stopping] = [callback for callback in cli.trainer.callbacks if isinstance(callback, EarlyStopping)]
    assert (stopping.monitor, stopping.patience) == ("val/loss", 20)
    [kept] = [callback for callback in cli.trainer.callbacks if isinstance(callback, Checkpoints)]
    assert (kept.monitor, kept.save_top_k) == (None, 1), "the best by val/loss"
