"""`fuyu-e2e export` and `fuyu-e2e import`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer as FastTokenizer

from fuyu_e2e.arguments import CommandParser
from fuyu_e2e.checkpoint.folder import CONFIG, TOKENIZER, folder_config, is_exported, new_folder
from fuyu_e2e.checkpoint.loading import StoredModel, read_model
from fuyu_e2e.checkpoint.tensor_files import write_weights
from fuyu_e2e.checkpoint.training_files import best_checkpoint, find_checkpoint
from fuyu_e2e.errors import UserError
from fuyu_e2e.export.card import QUESTION, card, find_recipe
from fuyu_e2e.export.from_transformers import read_transformers
from fuyu_e2e.export.tokenizer_json import read_fast_tokenizer
from fuyu_e2e.export.transformers import largest_size, scales_alike, write_transformers

CARD = "README.md"
RECIPE = "recipe.yaml"


def export(args: Sequence[str]) -> int:
    """Writes a trained model as files that other software loads."""
    parser = CommandParser(prog="fuyu-e2e export", description=export.__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="A checkpoint, a run's directory (its best checkpoint by validation, else its newest), or an exported "
        "folder.",
    )
    parser.add_argument("--out", required=True, help="The folder to write.")
    parser.add_argument(
        "--to",
        choices=("fuyu-e2e", "transformers"),
        default="fuyu-e2e",
        help="Who loads it: fuyu_e2e.load, or transformers' FuyuForCausalLM and FuyuProcessor (default: %(default)s).",
    )
    parser.add_argument("--averaged", action="store_true", help="Averaged weights (EMA) of a run that kept them.")
    parser.add_argument("--license", help="Licence of the weights for the card, as the Hub spells it: apache-2.0, ...")
    parser.add_argument(
        "--tokenizer-json", help="With --to transformers, for an imported model: the fast tokenizer it came with."
    )
    parser.add_argument(
        "--accept-other-scaling",
        action="store_true",
        help="With --to transformers: export a model although transformers' processor scales large images otherwise "
        "than training did.",
    )
    options = parser.parse_args(args)
    for name in ("tokenizer_json", "accept_other_scaling"):
        if options.to != "transformers" and getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')} only goes with --to transformers: leave it out, or add that.")
    out = Path(options.out)
    checkpoint, reason = chosen_checkpoint(Path(options.checkpoint))
    stored = read_model(checkpoint, averaged=options.averaged)
    if options.to == "transformers":
        if not options.accept_other_scaling:
            check_scaling(stored)
        named, tokenizer = options.tokenizer_json, stored.description.tokenizer
        fast = None if named is None else read_fast_tokenizer(Path(named), tokenizer)
        export_to_transformers(stored, out, options.license, fast)
    else:
        export_own(stored, out, options.license)
    print(f"{out}: {len(stored.weights)} tensors of step {stored.provenance.step:,} from {stored.source}{reason}")
    return 0


def chosen_checkpoint(path: Path) -> tuple[Path, str]:
    """Which checkpoint is exported of what the user names, and the reason as it is printed.

    Of a run's directory it is the best by validation, if any checkpoint records its own figure; a checkpoint or an
    exported folder is taken as it is.
    """
    if is_exported(path):
        return path, ""
    if best := best_checkpoint(path):
        return best.path, f", the best of {path} by {best.name} ({best.value:.6g})"
    found = find_checkpoint(path)
    return path, "" if found == path else f", the newest of {path}, where none records a validation of its own"


def check_scaling(stored: StoredModel) -> None:
    """Refuses a model whose large images transformers' processor would scale otherwise than training did.

    Raises:
        UserError: Names the setting, and the value with which both scale alike.
    """
    images = stored.description.images
    if scales_alike(images):
        return
    height, width = largest_size(images)
    if images.max_size is None:
        trained = f"without data.max_size, so larger images were scaled to {images.max_patches:,} patches"
        remedy = f"--data.max_size '[{height}, {width}]'"
    else:
        needed = (height // images.patch_size) * (width // images.patch_size)
        trained = f"with data.max_patches {images.max_patches:,}, which not every image within data.max_size keeps"
        remedy = f"--data.max_patches {needed}"
    raise UserError(
        f"{stored.source} was trained {trained}, while transformers' processor scales images beyond {height} x "
        f"{width} pixels to fit that size: train with {remedy}, or pass --accept-other-scaling."
    )


def export_own(stored: StoredModel, out: Path, licence: str | None = None, question: str = QUESTION) -> None:
    """Writes the folder that `fuyu_e2e.load` reads; `question` is what its card asks.

    Raises:
        UserError: `out` holds something already.
    """
    recipe = find_recipe(stored.source)
    with new_folder(out) as folder:
        text = card(stored, name=out.name, licence=licence, recipe=recipe, for_transformers=False, question=question)
        _write_own(stored, folder, text)
        if recipe is not None:
            (folder / RECIPE).write_text(recipe, encoding="utf-8")


def export_to_transformers(
    stored: StoredModel,
    out: Path,
    licence: str | None = None,
    fast: FastTokenizer | None = None,
    question: str = QUESTION,
) -> None:
    """Writes the folder that transformers reads.

    Args:
        stored: The model; `check_scaling` says whether its images are scaled alike there.
        out: The folder.
        licence: Of the weights, for the card.
        fast: The fast tokenizer, where none can be made of the model's own.
        question: What the card asks.

    Raises:
        UserError: `out` holds something already, or the model is one that transformers can't run.
    """
    recipe = find_recipe(stored.source)
    with new_folder(out) as folder:
        write_transformers(stored.description, stored.weights, folder, fast)
        text = card(stored, name=out.name, licence=licence, recipe=recipe, for_transformers=True, question=question)
        (folder / CARD).write_text(text, encoding="utf-8")


def import_model(args: Sequence[str]) -> int:
    """Makes a FuyuForCausalLM folder of transformers, the released Fuyu-8B among them, a model to go on with."""
    parser = CommandParser(prog="fuyu-e2e import", description=import_model.__doc__)
    parser.add_argument("--from", dest="source", required=True, help="The folder, with config.json and safetensors.")
    parser.add_argument("--out", required=True, help="The folder to write.")
    parser.add_argument("--tokenizer", help="The sentencepiece model, where it is not the folder's tokenizer.model.")
    options = parser.parse_args(args)
    source, out = Path(options.source), Path(options.out)
    stored = read_transformers(source, Path(options.tokenizer) if options.tokenizer else None)
    recipe = finetuning_recipe(stored, out)
    with new_folder(out) as folder:
        _write_own(stored, folder, card(stored, name=out.name, licence=None, recipe=None, for_transformers=False))
        (folder / RECIPE).write_text(recipe, encoding="utf-8")
    print(
        f"{out}: {len(stored.weights)} tensors in the dialect {stored.description.config.dialect!r}\n"
        f"Train on:  fuyu-e2e fit --config {out / RECIPE} --data.train 'FOLDER/train-*.tar'\n"
        f"Ask it:    fuyu-e2e generate --checkpoint {out} --image PICTURE.png --prompt '...'"
    )
    return 0


def finetuning_recipe(stored: StoredModel, out: Path) -> str:
    """A recipe that goes on training a model which was exported to `out`."""
    images = stored.description.images
    decoder = {name: value for name, value in asdict(stored.description.config).items() if value is not None}
    model: dict[str, Any] = {"weights": str(out), "decoder": decoder}
    data: dict[str, Any] = {"tokenizer": str(out / TOKENIZER), "max_patches": images.max_patches}
    if images.max_size is not None:
        data["max_size"] = list(images.max_size)
        rows, cols = (side // images.patch_size for side in images.max_size)
        data["budget"] = 2 * rows * (cols + 1)  # room for two of the largest images, or one and a long text
    trainer = {"max_steps": 1000, "default_root_dir": f"runs/{out.name}", "gradient_clip_val": 1.0}
    settings = {"seed_everything": 0, "trainer": trainer, "model": model, "data": data}
    head = f"# Goes on training the model in {out} on your shards; not timed.\n"
    return head + yaml.safe_dump(settings, sort_keys=False)


def _write_own(stored: StoredModel, folder: Path, text: str) -> None:
    write_weights(stored.weights, folder)
    config = folder_config(stored.description, stored.provenance)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    stored.description.tokenizer.save(folder / TOKENIZER)
    (folder / CARD).write_text(text, encoding="utf-8")
