"""Compares generation with transformers' own: the same weights, the same prompts, the same number of tokens.

Weights are random, which doesn't change the time. Blocks are drawn so that each contributes, and the output projection
so that the likeliest token is clear of rounding errors.
"""

import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

from fuyu_e2e.bench.decoders import new_decoder
from fuyu_e2e.bench.documents import BOS, FIRST_WORD, NEWLINE, PATCH
from fuyu_e2e.bench.measure import Figures, alternate, environment
from fuyu_e2e.bench.stock import require_transformers, stock_model
from fuyu_e2e.data.sequence import TokenSequence
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.inference.generation import generate as generate_ours
from fuyu_e2e.model.config import FuyuConfig, named_size
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.image_layout import ImageSpan
from fuyu_e2e.training.device_limits import copy_bandwidth

NEVER = -1
"""An end-of-document id that no token has, so that all contenders generate equally many tokens."""
GRIDS = (4, 12)
"""Fewest and most patches along a side of an image."""
WORDS = (8, 32)
"""Fewest and most tokens of text after the image."""
THEIRS = "transformers"
"""The contender that ratios refer to."""

Contender = Callable[[int], list[list[int]]]
"""Generates a number of tokens after each prompt."""


def generate(args: Sequence[str]) -> None:
    """Times generation, eager and compiled, against transformers' generate on the exported model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = ArgumentParser(prog="python -m fuyu_e2e.bench generate", description=generate.__doc__)
    parser.add_argument(
        "--sizes", nargs="+", help="Named sizes, or `quickstart`; by default up to 125m, on a GPU up to 1b."
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="Prompts continued at once.")
    parser.add_argument("--new-tokens", type=int, default=64, help="Tokens after each (default: %(default)s).")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--out", type=Path, default=Path("bench-generate.json"))
    options = parser.parse_args(args)
    sizes = options.sizes or ["quickstart", "10m", "50m", "125m", *(["1b"] if options.device == "cuda" else [])]
    console = Console(highlight=False)
    results: list[dict[str, Any]] = []
    bandwidth = copy_bandwidth(options.device)
    transformers = require_transformers()
    about = {"transformers": transformers.__version__, "new_tokens": options.new_tokens, "rounds": options.rounds,
             "copy_gigabytes_per_second": round(bandwidth / 1e9, 2)}  # fmt: skip
    figures = Figures(options.out, environment(options.device) | about)
    for size in sizes:
        decoder = random_decoder(sized(size), options.device)
        stock = stock_model(decoder).eval()
        for batch in options.batches:
            found = _measure(decoder, stock, batch, bandwidth, options)
            results += [{"size": size, "prompts": batch, **result} for result in found]
            figures.keep(results=results)
            console.print(f"{size}, {batch} prompts: done")
    figures.end()
    console.print(_table(results))


def sized(size: str) -> FuyuConfig:
    """Returns the configuration of a named size, or the quickstart's."""
    if size == "quickstart":
        return FuyuConfig(**yaml.safe_load(shipped("recipes/quickstart.yaml").read_text())["model"]["decoder"])
    return named_size(size)


@torch.no_grad()
def random_decoder(config: FuyuConfig, device: str) -> Decoder:
    """Returns a decoder ready to generate, in which every block contributes."""
    decoder = new_decoder(config, device)
    for name, projection in decoder.blocks.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            assert isinstance(projection, nn.Linear)
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
    nn.init.normal_(decoder.lm_head.weight, std=0.5)
    return decoder.to(torch.bfloat16 if device == "cuda" else torch.float32).eval()


def random_prompts(config: FuyuConfig, count: int) -> list[TokenSequence]:
    """Returns prompts with images of different sizes, each followed by a text."""
    rng = np.random.default_rng(0)
    prompts = []
    for number in range(count):
        rows, cols = rng.integers(*GRIDS, 2, endpoint=True).tolist()
        grid = np.full((rows, cols + 1), PATCH)
        grid[:, -1] = NEWLINE
        words = rng.integers(FIRST_WORD, config.vocab_size, rng.integers(*WORDS, endpoint=True))
        tokens = np.concatenate((grid.ravel(), [BOS], words))
        prompts.append(
            TokenSequence(
                key=str(number),
                tokens=tokens,
                loss=np.zeros(len(tokens), dtype=bool),
                patches=rng.integers(0, 256, (rows * cols, config.patch_values), dtype=np.uint8),
                images=(ImageSpan.of_grid(0, rows, cols),),
            )
        )
    return prompts


def _theirs(stock: Any, prompts: list[TokenSequence], settings: dict[str, Any], new_tokens: int) -> list[list[int]]:
    """Generates as transformers' users do: prompts padded on the left, patches of all images in order."""
    longest = max(map(len, prompts))
    tokens = np.full((len(prompts), longest), BOS)
    known = np.zeros((len(prompts), longest), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt.tokens
        known[row, longest - len(prompt) :] = 1
    patches = torch.from_numpy(np.concatenate([prompt.patches for prompt in prompts])).to(stock.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about settings of generation that a fixed number of tokens makes idle
        written = stock.generate(
            input_ids=torch.from_numpy(tokens).to(stock.device),
            attention_mask=torch.from_numpy(known).to(stock.device),
            pixel_values=((patches.to(stock.dtype) - 127.5) / 127.5)[None],
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=BOS,
            **settings,
        )
    return written[:, longest:].tolist()


def _measure(decoder: Decoder, stock: Any, batch: int, bandwidth: float, options: Any) -> list[dict[str, Any]]:
    torch.compiler.reset()  # else every step would check the graphs of earlier sizes
    prompts = random_prompts(decoder.config, batch)

    def ours(compiled: bool, new_tokens: int) -> list[list[int]]:
        return generate_ours(decoder, prompts, max_new_tokens=new_tokens, eos_id=NEVER, compiled=compiled)

    contenders: dict[str, Contender] = {
        THEIRS: partial(_theirs, stock, prompts, {}),
        "transformers, static cache": partial(_theirs, stock, prompts, {"cache_implementation": "static"}),
        "ours": partial(ours, False),
        "ours, compiled": partial(ours, True),
    }
    written = {name: np.array(write(options.new_tokens)) for name, write in contenders.items()}
    lengths = {"first": 1, "all": options.new_tokens}
    runs = {(name, part): partial(write, lengths[part]) for name, write in contenders.items() for part in lengths}
    labels = {f"{name}/{part}": run for (name, part), run in runs.items()}
    seconds = alternate(labels, options.rounds, warm_up=1)
    results = []
    for name in contenders:
        whole, first = seconds[f"{name}/all"], seconds[f"{name}/first"]
        step = (whole - first) / max(1, options.new_tokens - 1)
        results.append(
            {
                "contender": name,
                "seconds": round(whole, 5),
                "prefill_seconds": round(first, 5),
                "decode_step_seconds": round(step, 6),
                "tokens_per_second": round(batch * options.new_tokens / whole, 1),
                "times_as_fast": round(seconds[f"{THEIRS}/all"] / whole, 3),
                "same_tokens": round(float((written[name] == written[THEIRS]).mean()), 4),
                "of_bandwidth": round(bytes_of_step(decoder, prompts, options.new_tokens) / step / bandwidth, 3),
            }
        )
    return results


def bytes_of_step(decoder: Decoder, prompts: list[TokenSequence], new_tokens: int) -> float:
    """Returns the bytes that a step half-way through has to read: all weights but those for prompts only, and the
    cache."""
    config = decoder.config
    size = decoder.embed_tokens.weight.element_size()
    weights = [*decoder.blocks.parameters(), *decoder.norm.parameters(), decoder.lm_head.weight]
    cached = sum(len(prompt) + new_tokens / 2 for prompt in prompts)
    values = 2 * config.layers * config.kv_heads * config.head_size
    return size * (sum(weight.numel() for weight in weights) + cached * values)


def _table(results: Sequence[dict[str, Any]]) -> Table:
    columns = ["size", "prompts", "contender", "seconds", "prefill_seconds", "decode_step_seconds",
               "tokens_per_second", "times_as_fast", "same_tokens", "of_bandwidth"]  # fmt: skip
    table = Table(*columns)
    for result in results:
        table.add_row(*(str(result[column]) for column in columns))
    return table
