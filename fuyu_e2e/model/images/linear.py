"""Fuyu's connector (Bavishi et al. 2023): one linear projection of each patch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle

from fuyu_e2e.model.flops import Flops
from fuyu_e2e.model.image_layout import Grid, ImageSpan
from fuyu_e2e.model.images.connector import Connector, ConnectorConfig, draw_patch_weight, normalized

if TYPE_CHECKING:
    import fuyu_e2e.model.config


@dataclass(frozen=True)
class LinearConfig(ConnectorConfig):
    """One linear projection, the same for every patch."""

    one_per_patch: ClassVar[bool] = True

    def build(self, config: "fuyu_e2e.model.config.FuyuConfig") -> "PatchProjection":
        """Returns a projection to the decoder's width."""
        return PatchProjection(config.patch_values, config.width)


class PatchProjection(nn.Linear, Connector):
    """A linear layer on normalised patches."""

    def forward(  # type: ignore[override]
        self, patches: UInt8[Tensor, "P C"], *, images: tuple[ImageSpan, ...]
    ) -> Float[Tensor, "P D"]:
        return F.linear(normalized(patches, self.weight.dtype), self.weight, self.bias)

    def initialize(self) -> None:
        draw_patch_weight(self.weight)
        nn.init.zeros_(self.bias)

    def sharding(self) -> dict[str, ParallelStyle]:
        return {"": ColwiseParallel(output_layouts=Replicate())}

    def flops(self, grids: Sequence[Grid]) -> Flops:
        return Flops(without_input_gradient=sum(rows * cols for rows, cols in grids) * self.weight.numel())
