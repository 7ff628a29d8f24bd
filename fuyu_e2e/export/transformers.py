"""The folder that transformers' `FuyuForCausalLM` and `FuyuProcessor` load; weights under its names, and back.

The `qwen3` dialect computes the same as transformers' Qwen3 text model, `fuyu` the same as its Persimmon, so weights
are copied unchanged; only Persimmon's queries, keys and values are one matrix, head by head. Names are the Hub's,
which every version reads (`language_model.model.layers.0...`); newer versions of transformers call the same weights
`model.language_model.layers.0...` in memory.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

from fuyu_e2e.checkpoint.metadata import ModelMetadata
from fuyu_e2e.checkpoint.safetensors_io import write_weights
from fuyu_e2e.data.image import PADDING
from fuyu_e2e.data.sequence import TokenSequence
from fuyu_e2e.data.tokenizer import BOS, EOS
from fuyu_e2e.errors import UserError
from fuyu_e2e.export.tokenizer_json import UNKNOWN, fast_tokenizer
from fuyu_e2e.model.attention.mask import AttentionMask
from fuyu_e2e.model.blocks.dense import DenseConfig
from fuyu_e2e.model.config import LINEAR, FuyuConfig
from fuyu_e2e.model.decoder import meta_decoder
from fuyu_e2e.model.dialects import Dialect
from fuyu_e2e.model.image_layout import ImagePolicy

SUPPORTED = "5.16 to 5.24"
"""Versions of transformers that exported folders are made for; both ends are tested."""
TEXT_MODELS: dict[Dialect, str] = {"qwen3": "qwen3", "fuyu": "persimmon"}
"""The text model that computes each dialect."""
PAD_ID = 0
"""The padding token of transformers' Fuyu processor, regardless of the tokenizer."""
MAX_POSITIONS = 16_384
"""The released Fuyu's value, which serving software takes as the longest context; rotary positions have no limit."""
SLIDING, FULL = "sliding_attention", "full_attention"
"""transformers' names of blocks with a window, which also counts the query itself, and without one."""
TEXT = "language_model.model."
"""Prefix of the text model's names."""

_OUTSIDE = {
    "embed_tokens": f"{TEXT}embed_tokens",
    "patch_projection": "vision_embed_tokens",
    "lm_head": "language_model.lm_head",
}
_IN_BLOCK = {
    "qwen3": {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        **{f"attention.{part}": f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")},
        **{f"attention.{part}": f"self_attn.{part}" for part in ("q_norm", "k_norm")},
        **{f"mlp.{part}": f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")},
    },
    "fuyu": {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.o_proj": "self_attn.dense",
        "attention.q_norm": "self_attn.q_layernorm",
        "attention.k_norm": "self_attn.k_layernorm",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
}
_LAST_NORM = {"qwen3": "norm", "fuyu": "final_layernorm"}
_PROJECTIONS = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_FUSED = "self_attn.query_key_value"
_IN_MEMORY = (
    ("model.language_model.", TEXT),
    ("model.vision_embed_tokens.", "vision_embed_tokens."),
    ("lm_head.", "language_model.lm_head."),
)
"""Name prefixes in newer versions of transformers, and those of the Hub."""


def _modules(config: FuyuConfig) -> dict[str, str]:
    """Returns our name of each module whose weights are copied unchanged, with transformers' name."""
    inside = _IN_BLOCK[config.dialect].items()
    return {
        **_OUTSIDE,
        "norm": TEXT + _LAST_NORM[config.dialect],
        **{
            f"blocks.{layer}.{ours}": f"{TEXT}layers.{layer}.{theirs}"
            for layer in range(config.layers)
            for ours, theirs in inside
        },
    }


def to_transformers(weights: Mapping[str, Tensor], config: FuyuConfig) -> dict[str, Tensor]:
    """Returns the weights of a dense decoder under the Hub's names of `FuyuForCausalLM`, with their dtypes and values.

    Omits a tied output projection, which is the embedding.

    Raises:
        UserError: No text model of transformers computes the decoder, or its images pass more than one linear layer.
    """
    _check_stock(config)
    modules = _modules(config)
    renamed = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        if module in modules and not (module == "lm_head" and config.tie_embeddings):
            renamed[f"{modules[module]}.{kind}"] = tensor
    if config.dialect == "fuyu":
        for layer in range(config.layers):
            for kind in ("weight", "bias"):
                parts = [weights[f"blocks.{layer}.{part}.{kind}"] for part in _PROJECTIONS]
                by_head = [part.unflatten(0, (config.heads, config.head_size)) for part in parts]
                renamed[f"{TEXT}layers.{layer}.{_FUSED}.{kind}"] = torch.stack(by_head, dim=1).flatten(0, 2)
    return renamed


def from_transformers(weights: Mapping[str, Tensor], config: FuyuConfig) -> dict[str, Tensor]:
    """Returns the weights under our names, from the Hub's names or those that transformers has in memory.

    Leaves unknown names as they are, and drops the rotary frequencies in old folders.
    """
    modules = {theirs: ours for ours, theirs in _modules(config).items()}
    renamed = {}
    for name, tensor in weights.items():
        for beginning, hub in _IN_MEMORY:
            if name.startswith(beginning):
                name = hub + name.removeprefix(beginning)
                break
        module, _, kind = name.rpartition(".")
        if kind == "inv_freq":
            continue
        fused = re.fullmatch(rf"{re.escape(TEXT)}layers\.(\d+)\.{re.escape(_FUSED)}", module)
        if config.dialect == "fuyu" and fused and tensor.shape[0] == 3 * config.width:
            by_head = tensor.unflatten(0, (config.heads, 3, config.head_size))
            for part, own in zip(_PROJECTIONS, by_head.unbind(1), strict=True):
                renamed[f"blocks.{fused[1]}.{part}.{kind}"] = own.flatten(0, 1).contiguous()
        else:
            renamed[f"{modules[module]}.{kind}" if module in modules else name] = tensor
    return renamed


def transformers_config(
    config: FuyuConfig, *, patch_id: int, bos_id: int, eos_id: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Returns the content of transformers' `config.json`.

    Raises:
        UserError: No text model of transformers computes the decoder, or its images pass more than one linear layer.
    """
    window = _check_stock(config)
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
    }
    text = shared | {
        "model_type": TEXT_MODELS[config.dialect],
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
    }
    if config.dialect == "fuyu":
        text |= {
            "hidden_act": "relu2",
            "layer_norm_eps": config.norm_eps,
            "qk_layernorm": True,
            "partial_rotary_factor": config.rotary_size / config.head_size,
            "rope_parameters": rope | {"partial_rotary_factor": config.rotary_size / config.head_size},
        }
    else:
        text |= {
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_size,
            "attention_bias": False,
            "use_sliding_window": window is not None,
            "rope_parameters": rope,
        }
        if window is not None:
            text |= {
                "sliding_window": window,
                "layer_types": [FULL if mask.window is None else SLIDING for mask in config.block_masks],
            }
    return shared | {
        "architectures": ["FuyuForCausalLM"],
        "model_type": "fuyu",
        "dtype": str(dtype).removeprefix("torch."),
        "patch_size": config.patch_size,
        "num_channels": 3,
        "image_token_id": patch_id,
        "text_config": text,
    }


def largest_size(images: ImagePolicy) -> tuple[int, int]:
    """Returns the (height, width) in pixels that transformers' processor scales larger images down to fit.

    Its policy has only a largest size. If ours has none, it is the largest square within the patch budget, so that no
    image exceeds the budget; images that fit the square are then treated alike by both.
    """
    if images.max_size is not None:
        return images.max_size
    side = int(images.max_patches**0.5) * images.patch_size
    return side, side


def scales_alike(images: ImagePolicy) -> bool:
    """Returns whether transformers' processor scales every image to the same size as ours."""
    if images.max_size is None:
        return False
    height, width = images.max_size
    return (height // images.patch_size) * (width // images.patch_size) <= images.max_patches


def write_transformers(
    metadata: ModelMetadata, weights: Mapping[str, Tensor], folder: Path, fast: FastTokenizer | None = None
) -> None:
    """Writes everything that transformers needs into an empty folder: weights, configuration, tokenizer and processor.

    Args:
        metadata: The model's description.
        weights: Weights by the decoder's names.
        folder: The folder.
        fast: The fast tokenizer, if it can't be made from the model's own.

    Raises:
        UserError: No text model of transformers computes the decoder, its images pass more than one linear layer, or
            the tokenizer is of a kind without a fast form.
    """
    tokenizer, images = metadata.tokenizer, metadata.images
    named = to_transformers(weights, metadata.config)
    fast = fast or fast_tokenizer(tokenizer)
    write_weights(named, folder)
    dtype = named[f"{TEXT}embed_tokens.weight"].dtype
    ids = {"patch_id": tokenizer.patch_id, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    _write_json(folder / "config.json", transformers_config(metadata.config, **ids, dtype=dtype))
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": PAD_ID}
    _write_json(folder / "generation_config.json", special)
    fast.save(str(folder / "tokenizer.json"))
    tokenizer.save(folder / "tokenizer.model")
    tokens = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN, "pad_token": tokenizer.piece(PAD_ID)}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "FuyuProcessor",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    _write_json(folder / "tokenizer_config.json", settings | tokens)
    height, width = largest_size(images)
    image_processor = {
        "image_processor_type": "FuyuImageProcessor",
        "processor_class": "FuyuProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # bilinear
        "do_pad": True,
        "padding_mode": "constant",
        "padding_value": float(PADDING),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": 0.5,
        "image_std": 0.5,
        "patch_size": {"height": images.patch_size, "width": images.patch_size},
    }
    _write_json(folder / "preprocessor_config.json", image_processor)
    _write_json(folder / "processor_config.json", {"processor_class": "FuyuProcessor"})


def stock_inputs(prompts: Sequence[TokenSequence]) -> dict[str, Tensor]:
    """Returns prompts in the form of `FuyuForCausalLM`, with any number of images in each; its processor takes one.

    Returns:
        `input_ids` and `attention_mask`, (prompts, longest) int64, padded on the left; with images also
        `pixel_values`, (patches of all prompts in order, patch_size^2 x 3) float32 in [-1, 1].
    """
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.full((len(prompts), longest), PAD_ID, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.from_numpy(prompt.tokens)
        mask[row, longest - len(prompt) :] = 1
    patches = torch.cat([torch.from_numpy(prompt.patches) for prompt in prompts])
    pixels = {"pixel_values": (patches.float() - 127.5) / 127.5} if len(patches) else {}
    return {"input_ids": tokens, "attention_mask": mask, **pixels}


def _check_stock(config: FuyuConfig) -> int | None:
    """Refuses a decoder that transformers has no model for; returns the window of its blocks, or None."""
    for name, default in (("connector", LINEAR), ("image_norm", False), ("grid_embeddings", None)):
        if (value := getattr(config, name)) != default:
            raise _no_stock(f"decoder.{name} {value}", "whose patches pass one linear layer and nothing else")
    for block in meta_decoder(config).selecting.values():
        raise _no_stock(f"{block.kind} blocks", "which would run every token through every block")
    if config.rotary != "1d":
        raise _no_stock(f"decoder.rotary {config.rotary!r}", "which counts positions along the sequence ('1d')")
    for kind in config.blocks:
        if type(kind) is not DenseConfig:
            held = f"decoder.blocks of the kind {type(kind).__name__}"
            raise _no_stock(held, "which has dense ones alone (DenseConfig)")
    masks = "decoder.masks that hold"
    for mask in config.block_masks:
        if type(mask) is not AttentionMask:
            raise _no_stock(
                f"{masks} a {type(mask).__name__}", "whose text model knows windows of AttentionMask alone"
            )
        if mask.sinks:
            raise _no_stock(f"{masks} {mask.sinks:,} sinks", "whose text model has 0")
        if mask.images != "causal":
            raise _no_stock(f"{masks} images {mask.images!r}", "whose text model reads images as 'causal'")
    windows = sorted({mask.window for mask in config.block_masks if mask.window is not None})
    if len(windows) > 1:
        held = " and ".join(f"{window:,}" for window in windows)
        raise _no_stock(f"{masks} windows of {held}", "whose text model has one size for all blocks with a window")
    if windows and config.dialect != "qwen3":
        held = f"a window of {windows[0]:,} in the dialect {config.dialect!r}"
        raise _no_stock(f"{masks} {held}", "which knows windows in 'qwen3' alone")
    return windows[0] if windows else None


def _no_stock(held: str, why: str) -> UserError:
    return UserError(
        f"A decoder with {held} can't be exported as transformers' FuyuForCausalLM, {why}: export it with "
        "`--to fuyu-e2e`, and generate with `fuyu-e2e generate`."
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
