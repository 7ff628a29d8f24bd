"""The norm and scaling of gradients, whether on one device or sharded over several meshes.

torch's own functions handle the shards of one mesh, but tensor parallelism inside FSDP2 leaves weights on two.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

Spread = tuple[DeviceMesh, tuple[int, ...]]
"""A mesh, and the mesh dimensions over which a tensor is sharded."""


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor on this device, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def weights_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Returns all weights of an optimizer, in the order in which its state numbers them, without walking modules."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _by_spread(weights: Iterable[nn.Parameter]) -> dict[Spread | None, list[Tensor]]:
    groups: dict[Spread | None, list[Tensor]] = {}
    for weight in weights:
        if (gradient := weight.grad) is not None:
            spread = None
            if isinstance(gradient, DTensor):
                parted = [n for n, placement in enumerate(gradient.placements) if not placement.is_replicate()]
                spread = gradient.device_mesh, tuple(parted)
            groups.setdefault(spread, []).append(local(gradient))
    return groups


def squared_norm_part(weights: Sequence[nn.Parameter], processes: int) -> Float64[Tensor, ""]:
    """Returns this process's part of the squared norm of all gradients; the parts of all processes add up to it.

    If several processes hold the same gradient, each contributes its fraction.

    Args:
        weights: Whole or sharded; weights without a gradient count as 0.
        processes: The number of processes.
    """
    device = local(weights[0]).device
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for spread, gradients in _by_spread(weights).items():
        parts = 1
        if spread is not None:
            mesh, dimensions = spread
            parts = math.prod(mesh.size(dimension) for dimension in dimensions)
        squares = squares + torch.nn.utils.get_total_norm(gradients).double().square() * (parts / processes)
    return squares


def clamp_gradients(weights: Iterable[nn.Parameter], limit: float) -> None:
    """Clamps every entry of the gradients of `weights` to [-limit, limit], in place."""
    for gradients in _by_spread(weights).values():
        torch._foreach_clamp_min_(gradients, -limit)
        torch._foreach_clamp_max_(gradients, limit)


def scale_gradients(weights: Iterable[nn.Parameter], factor: Float[Tensor, ""]) -> None:
    """Multiplies the gradients of `weights` by `factor`, in place."""
    for gradients in _by_spread(weights).values():
        torch._foreach_mul_(gradients, factor)
