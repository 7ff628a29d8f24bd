"""A connector of a user's own: one embedding for each two by two patches of an image, their mean through a layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.flops import Flops
from fuyu_e2e.model.image_layout import Grid, ImageSpan
from fuyu_e2e.model.images.connector import Connector, ConnectorConfig, normalized


@dataclass(frozen=True)
class PooledConfig(ConnectorConfig):
    """Squares of `side` x `side` patches; those at the edges may be smaller."""

    side: int = 2

    def tokens(self, grids: tuple[Grid, ...]) -> np.ndarray:
        """A row of squares, then a newline."""
        return np.concatenate(
            [np.tile([False] * self.squares(grid)[1] + [True], self.squares(grid)[0]) for grid in grids]
        )

    def squares(self, grid: Grid) -> Grid:
        """Rows and columns of squares of a view."""
        return -(-grid[0] // self.side), -(-grid[1] // self.side)

    def build(self, config: FuyuConfig) -> "Pooled":
        return Pooled(self, config)


class Pooled(Connector):
    """The mean of each square's patches, through one linear layer."""

    def __init__(self, settings: PooledConfig, config: FuyuConfig) -> None:
        super().__init__()
        self.settings = settings
        self.projection = nn.Linear(config.patch_values, config.width)

    def forward(self, patches: UInt8[Tensor, "P C"], *, images: tuple[ImageSpan, ...]) -> Float[Tensor, "N D"]:
        square, before = [np.empty(0, np.int64)], 0
        for grid in (grid for span in images for grid in span.grids):
            row, col = np.indices(grid) // self.settings.side
            rows, cols = self.settings.squares(grid)
            square.append((before + row * cols + col).ravel())
            before += rows * cols
        index = torch.from_numpy(np.concatenate(square)).to(patches.device)
        values = normalized(patches, self.projection.weight.dtype)
        total = values.new_zeros(before, values.shape[1]).index_add(0, index, values)
        return self.projection(total / torch.bincount(index, minlength=before)[:, None])

    def initialize(self) -> None:
        nn.init.normal_(self.projection.weight, std=0.1)
        nn.init.zeros_(self.projection.bias)

    def sharding(self) -> dict[str, ParallelStyle]:
        return {}

    def flops(self, grids: Sequence[Grid]) -> Flops:
        squares = [rows * cols for rows, cols in map(self.settings.squares, grids)]
        return Flops(without_input_gradient=sum(squares) * self.projection.weight.numel())
