"""Compares a training step with transformers': the same weights, documents and AdamW; forward, backward, update.

Our update is the trainer's own optimizer, transformers' is torch's fused AdamW. Both train on the same mixture of
captions, questions and text with images of many sizes. We read a packed row; transformers reads the row's documents as
one batch padded on the left, or, grouped by length, the sorted documents of all rows in equally many batches. Only the
documents' tokens count; batches are on the device before timing.
"""

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from fuyu_e2e.bench.decoders import new_decoder
from fuyu_e2e.bench.documents import histogram, mixture
from fuyu_e2e.bench.measure import Figures, alternate, environment
from fuyu_e2e.bench.own_process import peak_memory
from fuyu_e2e.bench.stock import grouped_by_length, require_transformers, stock_model, stock_training_batch
from fuyu_e2e.bench.train_report import report
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sequence import TokenSequence
from fuyu_e2e.model.config import FuyuConfig, named_size
from fuyu_e2e.model.cost import batch_cost
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.float8 import has_float8, use_float8
from fuyu_e2e.model.memory import memory
from fuyu_e2e.training.device_limits import peak_rate
from fuyu_e2e.training.optimizers import OptimizerConfig, build_optimizer

ADAMW = OptimizerConfig(lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
"""The optimizer settings of all contenders."""
SMALL = FuyuConfig(
    vocab_size=4_096, patch_size=16, layers=4, width=256, heads=4, kv_heads=2, head_size=64, feed_forward=768
)
"""A size for CPUs, with the same ratio of vocabulary to width as `1b`."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A decoder size with its training data."""

    size: str
    budget: int
    """Tokens of a row."""
    rows: int
    """Rows of an epoch, each a step."""
    sides: tuple[int, int]
    """Fewest and most patches along an image's longer side."""

    @property
    def config(self) -> FuyuConfig:
        """The decoder."""
        return SMALL if self.size == "small" else named_size(self.size)

    @property
    def documents(self) -> list[list[TokenSequence]]:
        """The documents of each row."""
        return mixture(self.config, rows=self.rows, budget=self.budget, sides=self.sides)


CASES = {
    "small": Case(size="small", budget=2_048, rows=3, sides=(4, 20)),
    "10m": Case(size="10m", budget=2_048, rows=3, sides=(4, 20)),
    "125m": Case(size="125m", budget=16_384, rows=6, sides=(8, 48)),
    "1b": Case(size="1b", budget=8_192, rows=6, sides=(8, 48)),
    "3b": Case(size="3b", budget=4_096, rows=6, sides=(8, 48)),
}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to train."""

    ours: bool
    compiled: bool = False
    attention: str = "sdpa"
    """transformers' name for its attention."""
    grouped: bool = False
    """Whether batches are grouped by length."""
    fp8: bool = False
    """Whether blocks multiply in float8."""


CONTENDERS = {
    "transformers, sdpa": Contender(ours=False),
    "transformers, eager": Contender(ours=False, attention="eager"),
    "transformers, flash": Contender(ours=False, attention="flash_attention_2"),
    "transformers, sdpa, by length": Contender(ours=False, grouped=True),
    "transformers, sdpa, compiled": Contender(ours=False, compiled=True),
    "transformers, sdpa, by length, compiled": Contender(ours=False, compiled=True, grouped=True),
    "ours": Contender(ours=True),
    "ours, compiled": Contender(ours=True, compiled=True),
    "ours, compiled, fp8": Contender(ours=True, compiled=True, fp8=True),
}


@dataclass(frozen=True)
class Trainee:
    """A model ready to train."""

    batches: Sequence[Any]
    loss: Callable[[Any], Tensor]
    """Returns the mean loss over supervised tokens of a batch."""
    optimizer: torch.optim.Optimizer
    device: str

    def forward(self, batch: Any) -> Tensor:
        """Returns the loss, under bfloat16 autocast on a GPU, like our trainer and transformers'."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            return self.loss(batch)

    def epoch(self) -> None:
        """Trains one step on each batch."""
        for batch in self.batches:
            self.forward(batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def train(args: Sequence[str]) -> None:
    """Times training steps, eager and compiled, against transformers' FuyuForCausalLM, with memory and MFU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = ArgumentParser(prog="python -m fuyu_e2e.bench train", description=train.__doc__)
    default = ["125m", "1b", "3b"] if device == "cuda" else ["small"]
    parser.add_argument("--sizes", nargs="+", choices=list(CASES), default=default)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=available())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=int, help="Tokens of a row; by default what the size has.")
    parser.add_argument("--out", type=Path, default=Path("bench-train.json"))
    options = parser.parse_args(args)
    transformers = require_transformers()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    peak, source = peak_rate(device, dtype)
    about = {
        **environment(device),
        "transformers": transformers.__version__,
        "precision": "bf16-mixed" if device == "cuda" else "32-true",
        "peak_flops_per_second": peak,
        "peak_source": source,
        "rounds": options.rounds,
    }
    console = Console(highlight=False)
    figures = Figures(options.out, about)
    cases: list[dict[str, Any]] = []
    for size in options.sizes:
        case = CASES[size] if options.budget is None else replace(CASES[size], budget=options.budget)

        def keep(case: dict[str, Any]) -> None:
            figures.keep(cases=[*cases, case])

        cases.append(_measure(case, options.contenders, options.rounds, device, peak, keep))
        console.print(f"{size}: done")
    figures.end(cases=cases)
    report(cases, options.out.with_suffix(".png"))


def available() -> list[str]:
    """Returns the contenders that run here: flash attention needs its package and a GPU, float8 a GPU with support."""
    flash = torch.cuda.is_available() and require_transformers().utils.is_flash_attn_2_available()
    return [
        name
        for name, contender in CONTENDERS.items()
        if (flash or contender.attention != "flash_attention_2") and (has_float8() or not contender.fp8)
    ]


def _measure(
    case: Case,
    names: Sequence[str],
    rounds: int,
    device: str,
    peak: float,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measures the memory of each contender, then its speed; `keep` receives the figures so far after each step."""
    documents = case.documents
    rows = [pack_row(row, case.budget) for row in documents]
    lengths = [length for row in rows for length in row.document_lengths]
    tokens, images = sum(lengths), sum(len(row.images) for row in rows)
    flops = [batch_cost(case.config, row) for row in rows]
    apart = device == "cuda" and _together(case, rows[0], names) > torch.cuda.mem_get_info()[1]
    memories: dict[str, int | str] = {}
    seconds: dict[str, float | str] = {}
    losses: dict[str, float] = {}

    def known() -> dict[str, Any]:
        best = min((s for n, s in seconds.items() if isinstance(s, float) and not CONTENDERS[n].ours), default=None)
        results: list[dict[str, Any]] = []
        for name in names:
            took = seconds.get(name)
            if isinstance(took, str):
                results.append({"contender": name, "failed": took})
            elif took is None:
                results.append({"contender": name, "peak_memory_bytes": memories.get(name)})
            else:
                results.append(
                    {
                        "contender": name,
                        "seconds_per_step": round(took / len(rows), 5),
                        "tokens_per_second": round(tokens / took, 1),
                        "images_per_second": round(images / took, 2),
                        "mfu": round(sum(row.training_flops for row in flops) / took / peak, 4),
                        "peak_memory_bytes": memories[name],
                        "times_as_fast": round(best / took, 3) if best is not None else None,
                        "padding": round(1 - tokens / _padded(documents, CONTENDERS[name], case.budget), 4),
                        "first_loss": round(losses[name], 6),
                    }
                )
        return {
            "size": case.size,
            "parameters": flops[0].parameters,
            "row_tokens": case.budget,
            "rows": case.rows,
            "tokens": tokens,
            "images": images,
            "document_lengths": histogram(lengths),
            "training_flops_per_token": round(sum(row.training_flops for row in flops) / tokens),
            "alternating": not apart,
            "results": results,
        }

    def keep_speeds(medians: dict[str, float]) -> None:
        seconds.update(medians)
        keep(known())

    for name in names:
        memories[name] = _remember(partial(peak_memory, run_once, case, name, device))
        keep(known())
    for group in [[name] for name in names] if apart else [list(names)]:
        torch.compiler.reset()
        trainees = build(case, group, device)
        for name in group:
            first = _remember(partial(_first_loss, trainees[name]))
            if isinstance(first, str):
                seconds[name] = first
            else:
                losses[name] = first
        running = {name: trainees[name].epoch for name in group if name in losses}
        seconds |= alternate(running, rounds, warm_up=2, keep=keep_speeds)
        trainees.clear()
        running.clear()
        torch.cuda.empty_cache()
    return known()


def _remember(run: Callable[[], Any]) -> Any:
    """Returns the result of `run`, or its error in words, so that a failing contender is listed with the others."""
    try:
        return run()
    except (torch.OutOfMemoryError, RuntimeError, ImportError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _first_loss(trainee: Trainee) -> float:
    """Returns the loss with new weights, after a whole step, so that a failure shows before timing."""
    loss = trainee.forward(trainee.batches[0])
    loss.backward()
    trainee.optimizer.zero_grad()
    return float(loss.detach())


def _together(case: Case, row: Any, names: Sequence[str]) -> int:
    """Returns the bytes of all contenders that are in memory at once: each of ours and one model of transformers."""
    models = sum(CONTENDERS[name].ours for name in names) + 1
    parts = memory(case.config, tokens=case.budget, patches=len(row.patches), targets=len(row.targets))
    states = parts.weights + parts.gradients + parts.optimizer_state
    return models * states + 3 * parts.activations  # a padded batch with all its logits takes more than a row


def _padded(documents: list[list[TokenSequence]], contender: Contender, budget: int) -> int:
    if contender.ours:
        return budget * len(documents)
    batches = grouped_by_length(documents) if contender.grouped else documents
    return sum(len(batch) * max(map(len, batch)) for batch in batches)


def build(case: Case, names: Sequence[str], device: str) -> dict[str, Trainee]:
    """Returns contenders with the same new weights; transformers' contenders share one model, each of ours has its
    own."""
    documents = case.documents
    trainees: dict[str, Trainee] = {}
    stock = None
    for name in names:
        contender = CONTENDERS[name]
        if contender.ours:
            own = new_decoder(case.config, device).train()
            if contender.fp8:
                use_float8(own, torch.device(device))
            if contender.compiled:
                for block in own.blocks:
                    block.compile()
            batches: list[Any] = [pack_row(row, case.budget).to(device) for row in documents]
            trainees[name] = Trainee(batches, _OurLoss(own), build_optimizer(own, ADAMW), device)
        else:
            if stock is None:
                stock = stock_model(new_decoder(case.config, device)).train()
                compiled = torch.compile(stock, dynamic=True)  # once for batches of all shapes
                optimizer = _fused_adamw(stock)
            padded = grouped_by_length(documents) if contender.grouped else documents
            batches = [stock_training_batch(batch, device) for batch in padded]
            trainees[name] = Trainee(
                batches,
                _TheirLoss(stock, compiled if contender.compiled else stock, contender.attention),
                optimizer,
                device,
            )
    return trainees


class _OurLoss:
    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def __call__(self, batch: Any) -> Tensor:
        return self.decoder.loss(batch) / batch.targets.numel()


class _TheirLoss:
    def __init__(self, model: Any, run: Any, attention: str) -> None:
        self.model, self.attention = model, attention
        self.run = run

    def __call__(self, batch: Any) -> Tensor:
        if self.model.config.text_config._attn_implementation != self.attention:
            self.model.set_attn_implementation(self.attention)
        return self.run(**batch, use_cache=False).loss


def _fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Returns torch's AdamW with the settings of ours: decay on matrices only."""
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": ADAMW.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=ADAMW.lr, betas=ADAMW.betas, fused=True)


def run_once(case: Case, name: str, device: str) -> None:
    """Trains one contender for two steps; to be run in a separate process."""
    trainee = build(replace(case, rows=2), [name], device)[name]
    trainee.epoch()
