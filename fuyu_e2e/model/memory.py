"""What a decoder needs of memory in training, by part, counted from its shape."""

from dataclasses import dataclass
from typing import Literal

import torch

from fuyu_e2e.model.config import FuyuConfig, annealed
from fuyu_e2e.model.decoder import LOSS_CHUNK, Decoder

OptimizerName = Literal["adamw", "muon"]
Precision = Literal["32-true", "bf16-mixed", "bf16-true"]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that one process holds at the worst moment of a step: the end of the forward pass.

    Gradients of the step before are still there then; Lightning drops them just before the backward pass.
    """

    weights: int
    """The trained values."""
    gradients: int
    """One for each of them, twice where several processes sum them in buckets."""
    optimizer_state: int
    """What the optimizer keeps from step to step."""
    activations: int
    """What the forward pass keeps for the backward pass; under mixed precision also the weights' copies."""
    logits: int
    """Logits of the supervised positions that are in memory at once, and the logarithms of their softmax."""

    @property
    def total(self) -> int:
        """All of it; what the process needs without a model, and what an allocator wastes, comes on top."""
        return self.weights + self.gradients + self.optimizer_state + self.activations + self.logits


def memory(
    config: FuyuConfig,
    *,
    tokens: int,
    patches: int,
    targets: int,
    optimizer: OptimizerName = "adamw",
    precision: Precision = "32-true",
    processes: int = 1,
) -> Memory:
    """Counts a training step on one row, nothing sharded.

    Activations are those that PyTorch's own operations save, counted on a CPU (`tests/model/test_memory.py`); fused
    norms of a GPU keep less. Routed blocks count with the capacity that they have as training begins.

    Args:
        config: Of the decoder.
        tokens: Of the row, padding included.
        patches: Patches of the row.
        targets: Supervised tokens of the row.
        optimizer: As in `fuyu_e2e.training.optimizers`.
        precision: As Lightning's trainer names it.
        processes: That train together.
    """
    with torch.device("meta"):
        decoder = Decoder(config)
    size = 2 if precision == "bf16-true" else 4
    work = 4 if precision == "32-true" else 2
    mixed = precision == "bf16-mixed"
    values = sum(weight.numel() for weight in decoder.parameters())
    matrices = sum(weight.numel() for weight in decoder.blocks.parameters() if weight.ndim == 2)
    in_connector = sum(weight.numel() for weight in decoder.patch_projection.parameters() if weight.ndim == 2)
    copies = matrices + decoder.lm_head.weight.numel() + in_connector
    through_blocks = _block_tokens(config, tokens) * _block_bytes(config, work, size)
    outside = tokens * (2 * config.width * size + 2 * config.rotary_size * 4)
    images = patches * (config.patch_values + config.width) * work
    chunk = min(targets, LOSS_CHUNK)
    return Memory(
        weights=values * size,
        gradients=values * size * (2 if processes > 1 else 1),
        optimizer_state=(2 * values - (matrices if optimizer == "muon" else 0)) * size,
        activations=round(through_blocks + outside + images + targets * config.width * work)
        + (copies * 2 if mixed else 0),
        logits=chunk * config.vocab_size * (8 if work == 4 else 10),
    )


def _block_tokens(config: FuyuConfig, tokens: int) -> int | float:
    """Tokens that are computed, summed over the blocks."""
    dense = tokens * (config.layers - len(config.routed))
    if config.routing is None:
        return dense
    room = 1 + config.routing.slack
    shares = [max(config.shares(block).patches, config.shares(block).others) for block in config.routed]
    begins = [annealed(share, 1.0 if config.routing.anneal else 0.0) for share in shares]
    return dense + sum(min(1.0, share * room) * tokens for share in begins)


def _block_bytes(config: FuyuConfig, work: int, size: int) -> int:
    """Bytes that a token leaves in a block.

    Args:
        config: Of the decoder.
        work: Bytes of a value that a product takes or gives.
        size: Bytes of a value of the residual stream and in norms.
    """
    width, queries, keys = config.width, config.heads * config.head_size, config.kv_heads * config.head_size
    attention = 3 * queries + 2 * keys  # queries, keys and values side by side, and the outputs before and after
    heads = config.heads + config.kv_heads
    if config.dialect == "fuyu":
        inputs = 4 if work < size else 2  # every product casts its input anew
        return (
            work * (2 * config.feed_forward + attention + inputs * width)
            + size * (2 * width + queries + keys)
            + 4 * (2 * heads + 4 + config.heads)
        )
    inputs = 5 if work < size else 2
    return (
        work * (4 * config.feed_forward + attention + inputs * width)
        + size * (4 * width + 2 * queries + 2 * keys)
        + 4 * (heads + 2 + config.heads)
    )
