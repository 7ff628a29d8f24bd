"""LLaVA 1.5's connector (Liu et al. 2023, arXiv 2310.03744, section 3.3) on raw patches: linear, GELU, linear."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from fuyu_e2e.errors import UserError
from fuyu_e2e.model.flops import Flops
from fuyu_e2e.model.image_layout import Grid, ImageSpan
from fuyu_e2e.model.images.connector import Connector, ConnectorConfig, draw_patch_weight, normalized

if TYPE_CHECKING:
    import fuyu_e2e.model.config

GELU_GAIN = 1.5
"""Restores the scale that GELU takes from values around 1."""


@dataclass(frozen=True)
class MLPConfig(ConnectorConfig):
    """Two linear layers with GELU between, the same for every patch.

    Raises:
        UserError: A value is out of its range.
    """

    hidden: int | None = None
    """Values between the layers; by default the decoder's width."""
    one_per_patch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.hidden is not None and self.hidden < 1:
            raise UserError(f"decoder.connector.hidden is {self.hidden}, but must be at least 1.")

    def build(self, config: "fuyu_e2e.model.config.FuyuConfig") -> "PatchMLP":
        """Returns a two-layer projection to the decoder's width."""
        return PatchMLP(config.patch_values, self.hidden or config.width, config.width)


class PatchMLP(Connector):
    """Two linear layers on normalised patches."""

    def __init__(self, patch_values: int, hidden: int, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(patch_values, hidden)
        self.down_proj = nn.Linear(hidden, width)

    def forward(self, patches: UInt8[Tensor, "P C"], *, images: tuple[ImageSpan, ...]) -> Float[Tensor, "P D"]:
        return self.down_proj(F.gelu(self.up_proj(normalized(patches, self.up_proj.weight.dtype))))

    def initialize(self) -> None:
        draw_patch_weight(self.up_proj.weight)
        nn.init.normal_(self.down_proj.weight, std=GELU_GAIN * self.down_proj.in_features**-0.5)
        for layer in (self.up_proj, self.down_proj):
            nn.init.zeros_(layer.bias)

    def sharding(self) -> dict[str, ParallelStyle]:
        return {"up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}

    def flops(self, grids: Sequence[Grid]) -> Flops:
        patches = sum(rows * cols for rows, cols in grids)
        up, down = (patches * projection.weight.numel() for projection in (self.up_proj, self.down_proj))
        return Flops(with_input_gradient=down, without_input_gradient=up)
