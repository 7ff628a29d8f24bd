"""What a decoder needs of memory in training, by part, counted from its shape."""

from dataclasses import dataclass
from typing import Literal

from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import LOSS_CHUNK, meta_decoder

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
    norms of a GPU keep less. Each block counts itself (`Block.saved_bytes`).

    Args:
        config: Of the decoder.
        tokens: Of the row, padding included.
        patches: Patches of the row.
        targets: Supervised tokens of the row.
        optimizer: As in `fuyu_e2e.training.optimizers`.
        precision: As Lightning's trainer names it.
        processes: That train together.
    """
    decoder = meta_decoder(config)
    size = 2 if precision == "bf16-true" else 4
    work = 4 if precision == "32-true" else 2
    mixed = precision == "bf16-mixed"
    values = sum(weight.numel() for weight in decoder.parameters())
    matrices = sum(weight.numel() for weight in decoder.blocks.parameters() if weight.ndim == 2)
    in_connector = sum(weight.numel() for weight in decoder.patch_projection.parameters() if weight.ndim == 2)
    copies = matrices + decoder.lm_head.weight.numel() + in_connector
    through_blocks = sum(block.saved_bytes(tokens, work, size) for block in decoder.each_block())
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
