"""Imports a `FuyuForCausalLM` folder of transformers, such as the released Fuyu-8B."""

from pathlib import Path
from typing import Any

from fuyu_e2e.checkpoint.json_files import read_json
from fuyu_e2e.checkpoint.loading import StoredModel, fitting
from fuyu_e2e.checkpoint.metadata import ModelMetadata, Provenance
from fuyu_e2e.checkpoint.safetensors_io import read_weights
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.export.transformers import FULL, SLIDING, TEXT_MODELS, from_transformers
from fuyu_e2e.model.attention.mask import AttentionMask
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.dialects import Dialect
from fuyu_e2e.model.image_layout import ImagePolicy

RELEASED_SIZE = {"height": 1080, "width": 1920}
"""The size in pixels that the released Fuyu scales larger images down to fit."""
EXPECTED: dict[Dialect, dict[str, Any]] = {
    "fuyu": {"hidden_act": "relu2", "qk_layernorm": True, "partial_rotary_factor": 0.5},
    "qwen3": {"hidden_act": "silu", "attention_bias": False, "partial_rotary_factor": 1.0},
}
"""Settings of the text model that each dialect fixes."""
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
"""Settings of the text model that are whole numbers of at least 1."""


def read_transformers(folder: Path, tokenizer: Path | None = None) -> StoredModel:
    """Reads a `FuyuForCausalLM` folder: safetensors with the Hub's names, or with those that transformers has in
    memory.

    Args:
        folder: A folder with `config.json` and weights, and with the processor's settings if they differ from the
            released Fuyu's.
        tokenizer: The sentencepiece model; by default the folder's `tokenizer.model`.

    Raises:
        UserError: transformers is missing; a file is missing, damaged or a pickle; the model is of another kind, or
            computes something that no dialect does; or weights, tokenizer and configuration don't fit each other.
    """
    config = decoder_config(folder)
    images = _image_policy(folder, config.patch_size)
    model = Tokenizer.from_file(_tokenizer_file(folder, tokenizer))
    if model.vocab_size != config.vocab_size:
        raise UserError(
            f"{_tokenizer_file(folder, tokenizer)} has {model.vocab_size:,} tokens, but {folder / 'config.json'} says "
            f"vocab_size {config.vocab_size:,}: name the model's own tokenizer with --tokenizer."
        )
    placeholder = read_json(folder / "config.json").get("image_token_id", model.patch_id)
    if placeholder != model.patch_id:
        raise UserError(
            f"{folder / 'config.json'} says image_token_id {placeholder}, but the tokenizer's |SPEAKER| is "
            f"{model.patch_id}: name the model's own tokenizer with --tokenizer."
        )
    weights = fitting(from_transformers(read_weights(folder), config), config, folder)
    return StoredModel(folder, ModelMetadata(config, model, images), weights, Provenance())


def decoder_config(folder: Path) -> FuyuConfig:
    """Returns the decoder that a folder's `config.json` describes, from any version of transformers.

    Raises:
        UserError: It describes another kind of model, or one that no dialect computes.
    """
    path = folder / "config.json"
    settings = read_json(path)
    if settings.get("model_type") != "fuyu":
        raise UserError(f"{path} says model_type {settings.get('model_type')!r}; only 'fuyu' can be imported.")
    text = settings.get("text_config") or {"model_type": "persimmon"}
    if not isinstance(text, dict):
        raise UserError(f"{path} says text_config {text!r}, which is no object: fetch it again.")
    named = text.get("model_type", "persimmon")
    dialect = next((dialect for dialect, name in TEXT_MODELS.items() if name == named), None)
    if dialect is None:
        raise UserError(
            f"{path} says text_config.model_type {text.get('model_type')!r}; only "
            f"{' and '.join(map(repr, TEXT_MODELS.values()))} compute what a dialect of ours does."
        )
    full = _completed(settings, path)
    known = full.text_config
    rope = known.rope_parameters
    stated = vars(known) | rope | {"num_channels": full.num_channels}
    for name, expected in (EXPECTED[dialect] | {"rope_type": "default", "num_channels": 3}).items():
        if (value := stated.get(name, expected)) != expected:
            raise UserError(
                f"{path} says {name} {value!r}, but the dialect {dialect!r} computes with {expected!r}: this model "
                "can't be imported."
            )
    fuyu = dialect == "fuyu"
    sizes = {"patch_size": full.patch_size} | {name: getattr(known, name) for name in SIZES}
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{path} says {name} {value!r}, but it must be a whole number of at least 1.")
    return FuyuConfig(
        vocab_size=known.vocab_size,
        patch_size=full.patch_size,
        layers=known.num_hidden_layers,
        width=known.hidden_size,
        heads=known.num_attention_heads,
        kv_heads=known.num_attention_heads if fuyu else known.num_key_value_heads,
        head_size=known.hidden_size // known.num_attention_heads if fuyu else known.head_dim,
        feed_forward=known.intermediate_size,
        rope_theta=float(rope["rope_theta"]),
        norm_eps=known.layer_norm_eps if fuyu else known.rms_norm_eps,
        tie_embeddings=full.tie_word_embeddings,
        dialect=dialect,
        masks=(AttentionMask(),) if fuyu else _masks(known, path),
    )


def _masks(text: Any, path: Path) -> tuple[AttentionMask, ...]:
    """Returns the shortest pattern of masks that gives every block of the text model its mask."""
    kinds, window = text.layer_types, text.sliding_window
    if unknown := set(kinds) - {SLIDING, FULL}:
        raise UserError(
            f"{path} says layer_types with {min(unknown)!r}, but only {SLIDING!r} and {FULL!r} can be imported."
        )
    if SLIDING in kinds and (not isinstance(window, int) or window < 1):
        raise UserError(
            f"{path} says layer_types with {SLIDING!r}, use_sliding_window {text.use_sliding_window!r} and "
            f"sliding_window {window!r}, which is no window of at least 1: this model can't be imported."
        )
    period = next(size for size in range(1, len(kinds) + 1) if kinds[size:] == kinds[:-size])
    return tuple(AttentionMask(window=window if kind == SLIDING else None) for kind in kinds[:period])


def _completed(settings: dict[str, Any], path: Path) -> Any:
    """Returns transformers' own parsing of a configuration, with the defaults and layouts of all its versions."""
    try:
        from transformers import FuyuConfig as StockConfig
    except ImportError as error:
        raise UserError("Importing needs transformers: install it with pip install 'transformers>=5.16'.") from error
    try:
        return StockConfig.from_dict(settings)
    except Exception as error:  # a wrong value may raise anything
        raise UserError(f"transformers can't read {path} ({str(error).splitlines()[0]}): fetch it again.") from error


def _image_policy(folder: Path, patch_size: int) -> ImagePolicy:
    """Returns the processor's image scaling as a policy whose patch budget holds all images that fit."""
    source, size = folder / "preprocessor_config.json", RELEASED_SIZE
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            settings = read_json(folder / name)
            image_processor = settings.get("image_processor", settings)
            if isinstance(image_processor, dict) and image_processor.get("size") is not None:
                source, size = folder / name, image_processor["size"]
                break
    sides = [size.get(name) for name in ("height", "width")] if isinstance(size, dict) else []
    whole = [side for side in sides if isinstance(side, int) and side > 0 and side % patch_size == 0]
    if len(whole) != 2:
        raise UserError(
            f"{source} must say size as a height and a width that are multiples of the patch size {patch_size}, but "
            f"it is {size!r}: correct it."
        )
    height, width = whole
    patches = (height // patch_size) * (width // patch_size)
    return ImagePolicy(patch_size=patch_size, max_patches=patches, max_size=(height, width))


def _tokenizer_file(folder: Path, named: Path | None) -> Path:
    if named is not None:
        return named
    if not (folder / "tokenizer.model").is_file():
        raise UserError(
            f"{folder} has no tokenizer.model, the sentencepiece model that its fast tokenizer was made of: name it "
            "with --tokenizer FILE."
        )
    return folder / "tokenizer.model"
