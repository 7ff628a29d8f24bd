"""A block of a user's own: attention and a feed-forward layer side by side, after one norm, as in PaLM (Chowdhery et
al. 2022, arXiv 2204.02311, section 2)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from fuyu_e2e.model.blocks.block import Block, BlockConfig
from fuyu_e2e.model.blocks.dense import Attention, SwiGLU, build_norm, products_of
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.flops import DenseOperations
from fuyu_e2e.model.recomputation import recomputing
from fuyu_e2e.model.row import Row


@dataclass(frozen=True)
class ParallelConfig(BlockConfig):
    """Settings of the block; `scale` is the factor of both updates."""

    scale: float = 1.0

    def build(self, config: FuyuConfig, number: int) -> "ParallelBlock":
        return ParallelBlock(self, config, number)


class ParallelBlock(Block):
    """`x + scale * (attention(norm(x)) + mlp(norm(x)))`."""

    def __init__(self, settings: ParallelConfig, config: FuyuConfig, number: int) -> None:
        super().__init__(config, number)
        self.scale = settings.scale
        self.shared_norm = build_norm(config, config.width)
        self.attention = Attention(config)
        self.mlp = SwiGLU(config)

    def forward(self, x_TD: Float[Tensor, "T D"], row: Row) -> Float[Tensor, "T D"]:
        return recomputing(self.recompute, self._forward, x_TD, row)

    def _forward(self, x_TD: Float[Tensor, "T D"], row: Row) -> Float[Tensor, "T D"]:
        normed = self.shared_norm(x_TD)
        return x_TD + self.scale * (self.attention(normed, row) + self.mlp(normed))

    def initialize(self) -> None:
        nn.init.zeros_(self.attention.o_proj.weight)
        nn.init.zeros_(self.mlp.down_proj.weight)

    def operations(self) -> DenseOperations:
        return products_of(self, self.attention)

    def saved_bytes(self, tokens: int, work: int, size: int) -> int:
        return tokens * (size * 4 * self.shared_norm.weight.numel() + work * 4 * self.mlp.up_proj.out_features)

    def sharding(self) -> dict[str, ParallelStyle]:
        return {}
