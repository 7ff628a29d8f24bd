"""Images that take no tokens: a connector that gives features alone, and a block that reads them (Flamingo's, Alayrac
et al. 2022, arXiv 2204.14198, without its resampler)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from fuyu_e2e.model.blocks.block import Block, BlockConfig
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.flops import CountedRow, Flops
from fuyu_e2e.model.image_layout import Grid, ImageSpan
from fuyu_e2e.model.images.connector import Connector, ConnectorConfig, ImageStates, normalized
from fuyu_e2e.model.row import Row


@dataclass(frozen=True)
class FeaturesConfig(ConnectorConfig):
    """A feature for each patch, and no token."""

    gives_features: ClassVar[bool] = True

    def tokens(self, grids: tuple[Grid, ...]) -> np.ndarray:
        return np.empty(0, bool)

    def build(self, config: FuyuConfig) -> "Features":
        return Features(config)


class Features(Connector):
    """One linear layer of each patch."""

    def __init__(self, config: FuyuConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(config.patch_values, config.width)

    def forward(self, patches: UInt8[Tensor, "P C"], *, images: tuple[ImageSpan, ...]) -> ImageStates:
        features = self.projection(normalized(patches, self.projection.weight.dtype))
        counts = torch.tensor([span.patches for span in images], dtype=torch.int64)
        number = torch.arange(len(images)).repeat_interleave(counts).to(patches.device)
        return ImageStates(features[:0], features, number)

    def initialize(self) -> None:
        nn.init.normal_(self.projection.weight, std=0.1)
        nn.init.zeros_(self.projection.bias)

    def sharding(self) -> dict[str, ParallelStyle]:
        return {}

    def flops(self, grids: Sequence[Grid]) -> Flops:
        return Flops(without_input_gradient=sum(rows * cols for rows, cols in grids) * self.projection.weight.numel())


@dataclass(frozen=True)
class CrossingConfig(BlockConfig):
    """Settings of the block: none."""

    def build(self, config: FuyuConfig, number: int) -> "Crossing":
        return Crossing(config, number)


class Crossing(Block):
    """`x + tanh(gate) * out(attention of x to the features of the last image before it)`, of one head."""

    def __init__(self, config: FuyuConfig, number: int) -> None:
        super().__init__(config, number)
        self.query, self.key, self.value, self.out = (
            nn.Linear(config.width, config.width, bias=False) for _ in range(4)
        )
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x_TD: Float[Tensor, "T D"], row: Row) -> Float[Tensor, "T D"]:
        features, seen = row.features
        scores = self.query(F.rms_norm(x_TD, x_TD.shape[-1:])) @ self.key(features).T / x_TD.shape[-1] ** 0.5
        # A token before all images reads nothing: a key that says nothing is seen by all.
        scores = F.pad(scores.masked_fill(~seen, float("-inf")), (1, 0))
        read = scores.softmax(dim=-1)[:, 1:] @ self.value(features)
        return x_TD + self.gate.tanh() * self.out(read)

    def initialize(self) -> None:
        nn.init.zeros_(self.gate)

    def operations(self) -> partial[Flops]:
        return partial(_operations, self.query.weight.numel(), self.query.out_features)

    def saved_bytes(self, tokens: int, work: int, size: int) -> int:
        return tokens * 4 * self.query.out_features * size

    def sharding(self) -> dict[str, ParallelStyle]:
        return {}


def _operations(weights: int, width: int, row: CountedRow) -> Flops:
    """Counted as if each token read all patches of the row."""
    tokens = sum(row.lengths)
    return Flops(2 * weights * (tokens + row.patches) + 2 * width * tokens * row.patches)
