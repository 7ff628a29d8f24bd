"""Measures what a routed block saves: time and operations of a routed and a dense decoder of the same shape."""

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fuyu_e2e.bench.measure import Figures, alternate, environment
from fuyu_e2e.inference.cache import KeyValueCache
from fuyu_e2e.inference.generation import decode_step, prefill
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.cost import batch_cost, cost
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.image_layout import ImageSpan
from fuyu_e2e.model.routing.block import routed_blocks
from fuyu_e2e.model.routing.config import RoutingConfig
from fuyu_e2e.model.row import TrainingProgress

PATCH_SIZE = 16
VOCAB_SIZE = 1_024
DECODE_TOKENS = 16


def mod(args: Sequence[str]) -> None:
    """Times training steps, prefill and decoding of a routed decoder relative to the dense one."""
    parser = ArgumentParser(prog="python -m fuyu_e2e.bench mod", description=mod.__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1_024])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_024, 2_048], help="Tokens of a row.")
    parser.add_argument("--document", type=int, default=256, help="Tokens of a document (default: %(default)s).")
    parser.add_argument("--layers", type=int, default=2, help="Every second block is routed (default: %(default)s).")
    parser.add_argument("--share", type=float, default=0.125)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--out", type=Path, default=Path("bench-mod.json"))
    options = parser.parse_args(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {"layers": options.layers, "share": options.share, "document": options.document}
    figures = Figures(options.out, environment(device) | about)
    results: list[dict[str, Any]] = []
    console = Console(highlight=False)
    for width in options.widths:
        for length in options.lengths:
            for mode in options.modes:
                results += _measure(width, length, mode, device, options)
                figures.keep(results=results)
                console.print(f"width {width}, {length} tokens, {mode}: done")
    figures.end()
    console.print(_table(results))


def _config(width: int, layers: int, routing: RoutingConfig | None) -> FuyuConfig:
    return FuyuConfig(
        vocab_size=VOCAB_SIZE,
        patch_size=PATCH_SIZE,
        layers=layers,
        width=width,
        heads=width // 64,
        kv_heads=width // 64,
        head_size=64,
        feed_forward=width * 8 // 3 // 64 * 64,
        routing=routing,
    )


def _row(length: int, document: int, device: str) -> PackedBatch:
    """Returns a row of documents of one length, each half image, with a quarter supervised."""
    documents = length // document
    places = torch.arange(length).view(documents, document)
    patches = places[:, : document // 2].flatten()
    supervised = places[:, -document // 4 : -1].flatten()
    tokens = torch.randint(0, VOCAB_SIZE, (length,))
    return PackedBatch(
        tokens=tokens,
        positions=places.remainder(document).flatten(),
        patches=torch.randint(0, 256, (len(patches), PATCH_SIZE**2 * 3), dtype=torch.uint8),
        patch_positions=patches,
        target_positions=supervised,
        targets=tokens[supervised + 1],
        document_lengths=(document,) * documents,
        images=tuple(
            ImageSpan(start, ((1, document // 2),), bytes(document // 2)) for start in range(0, length, document)
        ),
        document_ids=tuple(range(documents)),
    ).to(device)


def _measure(width: int, length: int, mode: str, device: str, options: Any) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    torch.compiler.reset()  # earlier widths must not use up the limit of compilations
    row = _row(length, options.document, device)
    blocks = tuple(range(0, options.layers - 1, 2))
    routings = {
        "dense": None,
        "nothing": RoutingConfig(share=options.share, blocks=blocks, explore=0.0),
        "keys": RoutingConfig(share=options.share, blocks=blocks, explore=0.0, skipped="keys"),
    }
    with torch.device(device):
        decoders = {name: Decoder(_config(width, options.layers, routing)) for name, routing in routings.items()}
    for decoder in decoders.values():
        decoder.train()
        _settle(decoder, row)
        if mode == "compiled":
            for block in decoder.blocks:
                block.compile()
    flops = {name: _flops(decoder, row) for name, decoder in decoders.items()}
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def step(decoder: Decoder) -> Callable[[], None]:
        def run() -> None:
            with autocast:
                loss = decoder.loss(row)
            loss.backward()
            decoder.zero_grad()

        return run

    def read(decoder: Decoder) -> Callable[[], KeyValueCache]:
        @torch.no_grad()
        def run() -> KeyValueCache:
            with autocast:
                cache = KeyValueCache(decoder, len(row.document_lengths), options.document + DECODE_TOKENS)
                prefill(decoder, row, cache)
            return cache

        return run

    def write(decoder: Decoder) -> Callable[[], None]:
        tokens = torch.randint(0, VOCAB_SIZE, (DECODE_TOKENS, len(row.document_lengths)), device=device)

        @torch.no_grad()
        def run() -> None:
            cache = read(decoder)()
            with autocast:
                for column in tokens:
                    decode_step(decoder, column, cache)

        return run

    phases = {"train": alternate({name: step(decoder) for name, decoder in decoders.items()}, options.rounds)}
    cache_bytes: dict[str, int] = {}
    if mode == "eager":
        for decoder in decoders.values():
            decoder.eval()
        phases["prefill"] = alternate({name: read(decoder) for name, decoder in decoders.items()}, options.rounds)
        cache_bytes = {name: read(decoder)().bytes for name, decoder in decoders.items()}
        whole = alternate({name: write(decoder) for name, decoder in decoders.items()}, options.rounds)
        phases["decode"] = {name: seconds - phases["prefill"][name] for name, seconds in whole.items()}
    results = []
    for phase, seconds in phases.items():
        for name in ("nothing", "keys"):
            time_ratio = seconds[name] / seconds["dense"]
            flop_ratio = flops[name][phase] / flops["dense"][phase]
            result = {
                "width": width,
                "tokens": length,
                "mode": mode,
                "phase": phase,
                "skipped": name,
                "time_ratio": round(time_ratio, 4),
                "flop_ratio": round(flop_ratio, 4),
                "saving_of_ideal": round((1 - time_ratio) / (1 - flop_ratio), 4),
                "dense_seconds": round(seconds["dense"], 5),
            }
            if phase == "prefill":
                result["cache_ratio"] = round(cache_bytes[name] / cache_bytes["dense"], 4)
            results.append(result)
    return results


@torch.no_grad()
def _settle(decoder: Decoder, row: PackedBatch) -> None:
    """Lets thresholds settle on this row, as in training."""
    for _ in range(40 if decoder.config.routing is not None else 0):
        read = decoder.row(row)
        decoder.logits(row, read)
        decoder.observe(read)
        decoder.end_step(TrainingProgress(), lambda counts: counts)


@torch.no_grad()
def _flops(decoder: Decoder, row: PackedBatch) -> dict[str, int]:
    """Returns the operations of a training step, a prefill and a decoding step, for the tokens that actually pass."""
    read = decoder.row(row)
    decoder.logits(row, read)
    blocks = routed_blocks(read)
    passing = [[int(part.sum()) for part in routed.passed.split(row.document_lengths)] for routed in blocks]
    counted = batch_cost(decoder.config, row, passing=passing)
    reading = cost(decoder.config, document_lengths=row.document_lengths, grids=row.grids, targets=0, passing=passing)
    # One more token of each document; attention to cached tokens is left out for both decoders.
    one = [1] * len(row.document_lengths)
    shares = [sum(counts) / sum(row.document_lengths) for counts in passing]
    writing = cost(
        decoder.config, document_lengths=tuple(one), grids=(), targets=0, passing=[[s] * len(one) for s in shares]
    )
    return {
        "train": counted.training_flops,
        "prefill": reading.forward_flops,
        "decode": writing.forward_flops,
    }


def _table(results: Sequence[dict[str, Any]]) -> Table:
    columns = ["width", "tokens", "mode", "phase", "skipped", "time_ratio", "flop_ratio", "saving_of_ideal"]
    table = Table(*columns, "cache_ratio")
    for result in results:
        table.add_row(*(str(result[column]) for column in columns), str(result.get("cache_ratio", "")))
    return table
