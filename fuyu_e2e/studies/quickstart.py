"""The quickstart: from handwritten digits to a model that reads them, with figures and a picture."""

import json
import os
import time
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fuyu_e2e.checkpoint.loading import TrainedModel, load_model, read_model
from fuyu_e2e.data.document import Document
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.formats import read_documents
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.data.tokenizer import train_tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.eval.contact_sheet import Cell, contact_sheet
from fuyu_e2e.eval.depth import depth_shares, depth_table, prediction_depths
from fuyu_e2e.eval.exact_match import Prediction, by_group, chance_of_exchange, exact_match, exchange_images, predict
from fuyu_e2e.export.folders import export_own, export_to_transformers
from fuyu_e2e.inference.depth_map import depth_map
from fuyu_e2e.model.decoder import meta_decoder
from fuyu_e2e.tasks.digits import MAX_NEW_TOKENS, QUESTION, TEST_SEED, VOCAB_SIZE, write_shards
from fuyu_e2e.training.settings.recipe import FuyuCLI

DEPTH_PICTURES = 200
"""Test pictures over which the tokens' depth is averaged."""


@dataclass(frozen=True)
class Workplace:
    """The paths of one quickstart."""

    root: Path

    @property
    def data(self) -> Path:
        """The folder of shards and tokenizer."""
        return self.root / "data"

    @property
    def tokenizer(self) -> Path:
        """The trained tokenizer."""
        return self.data / "tokenizer.model"

    @property
    def exported(self) -> Path:
        """The folder of the exported model."""
        return self.root / "fuyu-digits"

    def pattern(self, split: str) -> str:
        """Returns the pattern of a split's shards."""
        return str(self.data / f"{split}-*.tar")


def run(options: Namespace) -> None:
    """Writes shards of composed digits, trains a tokenizer and a model on them, and scores what it reads.

    Raises:
        UserError: The directory already contains a run, or the recipe is invalid.
    """
    place = Workplace(Path(options.out))
    if any(place.root.glob("checkpoints/*.ckpt")):
        raise UserError(f"{place.root} already holds a run: name another directory with --out, or remove it.")
    settings = recipe_settings(place, options.recipe, options.seed, options.max_steps)
    FuyuCLI(settings, run=False)  # shows errors of the recipe before minutes of drawing
    console = Console(highlight=False)
    started_at = time.perf_counter()

    console.rule("1. Pictures")
    prepare(place, options.seed, options.pictures, options.test_pictures)
    console.print(f"{options.pictures:,} training pictures in {place.data} ({time.perf_counter() - started_at:.0f} s)")

    console.rule("2. Training")
    cli = FuyuCLI(["fit", *settings])

    console.rule("3. Reading")
    model = load_model(place.root / "checkpoints" / "last.ckpt")
    export_model(place)
    results, predictions = score(model, place)
    results["seconds"] = round(time.perf_counter() - started_at, 1)
    results["tokens_per_second"] = round(cli.throughput.tokens / cli.throughput.seconds)
    results["seed"] = options.seed
    results["steps"] = model.step
    if depths := prediction_depths(model, predictions[:DEPTH_PICTURES]):
        results["share_of_depth"] = depth_shares(depths)
        shown = max(depths[:48], key=lambda depth: len(depth.sequence.patches))
        depth_map(shown, model.tokenizer).save(place.root / "depth_map.png")
    (place.root / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    sheet = place.root / "contact_sheet.png"
    contact_sheet([cell(prediction) for prediction in predictions[:48]], sheet)
    report(console, place, results, sheet)


def prepare(place: Workplace, seed: int, pictures: int, test_pictures: int) -> None:
    """Writes the shards of all splits, and a tokenizer trained on the training texts."""
    place.data.mkdir(parents=True, exist_ok=True)
    shards = write_shards(place.data, split="train", count=pictures, seed=seed, processes=os.cpu_count() or 1)
    write_shards(place.data, split="val", count=200, seed=TEST_SEED)
    write_shards(place.data, split="test", count=test_pictures, seed=TEST_SEED)
    write_shards(place.data, split="test-new-sizes", count=test_pictures, seed=TEST_SEED)
    texts = (text for document in documents(shards[:1]) for text in document.texts)
    train_tokenizer(texts, VOCAB_SIZE).save(place.tokenizer)


def documents(shards: Iterable[Path]) -> Iterable[Document]:
    """Returns all documents of some shards."""
    return (document for shard in shards for document in read_documents(shard, SampleStats()))


def recipe_settings(place: Workplace, recipe: str, seed: int, max_steps: int | None) -> list[str]:
    """Returns the options for `fuyu-e2e fit`, with a recipe that is a file or shipped.

    Raises:
        UserError: The recipe is neither.
    """
    path = Path(recipe)
    try:
        path = path if path.is_file() else shipped(recipe)
    except UserError:
        raise UserError(f"--recipe {recipe} is no file, and none of the shipped ones (recipes/*.yaml).") from None
    settings: dict[str, Any] = {
        "config": path,
        "seed_everything": seed,
        "trainer.default_root_dir": place.root,
        "data.tokenizer": place.tokenizer,
        "data.train": place.pattern("train"),
        "data.val": place.pattern("val"),
    }
    if max_steps is not None:
        settings["trainer.max_steps"] = max_steps
        settings["trainer.val_check_interval"] = max_steps
    return [f"--{name}={value}" for name, value in settings.items()]


def export_model(place: Workplace) -> None:
    """Exports the model for transformers, or for `fuyu_e2e.load` if it has blocks that select tokens."""
    stored = read_model(place.root / "checkpoints" / "last.ckpt")
    if meta_decoder(stored.metadata.config).selecting:
        export_own(stored, place.exported, question=QUESTION)
    else:
        export_to_transformers(stored, place.exported, question=QUESTION)


def score(model: TrainedModel, place: Workplace) -> tuple[dict[str, Any], list[Prediction]]:
    """Reads all test pictures; returns the figures, and the readings at trained sizes."""
    seen, new = (list(documents(sorted(place.data.glob(f"{split}-0*.tar")))) for split in ("test", "test-new-sizes"))
    predictions = read_all(model, seen)
    return {
        "exact_match": exact_match(predictions),
        "exact_match_by_digits": by_group(predictions, lambda prediction: len(prediction.prompt.truth)),
        "exact_match_new_sizes": exact_match(read_all(model, new)),
        "exact_match_images_exchanged": exact_match(read_all(model, list(exchange_images(seen)))),
        "chance_images_exchanged": chance_of_exchange(seen),
    }, predictions


def read_all(model: TrainedModel, asked: list[Document]) -> list[Prediction]:
    """Returns the model's reading of each picture."""
    return predict(model, list(model.builder.prompts(asked, SampleStats())), MAX_NEW_TOKENS)


def cell(prediction: Prediction) -> Cell:
    """Returns the cell of the contact sheet for a reading."""
    return Cell(prediction.prompt.sequence.unpadded_pictures[0], prediction.prompt.truth, prediction.text)


def report(console: Console, place: Workplace, results: dict[str, Any], sheet: Path) -> None:
    """Prints the figures and suggestions for next steps."""
    table = Table("pictures from scans never trained on", "read letter for letter")
    table.add_row("sizes trained on", f"{results['exact_match']:.3f}")
    for digits, share in results["exact_match_by_digits"].items():
        table.add_row(f"  {digits} digit{'s' if digits > 1 else ''}", f"{share:.3f}")
    table.add_row("sizes never trained on", f"{results['exact_match_new_sizes']:.3f}")
    table.add_row(
        "images exchanged (blind)",
        f"{results['exact_match_images_exchanged']:.3f} (chance {results['chance_images_exchanged']:.3f})",
    )
    console.print(table)
    if "share_of_depth" in results:
        console.print(depth_table(results["share_of_depth"]))
        console.print(f"Heat map of a picture: {place.root}/depth_map.png", soft_wrap=True)
    console.print(
        f"{results['seconds']:.0f} s in all, {results['tokens_per_second']:,} tokens/s in training\n\n"
        f"See what it reads:   {sheet}\n"
        f"All figures:         {place.root}/results.json\n"
        f"Curves and samples:  tensorboard --logdir {place.root}\n"
        f"Ask it:              fuyu-e2e generate --checkpoint {place.root} --image PICTURE.png "
        '--prompt "Read the digits."\n'
        f"Out of the trainer:  {place.exported}; its README.md says how to run it\n"
        f"What it is given:    fuyu-e2e inspect --config {place.root}/config.yaml --index 7\n"
        f"Your own shards:     fuyu-e2e fit --config recipes/quickstart.yaml --data.train 'FOLDER/train-*.tar'",
        soft_wrap=True,
    )
