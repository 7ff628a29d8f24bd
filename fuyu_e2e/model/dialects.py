"""Dialects: combinations of block parts, each weight for weight what a text model of transformers computes.

qwen3   as its Qwen3: RMSNorm before each half of a block and on queries and keys, SwiGLU, grouped-query attention, no
        biases
fuyu    as its Persimmon, the text model of the released Fuyu-8B: LayerNorm in the same places, squared ReLU, every
        head with a key of its own, rotary positions on the first half of each head, biases everywhere but in the
        output projection

Rotary positions are in the rotate-half layout.
"""

from dataclasses import dataclass
from typing import Literal

Dialect = Literal["qwen3", "fuyu"]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What blocks of a dialect are made of."""

    norm: Literal["RMSNorm", "LayerNorm"]
    """The class in `torch.nn`."""
    feed_forward: Literal["SwiGLU", "SquaredReLU"]
    """The class in `fuyu_e2e.model.blocks.dense`."""
    biases: bool
    """Whether attention's products have biases."""
    rotary_part: float
    """The part of a head that rotary positions turn."""
    own_keys: bool
    """Whether every head must have a key of its own."""
    fills_width: bool
    """Whether heads x head_size must be the width."""


DIALECTS: dict[Dialect, Parts] = {
    "qwen3": Parts(
        norm="RMSNorm", feed_forward="SwiGLU", biases=False, rotary_part=1.0, own_keys=False, fills_width=False
    ),
    "fuyu": Parts(
        norm="LayerNorm",
        feed_forward="SquaredReLU",
        biases=True,
        rotary_part=0.5,
        own_keys=True,
        fills_width=True,
    ),
}
