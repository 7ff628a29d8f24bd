"""The norm and scaling of gradients, whether on one device or sharded over several meshes.

torch's own functions handle the shards of one mesh, but tensor parallelism inside FSDP2 leaves weights on two.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor on this device, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def weights_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Returns all weights of an optimizer, in the order in which its state numbers them, without walking modules."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def gradients_of(weights: Iterable[Tensor]) -> list[Tensor]:
    """Returns the parts of the gradients on this device, of all weights that have one."""
    return [local(weight.grad) for weight in weights if weight.grad is not None]


def squared_norm_part(weights: Sequence[nn.Parameter], processes: int) -> Float64[Tensor, ""]:
    """Returns this process's part of the squared norm of all gradients; the parts of all processes add up to it.

    If several processes hold the same gradient, each contributes its fraction.

    Args:
        weights: Whole or sharded; weights without a gradient count as 0.
        processes: The number of processes.
    """
    by_parts: dict[int, list[Tensor]] = {}
    for weight in weights:
        if (gradient := weight.grad) is not None:
            parts = 1
            if isinstance(gradient, DTensor):
                sizes = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
                parts = math.prod(size for size, placement in sizes if not placement.is_replicate())
            by_parts.setdefault(parts, []).append(local(gradient))
    squares = torch.zeros((), dtype=torch.float64, device=local(weights[0]).device)
    for parts, gradients in by_parts.items():
        squares = squares + torch.nn.utils.get_total_norm(gradients).double().square() * (parts / processes)
    return squares


def clamp_gradients(weights: Iterable[nn.Parameter], limit: float) -> None:
    """Clamps every entry of the gradients of `weights` to [-limit, limit], in place."""
    if gradients := gradients_of(weights):
        torch._foreach_clamp_min_(gradients, -limit)
        torch._foreach_clamp_max_(gradients, limit)


def scale_gradients(weights: Iterable[nn.Parameter], factor: Float[Tensor, ""]) -> None:
    """Multiplies the gradients of `weights` by `factor`, in place."""
    if gradients := gradients_of(weights):
        torch._foreach_mul_(gradients, factor)
