"""A typo is answered by one sentence with the nearest name, exit code 2, and nothing is left behind."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fuyu_e2e.cli import main
from fuyu_e2e.data.shipped import shipped

RECIPE = str(shipped("recipes/quickstart.yaml"))


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Callable[[Sequence[str]], str]:
    """Runs a command line that has to be refused, in an empty folder; gives the sentence."""
    monkeypatch.chdir(tmp_path)

    def refused(arguments: Sequence[str]) -> str:
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["fuyu-e2e", *arguments])
        capfd.readouterr()
        assert main() == 2
        printed = capfd.readouterr()
        assert printed.out == ""
        [sentence] = printed.err.splitlines()
        assert sorted(tmp_path.rglob("*")) == before
        return sentence.removeprefix("fuyu-e2e: ")

    return refused


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["fti"], "There is no command 'fti': did you mean fit?"),
        (["xyz"], "There is no command 'xyz': fuyu-e2e --help lists all commands."),
        # A decoder is settings or a size's name: of settings, the setting is what is wrong.
        (
            ["fit", "--config", RECIPE, "--model.decoder.masks", "[{window: 1.5}]"],
            "model.decoder.masks.window in --model.decoder.masks is '1.5', but must be a whole number or null.",
        ),
        (
            ["fit", "--config", RECIPE, "--model.decoder.grid_embeddings", "many"],
            "--model.decoder.grid_embeddings is 'many', but must be a whole number or null.",
        ),
        (
            ["fit", "--config", RECIPE, "--model.decoder", "2m"],
            "--model.decoder is '2m', but must be 1m, 10m, 50m, 125m, 350m, 1b, 3b or 8b.",
        ),
        (
            ["fit", "--config", RECIPE, "--model.decoder", "1m", "--model.decoder.image_norm", "true"],
            "--model.decoder lacks vocab_size, patch_size, layers, width, heads, kv_heads, head_size, feed_forward: a "
            "named size takes no further settings, and a decoder that is spelled out needs all of these "
            "(docs/recipes.md lists those of the sizes).",
        ),
        (
            ["fit", "--config", RECIPE, "--allow-imports", "nowhere", "--model.decoder.connector", "nowhere.Mine"],
            "--model.decoder.connector: Mine: No module named 'nowhere'.",
        ),
        (
            ["generate", "--checkpoint", "c", "--promt", "a"],
            "There is no option --promt: did you mean --prompt?",
        ),
        (
            ["generate", "--checkpoin", "c", "--prompt", "a"],
            "There is no option --checkpoin: did you mean --checkpoint?",
        ),
        (["checkpoint", "verfy", "c"], "action can't be 'verfy': did you mean verify?"),
        (
            ["tokenizer", "train", "--shards", "s", "--out", "t", "--vocab-size", "300", "--shard", "s"],
            "There is no option --shard: did you mean --shards?",
        ),
        (
            ["shards", "index", "s", "--proceses", "3"],
            "There is no option --proceses: did you mean --processes?",
        ),
        (
            ["generate", "--prompt", "a"],
            "the following arguments are required: --checkpoint; fuyu-e2e generate --help tells more.",
        ),
        (["shards", "wirte", "a"], "There is no command 'shards wirte': did you mean write?"),
    ],
)
def test_commands_and_their_options(arguments: list[str], sentence: str, refused: Callable[..., str]) -> None:
    assert refused(arguments) == sentence


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("--trainer.max_stepps=3", "There is no option --trainer.max_stepps: did you mean --trainer.max_steps?"),
        ("--trainr.max_steps=3", "There is no option --trainr.max_steps: did you mean --trainer.max_steps?"),
        ("--trainer.max_step=3", "There is no option --trainer.max_step: did you mean --trainer.max_steps?"),
        ("--max_steps=3", "There is no option --max_steps: did you mean --trainer.max_steps?"),
        ("--model.decoder.widht=3", "There is no option --model.decoder.widht: did you mean --model.decoder.width?"),
        (
            "--model.decoder.routing.shar=0.5",
            "There is no option --model.decoder.routing.shar: did you mean --model.decoder.routing.share?",
        ),
        ("--trainer.xyz=3", "There is no option --trainer.xyz: fuyu-e2e fit --help lists all options."),
        ("stray", "There is no argument stray: fuyu-e2e fit --help lists all options."),
        ("--trainer.max_steps=abc", "--trainer.max_steps is 'abc', but must be a whole number."),
        ("--model.optimizer.name=mun", "--model.optimizer.name is 'mun', but must be adamw or muon."),
        ("--model.decoder=3m", "--model.decoder is '3m', but must be 1m, 10m, 50m, 125m, 350m, 1b, 3b or 8b."),
        (
            "--model.decoder.routing.rule=best",
            "--model.decoder.routing.rule is 'best', but must be threshold, topk, image_topk, fixed or random.",
        ),
        (
            "--trainer.callbacks+=EarlyStoping",
            "--trainer.callbacks names the class EarlyStoping, which isn't known: did you mean EarlyStopping?",
        ),
        ("--config=gone.yaml", "The recipe gone.yaml can't be read: No such file or directory."),
    ],
)
def test_settings_of_a_command_line(setting: str, sentence: str, refused: Callable[..., str]) -> None:
    assert refused(["fit", "--config", RECIPE, setting]) == sentence


@pytest.mark.parametrize(
    ("command", "recipe", "sentence"),
    [
        (
            "fit",
            "trainer: {max_stepps: 3}",
            "own.yaml sets trainer.max_stepps, which is no setting: did you mean trainer.max_steps?",
        ),
        (
            "inspect",
            "trainer: {max_stepps: 3}",
            "own.yaml sets trainer.max_stepps, which is no setting: did you mean trainer.max_steps?",
        ),
        (
            "inspect",
            "trainr: {max_steps: 3}",
            "own.yaml sets trainr.max_steps, which is no setting: did you mean trainer.max_steps?",
        ),
        (
            "fit",
            "model: {decoder: {widht: 3}}",
            "own.yaml sets model.decoder.widht, which is no setting: did you mean model.decoder.width?",
        ),
        ("fit", "trainer: {max_steps: abc}", "trainer.max_steps in own.yaml is 'abc', but must be a whole number."),
        (
            "fit",
            "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitr: val/loss}}]}",
            "own.yaml sets trainer.callbacks.monitr, which is no setting: did you mean trainer.callbacks.monitor?",
        ),
        (
            "fit",
            "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.EarlyStoping}]}",
            "trainer.callbacks in own.yaml names the class EarlyStoping, which isn't known: did you mean "
            "EarlyStopping?",
        ),
        ("fit", "a: b\ntrainer: [", "The recipe own.yaml is no YAML in line 2: "),
        (
            "fit",
            "hello",
            "The recipe own.yaml holds no settings, as `trainer:` and below it `max_steps: 100` would be.",
        ),
    ],
)
def test_settings_of_a_recipe(
    command: str, recipe: str, sentence: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "own.yaml").write_text(recipe)
    assert refused([command, "--config", RECIPE, "--config", "own.yaml"]).startswith(sentence)


@pytest.mark.parametrize(("command", "own"), [("inspect", "--index"), ("estimate", "--mfu")])
def test_help_shows_a_commands_own_options_and_where_the_settings_are(
    command: str, own: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["fuyu-e2e", command, "--help"])
    assert main() == 0
    shown = capsys.readouterr().out
    assert own in shown
    assert "--config" in shown
    assert "fuyu-e2e fit --help" in shown
    assert len(shown.splitlines()) < 30
