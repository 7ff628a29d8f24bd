"""The norm of all gradients and their scaling, on one device as in shards that lie on several meshes.

torch works on the shards of one mesh at a time: tensor parallelism with FSDP2 around it leaves weights on two.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def _by_mesh(weights: Iterable[nn.Parameter]) -> list[list[Tensor]]:
    groups: dict[object, list[Tensor]] = {}
    for weight in weights:
        if (gradient := weight.grad) is not None:
            mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
            groups.setdefault(mesh, []).append(gradient)
    return list(groups.values())


def gradient_norm(weights: Iterable[nn.Parameter]) -> Float[Tensor, ""]:
    """The Euclidean norm over all gradients of `weights`, whole where they are sharded; 0 where there are none."""
    norms = [torch.nn.utils.get_total_norm(group) for group in _by_mesh(weights)]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return whole[0] if len(whole) == 1 else torch.nn.utils.get_total_norm(whole)


def scale_gradients(weights: Iterable[nn.Parameter], factor: Float[Tensor, ""]) -> None:
    """Multiplies the gradients of `weights` by `factor`, in place."""
    for group in _by_mesh(weights):
        torch._foreach_mul_(group, factor)
