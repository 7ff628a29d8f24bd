"""The norm of all gradients and their scaling, on one device as in shards that lie on several meshes.

torch works on the shards of one mesh at a time: tensor parallelism with FSDP2 around it leaves weights on two.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

Spread = tuple[DeviceMesh, tuple[int, ...]]
"""A mesh, and those of its dimensions over whose devices a tensor is parted."""


def local(tensor: Tensor) -> Tensor:
    """Returns what of a tensor lies on this device; a change of it changes the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def weights_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Returns all that an optimizer updates, in the order that the numbers in its state count, without a walk over
    modules."""
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
    """This process's part of the squared norm over all gradients of `weights`: over all processes they add up to it.

    Where several have the same gradients, each gives its share of them.

    Args:
        weights: Whole or in shards; 0 comes of those without a gradient.
        processes: How many there are.
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
    """Brings every entry of the gradients of `weights` into [-limit, limit], in place."""
    for gradients in _by_spread(weights).values():
        torch._foreach_clamp_min_(gradients, -limit)
        torch._foreach_clamp_max_(gradients, limit)


def scale_gradients(weights: Iterable[nn.Parameter], factor: Float[Tensor, ""]) -> None:
    """Multiplies the gradients of `weights` by `factor`, in place."""
    for gradients in _by_spread(weights).values():
        torch._foreach_mul_(gradients, factor)
