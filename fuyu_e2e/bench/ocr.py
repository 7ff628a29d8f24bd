"""How small may letters be? The character error rate of a model over the height of what it reads."""

import json
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torchmetrics.functional.text import char_error_rate

from fuyu_e2e.bench.measure import environment, write_json
from fuyu_e2e.bench.plots import draw_picture
from fuyu_e2e.checkpoint.loading import TrainedModel, load_model
from fuyu_e2e.errors import UserError
from fuyu_e2e.eval.contact_sheet import Cell, contact_sheet
from fuyu_e2e.eval.exact_match import Reading, exact_match, exchange_images, read
from fuyu_e2e.eval.rendered_text import MAX_NEW_TOKENS
from fuyu_e2e.shards.formats import read_documents
from fuyu_e2e.shards.reading import Shard
from fuyu_e2e.tally import Tally

SPLITS = {"test": "fonts never trained on", "test-known-fonts": "fonts of training"}
"""The tests, all of words never trained on."""


def ocr(args: Sequence[str]) -> None:
    """Scores a model of recipes/ocr.yaml on the shards of data/rendered_text.py, by the height of letters."""
    parser = ArgumentParser(prog="python -m fuyu_e2e.bench ocr", description=ocr.__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/ocr"), help="Default: %(default)s.")
    parser.add_argument("--data", type=Path, default=Path("runs/ocr/data"), help="Default: %(default)s.")
    parser.add_argument("--out", type=Path, default=Path("bench-ocr.json"), help="Default: %(default)s.")
    options = parser.parse_args(args)
    model = load_model(options.checkpoint)
    results: dict[str, Any] = {"steps": model.step}
    for split in SPLITS:
        shards = sorted(options.data.glob(f"{split}-0*.tar"))
        if not shards:
            raise UserError(f"{options.data} holds no shards of the split {split}: python data/rendered_text.py.")
        heights = _heights(shards)
        documents = [document for shard in shards for document in read_documents(shard, Tally())]
        readings = _read(model, documents)
        groups = defaultdict(list)
        for reading in readings:
            groups[heights[reading.prompt.document.key]].append(reading)
        results[split] = _score(readings) | {"heights": {name: _score(groups[name]) for name in sorted(groups)}}
        blind = _read(model, list(exchange_images(documents)))
        results[split]["images_exchanged"] = _score(blind)
        cells = [Cell(r.prompt.sequence.pictures[0], r.prompt.truth, r.text) for r in readings[:48]]
        contact_sheet(cells, options.out.with_name(f"{options.out.stem}-{split}.png"))
    write_json(options.out, {**environment("cpu"), **results})
    Console(highlight=False).print(_table(results))
    draw_picture(options.out.with_suffix(".png"), 1, lambda axes: _draw(axes[0], results))


def _heights(shards: Sequence[Path]) -> dict[str, str]:
    """The bin of the letters' height of each sample."""
    found = {}
    for shard in map(Shard, shards):
        for number in range(len(shard)):
            sample = shard.sample(number)
            found[sample.key] = json.loads(sample.members["json"])["groups"]["height"]
    return found


def _read(model: TrainedModel, documents: Any) -> list[Reading]:
    return read(model, list(model.builder.prompts(documents, Tally())), MAX_NEW_TOKENS)


def _score(readings: Sequence[Reading]) -> dict[str, Any]:
    rate = char_error_rate([reading.text for reading in readings], [reading.prompt.truth for reading in readings])
    return {
        "words": len(readings),
        "character_error_rate": round(float(rate), 4),
        "exact_match": round(exact_match(readings), 4),
    }


def _table(results: dict[str, Any]) -> Table:
    table = Table("height of a capital", *(f"{what}: {name}" for name in SPLITS.values() for what in ("CER", "words")))
    rows = {name: [results[split]["heights"][name] for split in SPLITS] for name in results["test"]["heights"]}
    rows |= {"all": [results[split] for split in SPLITS]}
    rows |= {"images exchanged": [results[split]["images_exchanged"] for split in SPLITS]}
    for name, scores in rows.items():
        cells = [f"{score[what]:.3f}" for score in scores for what in ("character_error_rate", "exact_match")]
        table.add_row(name, *cells)
    return table


def _draw(axis: Any, results: dict[str, Any]) -> None:
    for split, name in SPLITS.items():
        heights = results[split]["heights"]
        axis.plot(list(heights), [score["character_error_rate"] for score in heights.values()], marker="o", label=name)
    axis.set(xlabel="height of a capital in pixels", ylabel="character error rate", ylim=(0, None))
    axis.legend(fontsize=8)
