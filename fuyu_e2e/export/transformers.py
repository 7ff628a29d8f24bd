"""The layout of transformers' `FuyuForCausalLM`: which of its names holds which of our weights, and its configuration.

The `qwen3` dialect computes what its Qwen3 text model computes, so weights go over as they are.
"""

from typing import Any

from torch import Tensor

from fuyu_e2e.errors import UserError
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder

_RENAMED = (
    ("embed_tokens.", "model.language_model.embed_tokens."),
    ("patch_projection.", "model.vision_embed_tokens."),
    ("blocks.", "model.language_model.layers."),
    ("norm.", "model.language_model.norm."),
)
_RENAMED_IN_BLOCK = (
    (".attention_norm.", ".input_layernorm."),
    (".mlp_norm.", ".post_attention_layernorm."),
    (".attention.", ".self_attn."),
)


def transformers_name(name: str) -> str:
    """The name under which `FuyuForCausalLM` keeps our weight `name`."""
    for ours, theirs in _RENAMED:
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            break
    for ours, theirs in _RENAMED_IN_BLOCK:
        name = name.replace(ours, theirs)
    return name


def transformers_state_dict(decoder: Decoder) -> dict[str, Tensor]:
    """The weights of a decoder under the names of `FuyuForCausalLM`."""
    return {transformers_name(name): tensor for name, tensor in decoder.state_dict().items()}


def transformers_config(config: FuyuConfig, *, patch_id: int, bos_id: int, eos_id: int) -> dict[str, Any]:
    """The arguments of transformers' `FuyuConfig`, its `text_config` as the arguments of a `Qwen3Config`.

    Raises:
        UserError: The decoder is routed, which no text model of transformers is.
    """
    if config.routing is not None:
        raise UserError(
            "A decoder with routed blocks can't be exported as transformers' FuyuForCausalLM, which would run every "
            "token through every block: generate with `fuyu-e2e generate`."
        )
    return {
        "patch_size": config.patch_size,
        "image_token_id": patch_id,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "tie_word_embeddings": config.tie_embeddings,
        "text_config": {
            "model_type": "qwen3",
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "intermediate_size": config.feed_forward,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_size,
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "tie_word_embeddings": config.tie_embeddings,
            "attention_bias": False,
            "use_sliding_window": False,
        },
    }
