"""Makes the checkpoints of this folder, with the code of before blocks were given rows.

python tests/checkpoint/earlier/make.py tests/checkpoint/earlier
"""

import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Pillow

from fuyu_e2e.checkpoint.loading import load_model
from fuyu_e2e.data.processor import Processor
from fuyu_e2e.data.tokenizer import train_tokenizer
from fuyu_e2e.inference.generation import generate
from fuyu_e2e.training.settings.recipe import FuyuCLI

STEPS = 6
"""Steps of the runs; each is saved after half of them."""
QUESTION = "how many?"
DENSE = {"vocab_size": 280, "patch_size": 4, "layers": 3, "width": 16, "heads": 2, "kv_heads": 1, "head_size": 8,
         "feed_forward": 32}  # fmt: skip
ROUTED = {"share": 0.5, "blocks": [1], "anneal": 0.2}


def write_data(folder: Path) -> None:
    """Writes a shard of tiny pictures with a question and an answer, and a tokenizer."""
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "train.tar", "w") as tar:
        for number in range(16):
            file = io.BytesIO()
            pixels = rng.integers(0, 256, (4 + 4 * (number % 3), 8, 3), np.uint8)
            Pillow.fromarray(pixels).save(file, "PNG")
            turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": str(number)}]
            for extension, content in (
                ("png", file.getvalue()),
                ("json", json.dumps({"conversations": turns}).encode()),
            ):
                info = tarfile.TarInfo(f"{number:02}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    train_tokenizer([QUESTION, *map(str, range(16))], 280).save(folder / "tokenizer.model")


def settings(folder: Path, name: str, run: Path) -> list[str]:
    """Of a run, as on a command line."""
    decoder = DENSE | ({"routing": ROUTED} if name == "routed" else {})
    every = {
        "seed_everything": 0,
        "trainer.max_steps": STEPS,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.log_every_n_steps": 1,
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.default_root_dir": run,
        "checkpoint.every_n_train_steps": STEPS // 2,
        "checkpoint.save_top_k": -1,
        "model.decoder": json.dumps(decoder),
        "model.optimizer.name": "muon" if name == "routed" else "adamw",
        "data.tokenizer": folder / "tokenizer.model",
        "data.train": folder / "train.tar",
        "data.cache_dir": run / "cache",
        "data.budget": 64,
        "data.lanes": 2,
        "data.shuffle": 8,
    }
    return [f"--{setting}={value}" for setting, value in every.items()]


def written(checkpoint: Path) -> list[int]:
    """Tokens that a checkpoint writes after a prompt with a picture."""
    model = load_model(checkpoint, torch.device("cpu"))
    picture = Pillow.fromarray(np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3))
    prompt = Processor(model.builder)(picture, QUESTION)
    [tokens] = generate(model.decoder, [prompt], max_new_tokens=12, eos_id=-1)
    return tokens


def main(folder: Path) -> None:
    write_data(folder)
    made = {"torch": torch.__version__}
    for name in ("dense", "routed"):
        run = folder / f"run-{name}"
        cli = FuyuCLI(settings(folder, name, run), run=False)
        losses: list[float] = []
        cli.model.on_train_batch_end = lambda *_, losses=losses, cli=cli: losses.append(
            float(cli.trainer.callback_metrics["train/loss"])
        )
        cli.trainer.fit(cli.model, cli.datamodule)
        [half] = (run / "checkpoints").glob(f"step={STEPS // 2}*.ckpt")
        shutil.copytree(half, folder / f"{name}.ckpt")
        made[name] = {"losses": losses, "written": written(folder / f"{name}.ckpt")}
        shutil.rmtree(run)
    (folder / "made.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
