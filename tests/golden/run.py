"""Trains by `recipe.yaml` on digits, and writes down the loss of each step.

python tests/golden/run.py tests/golden/losses.json
"""

import io
import json
import platform
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fuyu_e2e.data.tokenizer import train_tokenizer
from fuyu_e2e.tasks.digits import QUESTION, load_scans
from fuyu_e2e.training.settings.recipe import FuyuCLI

HERE = Path(__file__).parent
SHARDS, SAMPLES = 3, 40
NOISE = 0.1


def picture_and_answer(chosen: np.ndarray) -> dict[str, bytes]:
    """The members of a sample: the chosen scans side by side, each pixel twice as wide and high, and what they say."""
    scans, file = load_scans("train"), io.BytesIO()
    ink = np.kron(np.hstack(scans.pixels[chosen]), np.ones((2, 2), np.uint8))
    Pillow.fromarray(255 - ink * 15).convert("RGB").save(file, "PNG")
    answer = "".join(map(str, scans.labels[chosen]))
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": answer}]
    return {"png": file.getvalue(), "json": json.dumps({"conversations": turns}).encode()}


def write_data(folder: Path) -> None:
    """Writes shards of pictures of digits with what they say, and of sums in words; and a tokenizer."""
    rng = np.random.default_rng(0)
    sums = [f"{a} and {b} are {a + b}" for a, b in rng.integers(0, 50, (SHARDS * SAMPLES, 2))]
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(SAMPLES):
                chosen = rng.integers(0, 1000, 1 + number % 3)
                text = {"txt": sums[shard * SAMPLES + number].encode()}
                for extension, content in (text if number % 4 == 3 else picture_and_answer(chosen)).items():
                    info = tarfile.TarInfo(f"{shard}-{number}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    train_tokenizer([QUESTION, *sums], 300).save(folder / "tokenizer.model")


def losses(folder: Path, *changed: str) -> list[float]:
    """Trains in `folder`, with settings that differ from the recipe's as on a command line; gives each step's loss.

    A new decoder's blocks add nothing, so that some of its gradients are little but rounding, of which AdamW makes
    steps of full size: no two machines would agree. So the weights get some noise first, the same everywhere.
    """
    write_data(folder)
    settings = {
        "config": HERE / "recipe.yaml",
        "data.tokenizer": folder / "tokenizer.model",
        "data.train": f"{folder}/*.tar",
        "data.cache_dir": folder / "cache",
        "trainer.default_root_dir": folder / "run",
    }
    cli = FuyuCLI([*(f"--{name}={value}" for name, value in settings.items()), *changed], run=False)
    cli.model.configure_model()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for weight in cli.model.decoder.parameters():
            noise = rng.normal(0, NOISE, tuple(weight.shape))
            weight.add_(torch.from_numpy(noise).float())
    cli.trainer.fit(cli.model, cli.datamodule)
    curves = EventAccumulator(str(folder / "run" / "tensorboard"))
    curves.Reload()
    return [event.value for event in curves.Scalars("train/loss")]


def main(path: Path) -> None:
    """Writes the losses with what they were made by."""
    with tempfile.TemporaryDirectory() as folder:
        found = losses(Path(folder))
    packages = ("torch", "lightning", "numpy", "pillow", "sentencepiece", "webdataset")
    told: dict[str, Any] = {"python": platform.python_version()} | {name: version(name) for name in packages}
    path.write_text(json.dumps({"made with": told, "losses": [round(loss, 6) for loss in found]}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
