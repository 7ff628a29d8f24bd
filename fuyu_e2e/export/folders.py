"""Exports trained models to folders, and imports them."""

import json
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer as FastTokenizer

from fuyu_e2e.checkpoint.exported_model import CONFIG, TOKENIZER, folder_config, is_exported, new_folder
from fuyu_e2e.checkpoint.loading import StoredModel
from fuyu_e2e.checkpoint.run_checkpoints import best_checkpoint, find_checkpoint
from fuyu_e2e.checkpoint.safetensors_io import write_weights
from fuyu_e2e.errors import UserError
from fuyu_e2e.export.card import QUESTION, card, find_recipe
from fuyu_e2e.export.from_transformers import read_transformers
from fuyu_e2e.export.transformers import largest_size, scales_alike, write_transformers

CARD = "README.md"
RECIPE = "recipe.yaml"


def chosen_checkpoint(path: Path) -> tuple[Path, str]:
    """Returns the checkpoint to export for a user's path, and the reason in words for printing.

    For a run's directory that is the best by validation, if any checkpoint records a figure, else the newest; a
    checkpoint or an exported folder is taken as it is.
    """
    if is_exported(path):
        return path, ""
    if best := best_checkpoint(path):
        return best.path, f", the best of {path} by {best.name} ({best.value:.6g})"
    found = find_checkpoint(path)
    return path, "" if found == path else f", the newest of {path}, where none records a validation of its own"


def check_scaling(stored: StoredModel) -> None:
    """Refuses a model whose large images transformers' processor would scale differently than training did.

    Raises:
        UserError: Names the setting and the value that would make them agree.
    """
    images = stored.metadata.images
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
    """Writes the folder that `fuyu_e2e.load` reads; `question` is the example on its card.

    Raises:
        UserError: `out` is not empty.
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
        stored: The model; see `check_scaling` for its images.
        out: The folder.
        licence: Licence of the weights, for the card.
        fast: The fast tokenizer, if none can be made from the model's own.
        question: The example question on the card.

    Raises:
        UserError: `out` is not empty, or transformers can't run the model.
    """
    recipe = find_recipe(stored.source)
    with new_folder(out) as folder:
        write_transformers(stored.metadata, stored.weights, folder, fast)
        text = card(stored, name=out.name, licence=licence, recipe=recipe, for_transformers=True, question=question)
        (folder / CARD).write_text(text, encoding="utf-8")


def import_folder(source: Path, out: Path, tokenizer: Path | None = None) -> StoredModel:
    """Turns transformers' FuyuForCausalLM folder into a folder of our own, with a recipe for further training.

    Args:
        source: The folder, with config.json and safetensors.
        out: The folder to write.
        tokenizer: The sentencepiece model, if it is not the folder's tokenizer.model.

    Returns:
        The imported model.

    Raises:
        UserError: The folder is not such a model, or `out` is not empty.
    """
    stored = read_transformers(source, tokenizer)
    recipe = finetuning_recipe(stored, out)
    with new_folder(out) as folder:
        _write_own(stored, folder, card(stored, name=out.name, licence=None, recipe=None, for_transformers=False))
        (folder / RECIPE).write_text(recipe, encoding="utf-8")
    return stored


def finetuning_recipe(stored: StoredModel, out: Path) -> str:
    """Returns a recipe for further training of a model that was exported to `out`."""
    images = stored.metadata.images
    decoder = {name: value for name, value in stored.metadata.config.to_dict().items() if value is not None}
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
    config = folder_config(stored.metadata, stored.provenance)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    stored.metadata.tokenizer.save(folder / TOKENIZER)
    (folder / CARD).write_text(text, encoding="utf-8")
