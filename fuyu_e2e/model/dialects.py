"""Dialects: combinations of block parts, each of which computes the same as a text model of transformers.

qwen3   Qwen3: RMSNorm before each half of a block and on queries and keys, SwiGLU, grouped-query attention, no
        biases
fuyu    Persimmon, the text model of the released Fuyu-8B: LayerNorm in the same places, squared ReLU, a separate key
        for every head, rotary positions on the first half of each head, biases everywhere but in the output
        projection

Rotary positions are in the rotate-half layout.
"""

from dataclasses import dataclass
from typing import Literal

Dialect = Literal["qwen3", "fuyu"]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts that a dialect builds blocks from."""

    norm: Literal["RMSNorm", "LayerNorm"]
    """Class name in `torch.nn`."""
    feed_forward: Literal["SwiGLU", "SquaredReLU"]
    """Class name in `fuyu_e2e.model.blocks.dense`."""
    biases: bool
    """Whether the linear layers of attention have biases."""
    rotary_part: float
    """Fraction of each head's values that rotary positions turn."""
    own_keys: bool
    """Whether every query head has its own key head."""
    fills_width: bool
    """Whether heads x head_size must equal the width."""


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
