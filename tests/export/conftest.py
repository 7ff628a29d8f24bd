"""Exported folders of small random models that were trained for a few steps."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fuyu_e2e.data.document import Document
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.model.attention.mask import CAUSAL, AttentionMask
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.image_layout import ImagePolicy

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3, every head its own key": {"heads": 3, "kv_heads": 3, "head_size": 16},
    "qwen3, grouped": {"heads": 6, "kv_heads": 2, "head_size": 8},
    "qwen3, one key for all": {"heads": 4, "kv_heads": 1, "head_size": 16, "rope_theta": 1e6, "norm_eps": 1e-5},
    "qwen3, windows": {
        "heads": 4,
        "kv_heads": 2,
        "head_size": 16,
        "layers": 3,
        "masks": (AttentionMask(window=24), CAUSAL),
    },
    "qwen3, windows alone": {"heads": 3, "kv_heads": 3, "head_size": 16, "masks": (AttentionMask(window=9),)},
    "fuyu, many heads": {"heads": 6, "kv_heads": 6, "head_size": 8, "dialect": "fuyu", "rope_theta": 25_000.0},
    "fuyu, two heads": {"heads": 2, "kv_heads": 2, "head_size": 24, "dialect": "fuyu", "norm_eps": 1e-5},
}


@pytest.fixture(scope="session")
def trained_decoder(builder: SequenceBuilder, random_document: Callable[[int], Document]) -> Callable[..., Decoder]:
    """Makes a decoder of a seed with random weights, and trains it for a few steps."""
    batches = [pack_row([builder.build(random_document(step * 10 + n)) for n in range(5)]) for step in range(3)]

    def make(seed: int, **shape: Any) -> Decoder:
        torch.manual_seed(seed)
        settings = {"patch_size": 4, "layers": 2, "width": 48, "feed_forward": 80}
        decoder = Decoder(FuyuConfig(vocab_size=builder.tokenizer.vocab_size, **settings | shape))
        with torch.no_grad():
            for weight in decoder.parameters():  # a new model's blocks add nothing, which would compare nothing
                weight.add_(torch.randn_like(weight) * 0.3)
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
        for batch in batches:
            (decoder.loss(batch) / len(batch.targets)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return decoder.eval()

    return make


@pytest.fixture(scope="session")
def fitted_images() -> ImagePolicy:
    """A policy that scales as transformers' processor does."""
    return ImagePolicy(patch_size=4, max_patches=24 * 16, max_size=(64, 96))


@pytest.fixture(scope="session")
def run_stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs `stock_process.py` with arguments, and a version of transformers or the installed one; gives its output."""
    installed: dict[str | None, Path] = {}

    def install(version: str | None) -> Path:
        place = tmp_path_factory.mktemp("stock")
        minor = int(torch.__version__.split(".")[1])
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(place)]
        wanted = [["--no-deps", f"torchvision==0.{minor + 15}.*"]]  # each version is made for one of torch
        if version is not None:
            wanted.append([f"transformers=={version}"])
        for packages in wanted:
            result = subprocess.run([*pip, *packages], capture_output=True, text=True)
            if result.returncode:
                pytest.skip(f"{packages[-1]} can't be installed here: {result.stderr.strip().splitlines()[-1]}")
        return place

    def run(arguments: list[Path], version: str | None = None) -> str:
        if version not in installed:
            installed[version] = install(version)
        script = Path(__file__).parent / "stock_process.py"
        result = subprocess.run(
            [sys.executable, str(script), *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": str(installed[version]), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    return run
