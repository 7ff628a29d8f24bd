"""Does one model read pictures of any size? Accuracy over resolution, compared with a fixed square.

Contenders train on the same scenes with one recipe, and so for equally many tokens: on mixed sizes, on all pictures
squashed to a square, and on mixed sizes that include the largest. All are scored on the same test scenes, at sizes in
training, between those and beyond. Beyond them, the first is also scored with stretched rotary positions, which needs
no training.
"""

import json
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from fuyu_e2e.bench.measure import environment, write_json
from fuyu_e2e.bench.plots import draw_picture
from fuyu_e2e.checkpoint.loading import TrainedModel, build_decoder, load_model, read_model
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.data.tokenizer import train_tokenizer
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.cost import batch_cost
from fuyu_e2e.studies.reading import share_read
from fuyu_e2e.tasks.resolution import (
    LONGEST,
    PATCH_SIZE,
    TEST_SEED,
    TEST_SIZES,
    VOCAB_SIZE,
    Pictures,
    Size,
    is_trained,
    write_shards,
)
from fuyu_e2e.training.settings.recipe import FuyuCLI

SQUARE = 64
"""Side of the fixed square; its tokens are the mean of the mixed sizes' to within a tenth."""


COUNTED_ROWS = 32
"""Training rows over which operations are averaged."""


@dataclass(frozen=True)
class Contender:
    """The training pictures of a model."""

    longest: int = LONGEST
    """Longest side in pixels."""
    square: int | None = None
    """Side to which every picture is squashed, in training and in tests."""

    def pictures(self, split: Any, seed: int, size: Size | None = None) -> Pictures:
        """Returns the description of its pictures."""
        return Pictures(split=split, seed=seed, size=size, longest=self.longest, square=self.square)


CONTENDERS = {
    "mixed": Contender(),
    "square": Contender(square=SQUARE),
    "longer": Contender(longest=max(max(size) for size in TEST_SIZES)),
}


def resolution(args: Sequence[str]) -> None:
    """Trains models on mixed sizes and on a fixed square, and scores them at sizes in and outside of training."""
    parser = ArgumentParser(prog="python -m fuyu_e2e.studies resolution", description=resolution.__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/resolution"), help="What is there already is kept.")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=50_000, help="Training pictures (default: %(default)s).")
    parser.add_argument("--test-pictures", type=int, default=1_000, help="Of each size (default: %(default)s).")
    parser.add_argument("--max-steps", type=int, help="Training steps, instead of the recipe's.")
    parser.add_argument("--out", type=Path, default=Path("bench-resolution.json"))
    options = parser.parse_args(args)
    for name in options.contenders:
        folder = options.runs / f"{name}-{options.seed}"
        if not (folder / "scores.json").exists():
            _prepare(options.runs / "data", name, options.seed, options.pictures)
            operations = _train(folder, options.runs / "data", name, options.seed, options.max_steps)
            result = _score(folder, CONTENDERS[name], stretch=name == "mixed", count=options.test_pictures)
            write_json(folder / "scores.json", {"operations_per_step": operations} | result)
    scored = sorted(options.runs.glob("*/scores.json"))
    results = [json.loads(path.read_text()) | {"run": path.parent.name} for path in scored]
    write_json(options.out, {**environment("cpu"), "square": SQUARE, "runs": results})
    Console(highlight=False).print(_table(results))
    draw_picture(options.out.with_suffix(".png"), 2, lambda axes: _draw(axes, results))


def _prepare(data: Path, name: str, seed: int, count: int) -> None:
    """Writes a contender's shards, if they are missing, and a tokenizer for all."""
    data.mkdir(parents=True, exist_ok=True)
    contender = CONTENDERS[name]
    if not (data / f"{name}-val-00000.tar").exists():
        train = write_shards(data, f"{name}-train", contender.pictures("train", seed), count)
        if not (data / "tokenizer.model").exists():
            texts = (text for document in read_documents(train[0], SampleStats()) for text in document.texts)
            train_tokenizer(texts, VOCAB_SIZE).save(data / "tokenizer.model")
        write_shards(data, f"{name}-val", contender.pictures("val", TEST_SEED), min(300, count))


def _train(folder: Path, data: Path, name: str, seed: int, max_steps: int | None) -> int:
    """Trains or resumes a run; returns the operations of a step, averaged over the first rows."""
    settings: dict[str, Any] = {
        "config": shipped("recipes/resolution.yaml"),
        "seed_everything": seed,
        "trainer.default_root_dir": folder,
        "data.tokenizer": data / "tokenizer.model",
        "data.train": data / f"{name}-train-*.tar",
        "data.val": data / f"{name}-val-*.tar",
        "ckpt_path": "last",
    }
    if max_steps is not None:
        settings |= {"trainer.max_steps": max_steps, "trainer.val_check_interval": max_steps}
    cli = FuyuCLI(["fit", *(f"--{name}={value}" for name, value in settings.items())])
    costs = [
        batch_cost(cli.model.config, row.batch).training_flops
        for row in islice(cli.datamodule.stream("train").rows(), COUNTED_ROWS)
    ]
    return round(mean(costs))


def stretched(config: FuyuConfig, factor: float) -> FuyuConfig:
    """Returns the decoder with its slowest rotary wave `factor` times as long, and its fastest unchanged.

    "NTK-aware" scaling (Peng et al. 2023, arXiv 2309.00071, section 3.1): the base grows by factor^(d / (d - 2)),
    where d is the number of turned values of a head. Only the base changes, so an export computes the same.
    """
    size = config.rotary_size
    return replace(config, rope_theta=config.rope_theta * factor ** (size / (size - 2)))


def image_tokens(height: int, width: int) -> int:
    """Returns the patches and newlines of a picture."""
    return -(-height // PATCH_SIZE) * (-(-width // PATCH_SIZE) + 1)


def _score(folder: Path, contender: Contender, stretch: bool, count: int) -> dict[str, Any]:
    model = load_model(folder)
    started_at = time.perf_counter()
    scores = [_score_size(model, folder, contender, size, count) for size in TEST_SIZES]
    result: dict[str, Any] = {"steps": model.step, "test_pictures": count, "scores": scores}
    if stretch:
        longest = image_tokens(LONGEST, LONGEST)
        result["stretched"] = []
        stored = read_model(folder)
        for size in (size for size in TEST_SIZES if image_tokens(*size) > longest):
            config = stretched(model.decoder.config, image_tokens(*size) / longest)
            decoder = build_decoder(config, stored.weights)
            other = TrainedModel(decoder, model.builder, model.step)
            result["stretched"].append(_score_size(other, folder, contender, size, count))
    result["seconds_scoring"] = round(time.perf_counter() - started_at)
    return result


def _score_size(model: TrainedModel, folder: Path, contender: Contender, size: Size, count: int) -> dict[str, Any]:
    height, width = size
    (shard,) = write_shards(
        folder, "test", contender.pictures("test", TEST_SEED, size), count, processes=1, shard_size=count
    )
    accuracy = share_read(model, str(shard), "resolution")
    shard.unlink()
    shown = size if contender.square is None else (contender.square, contender.square)
    return {
        "size": f"{height}x{width}",
        "trained": is_trained(height, width, contender.longest),
        "tokens": image_tokens(*shown),
        "accuracy": accuracy,
    }


def _groups(run: dict[str, Any]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {"yes": [], "between": [], "beyond": []}
    for score in run["scores"]:
        groups[score["trained"]].append(score["accuracy"])
    return groups


def _table(results: Sequence[dict[str, Any]]) -> Table:
    table = Table("run", "trained sizes: worst", "best", "between: worst", "mean", "beyond: worst", "mean")
    for run in results:
        groups = _groups(run)
        cells = [f"{min(groups['yes']):.3f}", f"{max(groups['yes']):.3f}"]
        for name in ("between", "beyond"):
            cells += [f"{min(groups[name]):.3f}", f"{mean(groups[name]):.3f}"] if groups[name] else ["", ""]
        table.add_row(run["run"], *cells)
        if "stretched" in run:
            accuracies = [score["accuracy"] for score in run["stretched"]]
            table.add_row(f"{run['run']}, stretched", *[""] * 4, f"{min(accuracies):.3f}", f"{mean(accuracies):.3f}")
    return table


def _draw(axes: list[Any], results: Sequence[dict[str, Any]]) -> None:
    over_tokens, over_proportion = axes
    for run in results:
        for kind, marker in (("scores", "o"), ("stretched", "x")):
            if kind not in run:
                continue
            label = run["run"] if kind == "scores" else f"{run['run']}, {kind}"
            style = {"marker": marker, "linestyle": "none", "markersize": 5}
            points = [(*map(int, score["size"].split("x")), score["accuracy"]) for score in run[kind]]
            within = [point for point in points if is_trained(*point[:2]) != "beyond"]
            over_tokens.plot([image_tokens(h, w) for h, w, _ in points], [y for *_, y in points], label=label, **style)
            over_proportion.plot([w / h for h, w, _ in within], [y for *_, y in within], **style)
    over_tokens.axvspan(0, image_tokens(LONGEST, LONGEST), color="0.92", zorder=0)
    over_tokens.set(xlabel=f"tokens of the picture at its own size (grey: sides up to {LONGEST} pixels)")
    over_tokens.set(ylabel="read right")
    over_proportion.set(xlabel=f"width over height, of sides up to {LONGEST} pixels", xscale="log")
    over_proportion.set_xticks([1 / 3, 0.5, 1, 2, 3], ["1:3", "1:2", "1:1", "2:1", "3:1"])
    over_proportion.minorticks_off()
    over_tokens.legend(fontsize=7)
