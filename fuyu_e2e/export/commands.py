"""`fuyu-e2e export` and `fuyu-e2e import`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer as FastTokenizer

from fuyu_e2e.arguments import CommandParser
from fuyu_e2e.checkpoint.folder import CONFIG, TOKENIZER, folder_config, new_folder
from fuyu_e2e.checkpoint.loading import StoredModel, read_model
from fuyu_e2e.checkpoint.tensor_files import write_weights
from fuyu_e2e.export.card import card, find_recipe
from fuyu_e2e.export.from_transformers import read_transformers
from fuyu_e2e.export.tokenizer_json import read_fast_tokenizer
from fuyu_e2e.export.transformers import largest_size, scales_alike, write_transformers

CARD = "README.md"
RECIPE = "recipe.yaml"


def export(args: Sequence[str]) -> int:
    """Writes a trained model as files that other software loads."""
    parser = CommandParser(prog="fuyu-e2e export", description=export.__doc__)
    parser.add_argument("--checkpoint", required=True, help="A checkpoint, a run's directory, or an exported folder.")
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
    options = parser.parse_args(args)
    out = Path(options.out)
    stored = read_model(options.checkpoint, averaged=options.averaged)
    if options.to == "transformers":
        named, tokenizer = options.tokenizer_json, stored.description.tokenizer
        fast = None if named is None else read_fast_tokenizer(Path(named), tokenizer)
        export_to_transformers(stored, out, options.license, fast)
    else:
        export_own(stored, out, options.license)
    print(f"{out}: {len(stored.weights)} tensors of step {stored.provenance.step:,} from {stored.source}")
    images = stored.description.images
    if options.to == "transformers" and not scales_alike(images):
        height, width = largest_size(images)
        print(
            f"transformers' processor scales images larger than {height} x {width} pixels in its own way; those that "
            "fit are treated as in training."
        )
    return 0


def export_own(stored: StoredModel, out: Path, licence: str | None = None) -> None:
    """Writes the folder that `fuyu_e2e.load` reads.

    Raises:
        UserError: `out` holds something already.
    """
    recipe = find_recipe(stored.source)
    with new_folder(out) as folder:
        _write_own(stored, folder, card(stored, name=out.name, licence=licence, recipe=recipe, for_transformers=False))
        if recipe is not None:
            (folder / RECIPE).write_text(recipe, encoding="utf-8")


def export_to_transformers(
    stored: StoredModel, out: Path, licence: str | None = None, fast: FastTokenizer | None = None
) -> None:
    """Writes the folder that transformers reads, with a fast tokenizer where none can be made of the model's own.

    Raises:
        UserError: `out` holds something already, or the model is one that transformers can't run.
    """
    recipe = find_recipe(stored.source)
    with new_folder(out) as folder:
        write_transformers(stored.description, stored.weights, folder, fast)
        text = card(stored, name=out.name, licence=licence, recipe=recipe, for_transformers=True)
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
        f"Train on:  fuyu-e2e fit --config {out / RECIPE} --data.train 'FOLDER/*.tar'\n"
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
