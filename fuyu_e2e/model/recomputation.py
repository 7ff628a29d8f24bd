"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): what the backward pass recomputes.

A block does this inside of its `forward`, so that a compiled block has it in its graph, where every operation is known
by name. Around a compiled block nothing but its kernels would be seen, and all of them run again. So it is between the
graphs of a block that attends by documents, which are never compiled: there `selective` keeps attention alone.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

ActivationCheckpointing = Literal["none", "selective", "full"]
"""Which of a block's activations the backward pass recomputes: nothing, all but products and attention, or all."""
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
"""Operations that `selective` keeps the results of; by name, for not every version of torch has each."""

R = TypeVar("R")


def recomputing(kind: ActivationCheckpointing, run: Callable[..., R], *inputs: Any) -> R:
    """Returns what `run` gives; the backward pass, if there is one, recomputes its activations of that kind."""
    if kind == "none" or not torch.is_grad_enabled():
        return run(*inputs)
    if kind == "full":
        return checkpoint(run, *inputs, use_reentrant=False)
    return checkpoint(run, *inputs, use_reentrant=False, context_fn=_contexts)


def _contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation.name() in SAVED_OPERATIONS else CheckpointPolicy.PREFER_RECOMPUTE
