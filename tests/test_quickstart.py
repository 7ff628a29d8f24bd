"""The quickstart from end to end, too short to learn anything."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image as Pillow

from fuyu_e2e.checkpoint.loading import load_model
from fuyu_e2e.checkpoint.training_files import read_checkpoint
from fuyu_e2e.quickstart import quickstart

SMALL = ["--pictures", "400", "--test-pictures", "24"]
MAIN = "import sys; from fuyu_e2e.cli import main; sys.exit(main())"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_quickstart_leaves_its_figures_and_pictures(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    assert quickstart(["--out", str(out), "--max-steps", "6", *SMALL]) == 0
    results = json.loads((out / "results.json").read_text())
    assert {
        "exact_match",
        "exact_match_new_sizes",
        "exact_match_images_exchanged",
        "seconds",
        "tokens_per_second",
    } <= set(results)
    assert results["steps"] == 6
    exported = {path.name for path in (out / "fuyu-digits").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "README.md"} <= exported
    assert Pillow.open(out / "contact_sheet.png").width > 1000
    assert f"fuyu-e2e generate --checkpoint {out}" in capfd.readouterr().out.replace("\n", " ").replace("  ", " ")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_quickstart_with_routed_blocks_shows_its_depth(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    recipe = "recipes/quickstart-mod.yaml"
    assert quickstart(["--out", str(out), "--recipe", recipe, "--max-steps", "12", *SMALL]) == 0
    results = json.loads((out / "results.json").read_text())
    kinds = {"patches", "patches_with_ink", "patches_without_ink", "newlines", "text"}
    assert kinds <= set(results["share_of_depth"])
    assert Pillow.open(out / "depth_map.png").width > 500
    assert "patches with ink" in capfd.readouterr().out
    assert load_model(out / "fuyu-digits").decoder.config.routing is not None


def test_ctrl_c_leaves_a_checkpoint_that_the_printed_command_continues(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", MAIN, "quickstart", "--out", str(out), "--max-steps", "4000", *SMALL]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while not list(out.glob("checkpoints/*.ckpt")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
            if list(out.glob("tensorboard/events*")):
                time.sleep(6)  # into training, which has its own handler from its first step on
                os.kill(process.pid, signal.SIGINT)
                break
        assert process.wait(timeout=120) == 130, (tmp_path / "log").read_text()
    printed = (tmp_path / "log").read_text().replace("\n", " ")
    assert f"fuyu-e2e fit --config {out}/config.yaml --ckpt_path last" in printed
    more = ["fit", "--config", f"{out}/config.yaml", "--ckpt_path", "last"]
    step = read_checkpoint(out / "checkpoints" / "last.ckpt")["global_step"]
    assert step > 0
    subprocess.run([sys.executable, "-c", MAIN, *more, "--trainer.max_steps", str(step + 2)], check=True)
    assert read_checkpoint(out / "checkpoints" / "last.ckpt")["global_step"] == step + 2
