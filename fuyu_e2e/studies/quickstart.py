"""The quickstart: from handwritten digits to a model that reads them, with figures and a picture."""

import json
import os
import time
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fuyu_e2e.checkpoint.loading import TrainedModel, load_model, read_model
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.data.tokenizer import train_tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.eval.contact_sheet import contact_sheet
from fuyu_e2e.eval.depth import answer_depths, depth_shares, depth_table
from fuyu_e2e.eval.evaluation import Outcome, picture_cell
from fuyu_e2e.eval.question import Question
from fuyu_e2e.export.folders import export_own, export_to_transformers
from fuyu_e2e.inference.depth_map import depth_map
from fuyu_e2e.model.decoder import meta_decoder
from fuyu_e2e.studies.reading import read_pictures
from fuyu_e2e.tasks.digits import QUESTION, TEST_SEED, VOCAB_SIZE, write_shards
from fuyu_e2e.training.settings.recipe import FuyuCLI

DEPTH_PICTURES = 200
"""Test pictures over which the tokens' depth is averaged."""
TOKENIZER = "tokenizer.model"
SHEET_PICTURES = 48
"""Test pictures on the contact sheet."""


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
        return self.data / TOKENIZER

    @property
    def exported(self) -> Path:
        """The folder of the exported model."""
        return self.root / "fuyu-digits"

    def pattern(self, split: str) -> str:
        """Returns the pattern of a split's shards."""
        return str(self.data / f"{split}-[0-9]*.tar")


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
    write_data(place.data, options.seed, options.pictures, options.test_pictures)
    console.print(f"{options.pictures:,} training pictures in {place.data} ({time.perf_counter() - started_at:.0f} s)")

    console.rule("2. Training")
    cli = FuyuCLI(["fit", *settings])

    console.rule("3. Reading")
    model = load_model(place.root / "checkpoints" / "last.ckpt")
    export_model(place)
    results, questions, outcomes = score(model, place)
    results["seconds"] = round(time.perf_counter() - started_at, 1)
    results["tokens_per_second"] = round(cli.throughput.tokens / cli.throughput.seconds)
    results["seed"] = options.seed
    results["steps"] = model.step
    written = [outcome.answers["image"].text or "" for outcome in outcomes]
    if depths := answer_depths(model, questions[:DEPTH_PICTURES], written[:DEPTH_PICTURES]):
        results["share_of_depth"] = depth_shares(depths)
        largest = max(depths[:SHEET_PICTURES], key=lambda depth: len(depth.sequence.patches))
        depth_map(largest, model.tokenizer).save(place.root / "depth_map.png")
    (place.root / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    sheet = place.root / "contact_sheet.png"
    shown = list(zip(questions, outcomes, strict=True))[:SHEET_PICTURES]
    contact_sheet([picture_cell(model, *pair) for pair in shown], sheet)
    report(console, place, results, sheet)


def write_data(folder: Path, seed: int, pictures: int, test_pictures: int) -> None:
    """Writes the shards of all splits, and a tokenizer trained on the training texts, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = write_shards(folder, split="train", count=pictures, seed=seed, processes=os.cpu_count() or 1)
    write_shards(folder, split="val", count=200, seed=TEST_SEED)
    write_shards(folder, split="test", count=test_pictures, seed=TEST_SEED)
    write_shards(folder, split="test-new-sizes", count=test_pictures, seed=TEST_SEED)
    texts = (text for document in read_documents(shards[0], SampleStats()) for text in document.texts)
    train_tokenizer(texts, VOCAB_SIZE).save(folder / TOKENIZER)


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


def score(model: TrainedModel, place: Workplace) -> tuple[dict[str, Any], list[Question], list[Outcome]]:
    """Reads all test pictures.

    Returns:
        The figures, and the questions about pictures of trained sizes with what came of each.
    """
    questions, outcomes, seen = read_pictures(model, place.pattern("test"), runs=("image", "other_image"))
    *_, new = read_pictures(model, place.pattern("test-new-sizes"))
    truths = Counter(question.references for question in questions)
    same = sum(count * (count - 1) for count in truths.values())
    results = {
        "exact_match": seen.all.value,
        "exact_match_by_digits": {digits: scored.value for digits, scored in seen.groups["digits"].items()},
        "exact_match_new_sizes": new.all.value,
        "exact_match_images_exchanged": seen.blind["other_image"].value,
        # A perfect reader's, given any other picture: how often two pictures share their digits.
        "chance_images_exchanged": same / max(1, len(questions) * (len(questions) - 1)),
    }
    return results, questions, outcomes


def report(console: Console, place: Workplace, results: dict[str, Any], sheet: Path) -> None:
    """Prints the figures and suggestions for next steps."""
    table = Table("pictures from scans never trained on", "read letter for letter")
    table.add_row("sizes trained on", f"{results['exact_match']:.3f}")
    for digits, share in results["exact_match_by_digits"].items():
        table.add_row(f"  {digits} digit{'' if digits == '1' else 's'}", f"{share:.3f}")
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
