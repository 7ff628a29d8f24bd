"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): what the backward pass recomputes.

A block applies this inside its `forward`, so that in a compiled block it is part of the graph, where every operation
has a name. Wrapped around a compiled block, it would see only fused kernels and recompute all of them. A block that
attends by documents is compiled in parts around its attention: there `selective` keeps only the attention.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

ActivationCheckpointing = Literal["none", "selective", "full"]
"""What the backward pass recomputes of a block's activations: nothing, all but products and attention, or all."""
SAVED_OPERATIONS = {
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "flex_attention",
}
"""Operations whose results `selective` keeps; by name, since not every torch version has all of them."""

R = TypeVar("R")


def recomputing(kind: ActivationCheckpointing, run: Callable[..., R], *inputs: Any) -> R:
    """Returns `run(*inputs)`; the backward pass, if there is one, recomputes the chosen kind of activations."""
    if kind == "none" or not torch.is_grad_enabled():
        return run(*inputs)
    if kind == "full":
        return checkpoint(run, *inputs, use_reentrant=False)
    return checkpoint(run, *inputs, use_reentrant=False, context_fn=_contexts)


def _contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation.name() in SAVED_OPERATIONS else CheckpointPolicy.PREFER_RECOMPUTE
