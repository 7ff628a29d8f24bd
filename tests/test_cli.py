"""The commands as a user runs them, and what they say of bad input: one sentence, exit code 2, no traceback."""

import gzip
import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import webdataset
from PIL import Image as Pillow

from fuyu_e2e.checkpoint.lightning_io import read_checkpoint
from fuyu_e2e.checkpoint.loading import load_model
from fuyu_e2e.checkpoint.run_checkpoints import best_checkpoint, find_checkpoint
from fuyu_e2e.cli import main
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.eval.shard_questions import read_shards

VOCABULARY = 320


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_png: Callable[..., bytes]) -> Path:
    """A working folder with shards in the form of img2dataset, written by webdataset's own writer.

    Two in `shards`, and one with other samples in `test`.
    """
    folder = tmp_path_factory.mktemp("work")
    for name, numbers in (("shards", range(60)), ("test", range(60, 70))):
        (folder / name).mkdir()
        with webdataset.ShardWriter(str(folder / name / "%05d.tar"), maxcount=30, verbose=0) as writer:
            for number in numbers:
                file = io.BytesIO()
                Pillow.open(io.BytesIO(make_png(40 + number, 200 - number, seed=number))).save(file, "JPEG")
                described = {"caption": f"a picture of {number}", "url": "http://x", "status": "success", "width": 200}
                sample = {
                    "__key__": f"{number:09}",
                    "jpg": file.getvalue(),
                    "txt": described["caption"],
                    "json": described,
                }
                writer.write(sample)
    return folder


@pytest.fixture
def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> Callable[..., tuple[int, str]]:
    """Runs the command line in that folder; gives the exit code and all that was logged and printed."""
    caplog.set_level("INFO")
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fuyu-e2e", *arguments])
        capfd.readouterr()
        caplog.clear()
        try:
            code = main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        printed = capfd.readouterr()
        return code, caplog.text + printed.out + printed.err

    return run


@pytest.fixture(scope="module")
def tokenizer_file(folder: Path) -> Path:
    """Where the recipe expects it."""
    from fuyu_e2e.data.sample_stats import SampleStats
    from fuyu_e2e.data.shards.reading import read_documents
    from fuyu_e2e.data.tokenizer import train_tokenizer

    path = folder / "runs" / "quickstart" / "data" / "tokenizer.model"
    shards = sorted((folder / "shards").glob("*.tar"))
    texts = [text for shard in shards for document in read_documents(shard, SampleStats()) for text in document.texts]
    train_tokenizer(texts, VOCABULARY).save(path)
    return path


def recipe() -> str:
    return str(shipped("recipes/quickstart.yaml"))


SHORT = ("--trainer.max_steps", "3", "--trainer.enable_progress_bar", "false", "--data.shuffle", "4")


@pytest.fixture(scope="module")
def trained(folder: Path, tokenizer_file: Path) -> Path:
    """A run of three steps over the folder."""
    from fuyu_e2e.training.settings.recipe import FuyuCLI

    run = folder / "runs" / "trained"
    FuyuCLI(
        [
            "fit",
            f"--config={recipe()}",
            f"--data.train={folder}/shards/00000.tar",
            f"--data.val={folder}/shards/00001.tar",
            f"--data.tokenizer={tokenizer_file}",
            f"--trainer.default_root_dir={run}",
            "--trainer.val_check_interval=2",
            *SHORT,
        ]
    )
    return run


def refused(result: tuple[int, str], *named: str) -> None:
    code, printed = result
    assert code == 2, printed
    assert "Traceback" not in printed
    sentence = printed.strip().splitlines()[-1]
    assert all(part in sentence for part in named), sentence


def test_a_tokenizer_is_trained_on_shards(run: Callable, folder: Path) -> None:
    train = ("tokenizer", "train", "--shards", "shards/*.tar", "--vocab-size", "300", "--out", "new/t.model")
    code, printed = run(*train)
    assert code == 0
    assert "300 tokens from 2 shards (60 samples read, 0 skipped), 300 of them real, 0 padding" in printed
    assert "is replaced" not in printed
    assert "suggests" not in printed
    code, printed = run(*train[:5], "2000", *train[6:])
    assert code == 0
    assert "new/t.model was there, and is replaced" in printed
    assert Tokenizer.from_file(folder / "new" / "t.model").vocab_size == 2000
    [suggested] = re.findall(r"This text suggests --vocab-size (\d+): ", printed)
    assert 300 < int(suggested) < 2_000


def test_a_tokenizer_that_is_refused_leaves_nothing(run: Callable, folder: Path) -> None:
    train = ("tokenizer", "train", "--shards", "shards/*.tar", "--out")
    refused(run(*train, "never/t.model", "--vocab-size", "100"), "--vocab-size 100", "it takes at least ")
    refused(run(*train, "shards", "--vocab-size", "300"), "--out shards is a folder", "shards/tokenizer.model")
    refused(run(*train, "shards/00000.tar/t.model", "--vocab-size", "300"), "00000.tar/t.model can't be written")
    assert not (folder / "never").exists()


def test_fit_runs_unchanged_on_shards_of_other_software(run: Callable, tokenizer_file: Path, folder: Path) -> None:
    """The README's command for one's own shards; only shorter."""
    code, printed = run("fit", "--config", recipe(), "--data.train", "shards/*.tar", *SHORT)
    assert code == 0, printed
    assert "used, 0 skipped" in printed
    assert (folder / "runs" / "default" / "checkpoints" / "last.ckpt").exists()


def test_a_run_leaves_its_recipe_its_curves_and_a_checkpoint(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert (trained / "config.yaml").exists()
    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert "val/loss" in tags["scalars"]
    assert "val/perplexity" in tags["scalars"]
    shown = Pillow.open(io.BytesIO(events.Images("samples/0/image0")[0].encoded_image_string))
    assert shown.size == (170, 70), "without its padding to whole patches"


def test_curves_hold_what_a_run_is_judged_by(run: Callable, tokenizer_file: Path, folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = folder / "runs" / "curves"
    code, printed = run(
        "fit", "--config", recipe(), "--data.train", "shards/*.tar", *SHORT, "--trainer.log_every_n_steps", "1",
        "--trainer.default_root_dir", str(out),
    )  # fmt: skip
    assert code == 0, printed
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert {
        "train/loss", "train/perplexity", "train/gradient_norm", "lr/adamw", "lr/muon", "tokens", "tokens/s",
        "throughput/images_per_second", "throughput/packing_efficiency", "throughput/data_wait_share", "data/read",
        "bad_steps/skipped", "ranks/slowest", "ranks/step_seconds/0", "ranks/memory_gib/0",
    } <= set(events.Tags()["scalars"])  # fmt: skip
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2]


@pytest.fixture(scope="module")
def routed(folder: Path, tokenizer_file: Path) -> Path:
    """A run of six steps of a decoder with routed blocks."""
    from fuyu_e2e.training.settings.recipe import FuyuCLI

    run = folder / "runs" / "routed"
    FuyuCLI(
        [
            "fit",
            f"--config={shipped('recipes/quickstart-mod.yaml')}",
            f"--data.train={folder}/shards/00000.tar",
            f"--data.val={folder}/shards/00001.tar",
            f"--data.tokenizer={tokenizer_file}",
            f"--trainer.default_root_dir={run}",
            "--trainer.val_check_interval=3",
            "--trainer.log_every_n_steps=1",
            "--model.max_new_tokens=4",
            "--model.decoder.routing.share=[0.5,0.25]",
            "--model.decoder.routing.blocks=[2,4]",
            *SHORT,
            "--trainer.max_steps=6",
        ]
    )
    return run


def test_a_routed_run_shows_how_much_depth_each_kind_of_token_gets(routed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(routed / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    for prefix in ("routing", "val/routing"):
        kinds = {
            f"{prefix}/block{block}/{kind}" for block in (2, 4) for kind in ("patches", "newlines", "text", "answers")
        }
        assert kinds | {f"{prefix}/overflow"} <= set(tags["scalars"])
    assert {"routing/block2/threshold", "routing/block2/score_spread"} <= set(tags["scalars"])
    assert events.Scalars("routing/block2/all")[0].value == 1
    assert len(events.Scalars("val/routing/changed_choices")) == 1, "two validations have one change between them"
    assert {"routing/0", "routing/3"} <= set(tags["images"])


def test_routing_draws_the_depth_of_a_prompt(run: Callable, routed: Path, folder: Path) -> None:
    Pillow.new("RGB", (70, 30), "white").save(folder / "white.png")
    code, printed = run(
        "routing", "--checkpoint", str(routed), "--image", "white.png", "--prompt", "Read the digits.",
        "--max-new-tokens", "3", "--out", "depth.png",
    )  # fmt: skip
    assert code == 0, printed
    assert "Share of the 2 routed blocks" in printed
    assert load_model(routed).decoder.config.routing.shares_of(4, 6).patches == 0.25
    assert [kind for kind in ("patches", "newlines", "text", "answers") if kind not in printed] == []
    assert Pillow.open(folder / "depth.png").width > 500


def test_routing_of_a_dense_model_is_refused(run: Callable, trained: Path) -> None:
    refused(run("routing", "--checkpoint", str(trained), "--prompt", "a"), "dense", "every block")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("share=0", "above 0 and at most 1"),
        ("share=1.5", "above 0 and at most 1"),
        ("share=0.0001", "data.budget to at least 10000"),
        ("blocks=[0,1,2,3,4,5]", "names all 6 blocks"),
    ],
)
def test_impossible_routing_is_refused(run: Callable, tokenizer_file: Path, setting: str, sentence: str) -> None:
    recipe = str(shipped("recipes/quickstart-mod.yaml"))
    refused(
        run(
            "fit", "--config", recipe, "--data.train", "shards/*.tar", f"--model.decoder.routing.{setting}", *SHORT,
            "--trainer.default_root_dir", "runs/refused-routing",
        ),
        sentence,
    )  # fmt: skip


def test_an_unknown_rule_is_refused_by_its_type(run: Callable) -> None:
    recipe = str(shipped("recipes/quickstart-mod.yaml"))
    code, printed = run("fit", "--config", recipe, "--model.decoder.routing.rule", "best")
    assert code == 2
    assert "threshold" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_checkpoint_is_evaluated_by_lightnings_commands(run: Callable, trained: Path, command: str) -> None:
    data = {"validate": "val", "test": "test", "predict": "predict"}[command]
    shards = "test/00000.tar" if command == "test" else "shards/00001.tar"
    code, printed = run(
        command, "--config", str(trained / "config.yaml"), f"--data.{data}", shards,
        "--ckpt_path", str(trained / "checkpoints" / "last.ckpt"), "--model.max_new_tokens", "4",
    )  # fmt: skip
    assert code == 0, printed
    if command == "predict":
        lines = [json.loads(line) for line in (trained / "predictions.jsonl").read_text().splitlines()]
        assert [line["key"] for line in lines] == [f"{number:09}" for number in range(30, 60)]
        assert lines[0]["truth"] == "a picture of 30"
    else:
        assert f"{data}/perplexity" in printed


def test_generate_continues_a_prompt(run: Callable, trained: Path, folder: Path, make_png: Callable) -> None:
    (folder / "a.png").write_bytes(make_png(20, 30))
    arguments = ("--image", "a.png", "--image", "a.png", "--prompt", "What is it?", "--max-new-tokens", "3")
    code, printed = run("generate", "--checkpoint", str(trained), *arguments)
    assert code == 0, printed
    drawn = ("--temperature", "1.0", "--top-k", "5", "--top-p", "0.9", "--seed", "1")
    assert run("generate", "--checkpoint", str(trained / "checkpoints" / "last.ckpt"), *arguments, *drawn)[0] == 0


def test_inspect_shows_a_sample_of_a_run(run: Callable, trained: Path, folder: Path) -> None:
    code, printed = run("inspect", "--config", str(trained / "config.yaml"), "--index", "3", "--out", "seen.png")
    assert code == 0, printed
    assert "000000003" in printed
    assert "|SPEAKER|x25 |NEWLINE|" in printed
    assert Pillow.open(folder / "seen.png").width > 200


def test_a_stopped_run_goes_on(run: Callable, trained: Path) -> None:
    code, printed = run(
        "fit", "--config", str(trained / "config.yaml"), "--ckpt_path", "last", "--trainer.max_steps", "5"
    )
    assert code == 0, printed
    assert read_checkpoint(trained / "checkpoints" / "last.ckpt")["global_step"] == 5


def test_a_signal_has_an_exit_code_of_its_own(
    run: Callable, tokenizer_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fuyu_e2e.training.module import FuyuModule

    step = FuyuModule.training_step
    monkeypatch.setattr(
        FuyuModule, "training_step", lambda *given: os.kill(os.getpid(), signal.SIGUSR1) or step(*given)
    )
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    out = folder / "runs" / "preempted"
    fit = ("fit", "--config", recipe(), "--data.train", "shards/*.tar", "--trainer.default_root_dir", str(out), *SHORT)
    code, printed = run(*fit)
    for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), before, strict=True):
        signal.signal(number, handler)
    assert code == 138, printed
    assert f"SIGUSR1 at step 1; saved {find_checkpoint(out)}" in printed
    monkeypatch.setattr(FuyuModule, "training_step", step)
    code, printed = run("fit", "--config", str(out / "config.yaml"), "--ckpt_path", "last")
    assert code == 0, printed


def test_a_run_whose_steps_are_all_bad_ends_with_a_sentence(run: Callable, tokenizer_file: Path, folder: Path) -> None:
    fit = ("fit", "--config", recipe(), "--data.train", "shards/*.tar", "--trainer.default_root_dir", "runs/burnt")
    burnt = ("--model.optimizer.lr", "1e36", "--model.schedule.warmup", "0", "--bad_steps.in_a_row", "2")
    code, printed = run(*fit, *SHORT, *burnt)
    assert code == 3, printed
    assert "fuyu-e2e: 2 steps in a row were skipped, the last because its" in printed
    assert "Traceback" not in printed
    assert not list((folder / "runs" / "burnt").glob("checkpoints/*.ckpt"))


# Bad input


def test_a_pattern_that_matches_nothing(run: Callable, tokenizer_file: Path) -> None:
    fit = ("fit", "--config", recipe(), "--trainer.default_root_dir", "runs/none")
    refused(run(*fit, "--data.train", "nothing/*.tar"), "data.train: 'nothing/*.tar' matches no shard")
    refused(run(*fit), "data.train is not set")


def test_compressed_shards_are_refused_wherever_they_are_named(
    run: Callable, tokenizer_file: Path, folder: Path
) -> None:
    (folder / "packed").mkdir()
    (folder / "packed" / "0.tar.gz").write_bytes(gzip.compress((folder / "shards" / "00000.tar").read_bytes()))
    said = (
        "packed/0.tar.gz can't be read sample by sample",
        "unpack with `gunzip packed/0.tar.gz`, and name the .tar",
    )
    fit = ("fit", "--config", recipe(), "--trainer.default_root_dir", "runs/packed")
    for named in ("packed/*.tar.gz", "packed/*.tar", "packed"):
        refused(run(*fit, "--data.train", named), *said)
        refused(run(*fit, "--data.train", "shards/00000.tar", "--data.val", named), *said)
        refused(run("tokenizer", "train", "--shards", named, "--vocab-size", "300", "--out", "never.model"), *said)
        for command in ("index", "verify", "stats"):
            refused(run("shards", command, named), *said)
        with pytest.raises(UserError, match="can't be read sample by sample"):
            next(read_shards(named, SampleStats()))  # as `evaluate` does
    refused(run("shards", "write", "packed/0.tar.gz", "--out", "never"), "unpack it with `tar xzf packed/0.tar.gz`")


def test_a_path_of_any_command_may_begin_at_home(
    run: Callable, tokenizer_file: Path, folder: Path, make_png: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a recipe, quotes and `--option=` leave it; no command makes a folder that is called `~`."""
    home = folder / "home"
    (home / "pictures").mkdir(parents=True)
    for number in range(30):
        (home / "pictures" / f"{number}.png").write_bytes(make_png(20, 30))
        (home / "pictures" / f"{number}.txt").write_text(f"a picture of {number}")
    monkeypatch.setenv("HOME", str(home))
    shutil.copy(tokenizer_file, home / "t.model")
    write = ("shards", "write", "~/pictures", "--out=~/shards", "--val-share", "0.2", "--processes", "1")
    settings = {
        "data": {"train": ["~/shards/train-*.tar"], "val": "~/shards/val-*.tar", "tokenizer": "~/t.model"},
        "trainer": {"default_root_dir": "~/run", "max_steps": 2, "enable_progress_bar": False},
    }
    (home / "mine.yaml").write_text(json.dumps(settings))
    commands = [
        write,
        ("shards", "index", "~/shards/*.tar", "--processes", "1"),
        ("tokenizer", "train", "--shards", "~/shards/train-*.tar", "--vocab-size", "300", "--out", "~/own.model"),
        ("fit", "--config", recipe(), "--config=~/mine.yaml"),
        (
            "fit",
            "--config",
            "~/run/config.yaml",
            "--ckpt_path",
            "~/run/checkpoints/last.ckpt",
            "--trainer.max_steps",
            "3",
        ),
        ("checkpoint", "verify", "~/run"),
        ("export", "--checkpoint", "~/run", "--out=~/exported"),
        (
            "generate",
            "--checkpoint=~/exported",
            "--image",
            "~/pictures/0.png",
            "--prompt",
            "~",
            "--max-new-tokens",
            "2",
        ),
        ("inspect", "--config=~/run/config.yaml", "--out=~/inspect.png"),
    ]
    for command in commands:
        code, printed = run(*command)
        assert code == 0, (command, printed)
    assert {path.name for path in home.iterdir()} >= {"shards", "own.model", "run", "exported", "inspect.png"}
    assert not list(folder.glob("*~*"))
    saved = (home / "run" / "config.yaml").read_text()
    assert f"default_root_dir: {home}/run\n" in saved
    assert "cache_dir: ~/.cache/fuyu_e2e\n" in saved, "of whoever goes on with the run"


def test_a_shard_that_is_not_a_tar(run: Callable, tokenizer_file: Path, folder: Path) -> None:
    (folder / "fake.tar").write_text("no tar" * 500)
    fit = ("fit", "--config", recipe(), "--data.train", "fake.tar", "--trainer.default_root_dir", "runs/fake")
    refused(run(*fit), "fake.tar", "is not a tar file")
    train = ("tokenizer", "train", "--shards", "fake.tar", "--vocab-size", "300", "--out", "x.model")
    refused(run(*train), "fake.tar", "is not a tar file")


def test_shards_without_a_usable_sample(run: Callable, tokenizer_file: Path, folder: Path) -> None:
    with tarfile.open(folder / "empty.tar", "w") as tar:
        for number in range(4):
            tar.addfile(tarfile.TarInfo(f"{number}.txt"))
    fit = ("fit", "--config", recipe(), "--data.train", "empty.tar", "--trainer.default_root_dir", "runs/empty")
    refused(run(*fit), "empty.tar", "text-empty 1")
    refused(run(*fit, "--data.lanes", "2", "--data.workers", "2"), "empty.tar", "text-empty 3")


def test_a_tokenizer_that_does_not_fit(run: Callable, tokenizer_file: Path) -> None:
    fit = (
        "fit",
        "--config",
        recipe(),
        "--data.train",
        "shards/*.tar",
        "--trainer.default_root_dir",
        "runs/unfit",
        *SHORT,
    )
    refused(
        run(*fit, "--model.decoder.vocab_size", "500"), "tokenizer.model has 320 tokens", "500", "--vocab-size 500"
    )
    refused(run(*fit, "--data.tokenizer", "gone.model"), "gone.model can't be read", "fuyu-e2e tokenizer train")


def test_a_checkpoint_of_another_configuration(run: Callable, trained: Path, folder: Path) -> None:
    checkpoint = str(trained / "checkpoints" / "last.ckpt")
    fit = (
        "fit",
        "--config",
        recipe(),
        "--data.train",
        "shards/*.tar",
        "--trainer.default_root_dir",
        "runs/other",
        *SHORT,
    )
    refused(run(*fit, "--ckpt_path", checkpoint, "--model.decoder.layers", "2"), checkpoint, "layers is 2 but 4 there")
    (folder / "junk.ckpt").write_bytes(b"junk" * 100)
    refused(run(*fit, "--ckpt_path", "junk.ckpt"), "junk.ckpt can't be read as a checkpoint")
    refused(run(*fit, "--ckpt_path", "gone.ckpt"), "gone.ckpt is no checkpoint on this machine")
    refused(run("generate", "--checkpoint", "junk.ckpt", "--prompt", "a"), "junk.ckpt can't be read as a checkpoint")
    refused(run("generate", "--checkpoint", "gone", "--prompt", "a"), "gone is no checkpoint")


def test_another_tokenizer_than_the_one_trained_with(run: Callable, trained: Path, folder: Path) -> None:
    train = ("tokenizer", "train", "--shards", "shards/00000.tar", "--vocab-size", "320", "--out", "other.model")
    assert run(*train)[0] == 0
    again = ("fit", "--config", str(trained / "config.yaml"), "--ckpt_path", "last", "--trainer.max_steps", "9")
    refused(run(*again, "--data.tokenizer", "other.model"), "was trained with another tokenizer")
    assert run(*train[:5], "300", "--out", "smaller.model")[0] == 0
    refused(run(*again, "--data.tokenizer", "smaller.model"), "goes on needs the tokenizer that it began with")


def test_a_checkpoint_with_code_in_it_is_refused_and_does_not_run(run: Callable, folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (open, (str(folder / "HIT"), "w"))

    torch.save({"fuyu_e2e": Evil()}, folder / "evil.ckpt")
    refused(run("generate", "--checkpoint", "evil.ckpt", "--prompt", "a"), "evil.ckpt can't be read")
    assert not (folder / "HIT").exists()


def test_a_directory_that_holds_a_run_is_not_trained_into(run: Callable, trained: Path) -> None:
    fit = (
        "fit",
        "--config",
        recipe(),
        "--data.train",
        "shards/*.tar",
        "--trainer.default_root_dir",
        str(trained),
        *SHORT,
    )
    refused(run(*fit), "already holds a run", "--ckpt_path last")


def test_help_says_what_settings_of_a_group_mean(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fuyu-e2e", "fit", "--model.routing.help"])
    with pytest.raises(SystemExit):
        main()
    assert "Fraction of the tokens that passes a routed block" in " ".join(capsys.readouterr().out.split())


def test_bad_settings(run: Callable, tokenizer_file: Path) -> None:
    fit = (
        "fit",
        "--config",
        recipe(),
        "--data.train",
        "shards/*.tar",
        "--trainer.default_root_dir",
        "runs/bad",
        *SHORT,
    )
    for setting, value, sentence in [
        ("--model.decoder.kv_heads", "2", "set kv_heads to a divisor of 3"),
        ("--data.budget", "0", "data.budget is 0"),
        ("--data.lanes", "3", "multiple of 2"),
        ("--trainer.max_steps", "-1", "trainer.max_steps is -1, not a number of steps"),
        ("--model.schedule.warmup", "2.0", "schedule.warmup is 2.0"),
    ]:
        code, printed = run(*fit, "--data.workers", "2", setting, value)
        assert code == 2, (setting, printed)
        assert sentence in printed
        assert "Traceback" not in printed


def test_bad_prompts_and_commands(run: Callable, trained: Path, folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no image")
    ask = ("generate", "--checkpoint", str(trained), "--prompt", "a")
    refused(run(*ask, "--image", "broken.png"), "broken.png", "image-unreadable")
    refused(run(*ask, "--image", "gone.png"), "gone.png, can't be read")
    refused(run(*ask, "--temperature", "-1"), "temperature is -1")
    refused(run("inspect", "--config", str(trained / "config.yaml"), "--index", "60"), "--index 60 is beyond the last")
    code, printed = run("--help")
    assert code == 0
    assert "quickstart" in printed


def test_shards_without_a_usable_sample_show_the_first_that_is_skipped(
    run: Callable, trained: Path, folder: Path
) -> None:
    with tarfile.open(folder / "bad.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("s0004.npy"))
    said = "1 skipped (format-unknown 1); skipped first: format-unknown: bad.tar: s0004 has only npy"
    inspected = run("inspect", "--config", str(trained / "config.yaml"), "--data.train", "bad.tar", "--index", "0")
    refused(inspected, "--index 0 is beyond the last", said)
    refused(
        run("tokenizer", "train", "--shards", "bad.tar", "--vocab-size", "300", "--out", "never.model"),
        "hold no text",
        said,
    )


def test_export_import_and_going_on(
    run: Callable, trained: Path, folder: Path, make_png: Callable[..., bytes]
) -> None:
    (folder / "asked.png").write_bytes(make_png(24, 40))
    ask = ("--image", "asked.png", "--prompt", "what is it", "--max-new-tokens", "8")
    code, expected = run("generate", "--checkpoint", str(trained), *ask)
    assert code == 0
    code, printed = run("export", "--checkpoint", str(trained), "--out", "own")
    assert code == 0, printed
    assert "own: 49 tensors of step " in printed
    assert "max_steps:" in (folder / "own" / "recipe.yaml").read_text()
    assert run("generate", "--checkpoint", "own", *ask) == (0, expected)
    code, printed = run("export", "--checkpoint", "own", "--out", "stock", "--to", "transformers", "--license", "mit")
    assert code == 0, printed
    assert "license: mit" in (folder / "stock" / "README.md").read_text()
    refused(run("export", "--checkpoint", "own", "--out", "stock"), "stock already holds something")
    refused(run("export", "--checkpoint", "own", "--out", "new", "--averaged"), "own holds no averaged weights")
    code, printed = run("import", "--from", "stock", "--out", "back")
    assert code == 0, printed
    assert "fuyu-e2e fit --config back/recipe.yaml --data.train" in printed
    assert run("generate", "--checkpoint", "back", *ask) == (0, expected)
    code, printed = run("fit", "--config", "back/recipe.yaml", "--data.train", "shards/*.tar", *SHORT)
    assert code == 0, printed
    assert load_model(folder / "runs" / "back").decoder.config == load_model(trained).decoder.config
    (folder / "back").rename(folder / "moved")
    tokenizer = ("--data.tokenizer", "moved/tokenizer.model", "--trainer.max_steps", "4")
    code, printed = run("fit", "--config", "runs/back/config.yaml", "--ckpt_path", "last", *tokenizer)
    assert code == 0, f"a run that goes on needs the weights it began with no more: {printed}"
    refused(run("generate", "--checkpoint", "stock", *ask), "stock is a model of transformers", "fuyu-e2e import")
    refused(run("import", "--from", "own", "--out", "new"), "says model_type None")


def test_a_routed_model_is_not_exported_to_transformers(run: Callable, folder: Path, tokenizer_file: Path) -> None:
    fit = ("fit", "--config", recipe(), "--data.train", "shards/*.tar", "--trainer.default_root_dir", "runs/to-export")
    code, printed = run(*fit, "--model.decoder.routing.share", "0.5", *SHORT)
    assert code == 0, printed
    to_transformers = ("export", "--checkpoint", "runs/to-export", "--out", "routed", "--to", "transformers")
    refused(run(*to_transformers), "routed blocks can't be exported", "--to fuyu-e2e")
    assert not (folder / "routed").exists()
    assert run("export", "--checkpoint", "runs/to-export", "--out", "routed")[0] == 0
    assert load_model(folder / "routed").decoder.config.routing is not None


def test_checkpoints_are_verified_and_described(
    run: Callable, trained: Path, folder: Path, counts: dict[str, tuple[float | None, float]]
) -> None:
    best = best_checkpoint(trained)
    assert best is not None
    code, printed = run("checkpoint", "info", str(best.path))
    assert code == 0, printed
    assert "blocks of width 96" in printed
    assert f"{best.value:.6g}" in printed
    code, printed = run("checkpoint", "verify", str(trained))
    assert code == 0, printed
    assert printed.strip().endswith("every byte is right")
    assert counts["Comparing with checksums"] == (2, 2), "the best and the newest"
    copied = folder / "copied.ckpt"
    shutil.copytree(find_checkpoint(trained), copied)
    file = copied / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    code, printed = run("checkpoint", "verify", "copied.ckpt")
    assert code == 1
    assert "checkpoint.pt has another checksum than when it was written" in printed
    refused(run("generate", "--checkpoint", "copied.ckpt", "--prompt", "a"), "copied.ckpt is damaged: checkpoint.pt")
    refused(run("checkpoint", "verify", "shards"), "shards is no checkpoint with a manifest")


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_right(
    run: Callable, folder: Path, tokenizer_file: Path
) -> None:
    fit = ("fit", "--config", recipe(), "--data.train", "shards/*.tar", "--trainer.default_root_dir", "runs/damaged")
    keep = ("--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1")
    assert run(*fit, *keep, *SHORT)[0] == 0
    newest = find_checkpoint(folder / "runs" / "damaged")
    file = newest / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    code, printed = run(*fit, *keep, *SHORT, "--ckpt_path", "last", "--trainer.max_steps", "4")
    assert code == 0, printed
    assert f"Passed over the checkpoint runs/damaged/checkpoints/{newest.name}, which is damaged" in printed
    assert "step=2.ckpt" in printed
    assert read_checkpoint(find_checkpoint(folder / "runs" / "damaged"))["global_step"] == 4
    code, printed = run(*fit, *SHORT, "--ckpt_path", "last", "--trainer.default_root_dir", "runs/none")
    assert code == 0, f"a run that has no checkpoint yet begins: {printed}"


def test_a_run_is_profiled_where_a_recipe_says_so(tokenizer_file: Path) -> None:
    from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler

    from fuyu_e2e.training.settings.recipe import FuyuCLI

    settings = [f"--config={recipe()}", "--data.train=none.tar", f"--data.tokenizer={tokenizer_file}"]
    assert isinstance(FuyuCLI([*settings, "--trainer.profiler=simple"], run=False).trainer.profiler, SimpleProfiler)
    profiler = FuyuCLI(settings, run=False).trainer.profiler
    assert isinstance(profiler, PassThroughProfiler)
    with profiler.profile("a hook"), profiler.profile("another in it"):
        pass
