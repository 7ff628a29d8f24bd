"""The norm of all gradients and their scaling, on one device as in shards that lie on several meshes.

torch works on the shards of one mesh at a time: tensor parallelism with FSDP2 around it leaves weights on two.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

Spread = tuple[DeviceMesh, tuple[int, ...]]
"""A mesh, and those of its dimensions over whose devices a tensor is parted."""


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this device; a change of it changes the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def weights_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All that an optimizer updates, in the order that the numbers in its state count, without a walk over modules."""
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


def gradient_norm(weights: Iterable[nn.Parameter]) -> Float[Tensor, ""]:
    """The Euclidean norm over all gradients of `weights`, whole where they are sharded; 0 where there are none."""
    norms = []
    for spread, gradients in _by_spread(weights).items():
        norm = torch.nn.utils.get_total_norm(gradients)
        if spread is not None:
            mesh, dimensions = spread
            square = norm.square()
            for dimension in dimensions:
                dist.all_reduce(square, group=mesh.get_group(dimension))
            norm = square.sqrt()
        norms.append(norm)
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)


def clamp_gradients(weights: Iterable[nn.Parameter], limit: float) -> None:
    """Brings every entry of the gradients of `weights` into [-limit, limit], in place."""
    for gradients in _by_spread(weights).values():
        torch._foreach_clamp_min_(gradients, -limit)
        torch._foreach_clamp_max_(gradients, limit)


def scale_gradients(weights: Iterable[nn.Parameter], factor: Float[Tensor, ""]) -> None:
    """Multiplies the gradients of `weights` by `factor`, in place."""
    for gradients in _by_spread(weights).values():
        torch._foreach_mul_(gradients, factor)
