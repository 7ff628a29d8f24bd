"""AdamW with decoupled weight decay on matrices only, and Muon for the matrices of blocks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.optim.adamw import adamw

from fuyu_e2e.errors import UserError
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.training.gradients import gradients_of, local

MUON_BYTES = 2**28
"""Bytes of float32 matrices that a device orthogonalizes at once (at least one matrix): enough work for a GPU even if
matrices are small. On a GPU this needs three times as much memory on top of weights, gradients and momenta, on a CPU
five times."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Which optimizer updates which weights, and its rates.

    Raises:
        UserError: A value is out of its range.
    """

    name: Literal["adamw", "muon"] = "adamw"
    """`adamw` updates all weights; `muon` updates the matrices of blocks and leaves the rest to AdamW."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the averages of the gradient and of its square."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices under AdamW, per step and multiplied by the learning rate; vectors don't decay."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon."""
    muon_momentum: float = 0.95
    """Muon's decay rate of the averaged gradient."""
    muon_weight_decay: float = 0.01
    """Decoupled decay of matrices under Muon, per step and multiplied by its learning rate."""

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr"):
            if not (value := getattr(self, name)) > 0:
                raise UserError(f"optimizer.{name} is {value}, but must be above 0.")
        for name in ("weight_decay", "muon_weight_decay"):
            if not (value := getattr(self, name)) >= 0:
                raise UserError(f"optimizer.{name} is {value}, but must be 0 or above.")
        for name, value in (("betas", beta) for beta in self.betas):
            if not 0 <= value < 1:
                raise UserError(f"optimizer.{name} holds {value}, but must lie in [0, 1).")
        if not 0 <= self.muon_momentum < 1:
            raise UserError(f"optimizer.muon_momentum is {self.muon_momentum}, but must lie in [0, 1).")


def build_optimizer(decoder: Decoder, config: OptimizerConfig) -> "MuonAdamW":
    """Returns the optimizer for all weights of `decoder`."""
    in_blocks = {id(weight) for weight in decoder.blocks.parameters() if weight.ndim == 2}
    muon: list[Tensor] = []
    decaying: list[Tensor] = []
    plain: list[Tensor] = []
    for weight in decoder.parameters():
        if config.name == "muon" and id(weight) in in_blocks:
            muon.append(weight)
        else:
            (decaying if weight.ndim >= 2 else plain).append(weight)
    adamw_options = {"kind": "adamw", "lr": config.lr, "betas": config.betas, "eps": 1e-8}
    groups = [
        {"params": decaying, "weight_decay": config.weight_decay, **adamw_options},
        {"params": plain, "weight_decay": 0.0, **adamw_options},
        {
            "params": muon,
            "kind": "muon",
            "lr": config.muon_lr,
            "momentum": config.muon_momentum,
            "weight_decay": config.muon_weight_decay,
        },
    ]
    return MuonAdamW([group for group in groups if group["params"]])


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) and AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) in one optimizer.

    A single object, because Lightning's automatic optimization takes one. torch.optim.Muon updates one matrix at a
    time, in bfloat16 on CPUs too, and can't be told on the device to skip a step. Each group names its `kind`, `muon`
    or `adamw`. Muon's update is scaled by sqrt(max(1, rows / columns)), as in the reference. Each device updates its
    part of sharded weights; only Muon's matrices have to be gathered.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        self.found_inf: Float[Tensor, ""] | None = None
        """1 on the device if the next step must change nothing, else 0; None means 0. torch's fused optimizers use the
        same name."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of each weight; the groups keep the settings that they were built with."""
        own = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, settings in zip(self.param_groups, own, strict=True):
            group.update(settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every weight that has a gradient; `closure` computes the loss and the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                (self._step_muon if group["kind"] == "muon" else self._step_adamw)(group, weights)
        return loss

    def _step_adamw(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        for weight in weights:
            if not self.state[weight]:
                self.state[weight] = {
                    "step": torch.zeros((), device=weight.device),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }
        own, states = [local(weight) for weight in weights], [self.state[weight] for weight in weights]
        for state in states:
            # The fused kernel counts steps on the device, but torch leaves a checkpoint's counts on the host.
            state["step"] = state["step"].to(own[0].device)
        adamw(
            own,
            gradients_of(weights),
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_muon(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        by_shape: dict[tuple[torch.Size, Any], list[Tensor]] = {}
        for weight in weights:
            if not self.state[weight]:
                self.state[weight] = {"momentum": torch.zeros_like(weight)}
            placements = weight.placements if isinstance(weight, DTensor) else None
            by_shape.setdefault((weight.shape, placements), []).append(weight)
        for (shape, _), alike in by_shape.items():
            # Each device orthogonalizes whole matrices, its share of them.
            devices = alike[0].device_mesh.size() if isinstance(alike[0], DTensor) else 1
            at_once = devices * max(1, MUON_BYTES // (4 * shape.numel()))
            for start in range(0, len(alike), at_once):
                self._step_muon_alike(group, alike[start : start + at_once])

    def _step_muon_alike(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        """Updates matrices of one shape and one placement on the devices."""
        first, own = weights[0], [local(weight) for weight in weights]
        gradients, momenta = gradients_of(weights), [local(self.state[weight]["momentum"]) for weight in weights]
        rate: float | Tensor = group["lr"]
        if self.found_inf is not None:
            rate = rate * (1 - self.found_inf.double())
            skip = self.found_inf > 0
            # A momentum averaged with itself doesn't change.
            gradients = [torch.where(skip, *pair) for pair in zip(momenta, gradients, strict=True)]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        nesterov = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))
        updates = _orthogonalize_parts(nesterov, first) if isinstance(first, DTensor) else orthogonalize(nesterov)
        torch._foreach_mul_(own, 1 - rate * group["weight_decay"])
        updates = updates.to(own[0].dtype).mul_(rate * max(1.0, first.shape[0] / first.shape[1]) ** 0.5)
        torch._foreach_sub_(own, list(updates.unbind()))


def _orthogonalize_parts(parts: Tensor, like: DTensor) -> Tensor:
    """Applies `orthogonalize` to matrices placed like `like`, of which this device has (n, own rows, own cols).

    Each device takes some of the matrices whole, and sends the parts of their updates back.
    """
    mesh, whole = like.device_mesh, torch.Size((len(parts), *like.shape))
    stride = (like.shape[0] * like.shape[1], like.shape[1], 1)
    parted = [_behind_one_more(placement) for placement in like.placements]
    apart = [Shard(0)] * mesh.ndim
    stacked = DTensor.from_local(parts, mesh, parted, run_check=False, shape=whole, stride=stride)
    own = orthogonalize(stacked.redistribute(placements=apart).to_local())
    updates = DTensor.from_local(own, mesh, apart, run_check=False, shape=whole, stride=stride)
    return updates.redistribute(placements=parted).to_local()


def _behind_one_more(placement: Placement) -> Placement:
    """Returns the placement of a stack of matrices, given that of one matrix."""
    if isinstance(placement, _StridedShard):
        return _StridedShard(placement.dim + 1, split_factor=placement.split_factor)
    return Shard(placement.dim + 1) if isinstance(placement, Shard) else placement


def orthogonalize(matrices: Float[Tensor, "n rows cols"], iterations: int = 5) -> Float[Tensor, "n rows cols"]:
    """Returns roughly the nearest semi-orthogonal matrices: singular values end between 0.7 and 1.2.

    Runs the quintic Newton-Schulz iteration with Jordan's coefficients on all matrices of one shape at once, in
    bfloat16 on CUDA devices and in float32 elsewhere: few CPUs are fast at bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
