"""The memory that a decoder needs in training, by part, counted from its shape."""

from dataclasses import dataclass
from typing import Literal

from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import LOSS_CHUNK, meta_decoder

OptimizerName = Literal["adamw", "muon"]
Precision = Literal["32-true", "bf16-mixed", "bf16-true"]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that one process holds at the peak of a step, the end of the forward pass.

    The gradients of the last step still exist then; Lightning drops them just before the backward pass.
    """

    weights: int
    """The trained values."""
    gradients: int
    """One gradient for each weight; twice as much if several processes sum them in buckets."""
    optimizer_state: int
    """What the optimizer keeps between steps."""
    activations: int
    """What the forward pass keeps for the backward pass; under mixed precision also the weights' low-precision
    copies."""
    logits: int
    """Logits of one chunk of supervised tokens, and their log-softmax."""

    @property
    def total(self) -> int:
        """The sum. What the process needs without a model, and the allocator's waste, come on top."""
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
    """Returns the memory of a training step on one row, without sharding.

    Activations are what PyTorch's own operations save, counted on a CPU (`tests/model/test_memory.py`); fused GPU
    norms keep less. Each block counts itself (`Block.saved_bytes`).

    Args:
        config: The decoder's configuration.
        tokens: Tokens of the row, including padding.
        patches: Patches of the row.
        targets: Supervised tokens of the row.
        optimizer: An optimizer of `fuyu_e2e.training.optimizers`.
        precision: As in Lightning's trainer.
        processes: The number of training processes.
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
