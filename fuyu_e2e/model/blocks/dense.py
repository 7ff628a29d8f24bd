"""The dense block and its parts; the dialect chooses among them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)

from fuyu_e2e.model.blocks.block import Block, BlockConfig
from fuyu_e2e.model.flops import DenseOperations
from fuyu_e2e.model.recomputation import recomputing
from fuyu_e2e.model.rope import rotate
from fuyu_e2e.model.row import Row

if TYPE_CHECKING:
    import fuyu_e2e.model.config


def build_norm(config: "fuyu_e2e.model.config.FuyuConfig", size: int) -> nn.RMSNorm | nn.LayerNorm:
    """Returns the dialect's norm over `size` values."""
    norms: dict[str, type[nn.RMSNorm | nn.LayerNorm]] = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}
    return norms[config.parts.norm](size, eps=config.norm_eps)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) with the dialect's norm on queries and keys."""

    def __init__(self, config: "fuyu_e2e.model.config.FuyuConfig") -> None:
        super().__init__()
        self.head_size = config.head_size
        query_width, kv_width = config.heads * config.head_size, config.kv_heads * config.head_size
        bias = config.parts.biases
        self.q_proj = nn.Linear(config.width, query_width, bias=bias)
        self.k_proj = nn.Linear(config.width, kv_width, bias=bias)
        self.v_proj = nn.Linear(config.width, kv_width, bias=bias)
        self.o_proj = nn.Linear(query_width, config.width, bias=bias)
        self.q_norm = build_norm(config, config.head_size)
        self.k_norm = build_norm(config, config.head_size)

    def forward(self, x_TD: Float[Tensor, "T D"], row: Row) -> Float[Tensor, "U D"]:
        """Returns the attention of the row's queries, or of all its tokens, to the keys that `row.attend` shows
        them."""
        assert row.attend is not None
        x_UD, rope_U = x_TD, row.rope
        if row.queries is not None:
            x_UD = x_TD.index_select(0, row.queries)
            rope_U = (rope_U[0].index_select(0, row.queries), rope_U[1].index_select(0, row.queries))
        v_TGK = self.v_proj(x_TD).unflatten(-1, (-1, self.head_size))
        # Under autocast, products give bfloat16. A norm is a single kernel only if its input has the dtype of its
        # weight, and attention needs queries, keys and values of one dtype.
        norms = self.q_norm.weight.dtype
        q_UHK = rotate(self.q_norm(self.q_proj(x_UD).unflatten(-1, (-1, self.head_size)).to(norms)), *rope_U)
        k_TGK = rotate(self.k_norm(self.k_proj(x_TD).unflatten(-1, (-1, self.head_size)).to(norms)), *row.rope)
        q_UHK, k_TGK = q_UHK.to(v_TGK.dtype), k_TGK.to(v_TGK.dtype)
        return self.o_proj(row.attend(q_UHK, k_TGK, v_TGK).flatten(-2))


class SwiGLU(nn.Module):
    """The gated feed-forward layer of Shazeer 2020 (arXiv 2002.05202)."""

    kept = 4
    """Inner activations that the backward pass needs, in multiples of the inner width: gate, up, silu(gate),
    product."""

    def __init__(self, config: "fuyu_e2e.model.config.FuyuConfig") -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.feed_forward, bias=False)
        self.up_proj = nn.Linear(config.width, config.feed_forward, bias=False)
        self.down_proj = nn.Linear(config.feed_forward, config.width, bias=False)

    def forward(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class SquaredReLU(nn.Module):
    """The feed-forward layer with relu(x)^2 of So et al. 2021 (arXiv 2109.08668, section 3), with biases."""

    kept = 2
    """Inner activations that the backward pass needs, in multiples of the inner width: the ReLU and its square."""

    def __init__(self, config: "fuyu_e2e.model.config.FuyuConfig") -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.width, config.feed_forward)
        self.down_proj = nn.Linear(config.feed_forward, config.width)

    def forward(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.down_proj(F.relu(self.up_proj(x_TD)).square())


FEED_FORWARDS: dict[str, type[SwiGLU | SquaredReLU]] = {"SwiGLU": SwiGLU, "SquaredReLU": SquaredReLU}
"""Feed-forward classes by their names in `Parts`."""


def products_of(block: Block, attention: Attention) -> DenseOperations:
    """Returns the operations of a block whose linear layers all tokens pass, and of its `attention`."""
    keys = attention.k_proj.weight.numel() + attention.v_proj.weight.numel()
    linear = sum(part.weight.numel() for part in block.modules() if isinstance(part, nn.Linear))
    # Each value of a query is multiplied with one of the key, and as many products again make the weighted sum.
    pair = 2 * attention.q_proj.out_features
    return DenseOperations(query=linear - keys, key=keys, pair=pair, mask=block.mask)


@dataclass(frozen=True)
class DenseConfig(BlockConfig):
    """Attention and a feed-forward layer for every token, in the dialect's form."""

    def build(self, config: "fuyu_e2e.model.config.FuyuConfig", number: int) -> "DenseBlock":
        """Returns a new dense block."""
        return DenseBlock(config, number)


class DenseBlock(Block):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, for every token."""

    kind = "dense"

    def __init__(self, config: "fuyu_e2e.model.config.FuyuConfig", number: int) -> None:
        super().__init__(config, number)
        self.attention_norm = build_norm(config, config.width)
        self.attention = Attention(config)
        self.mlp_norm = build_norm(config, config.width)
        self.mlp = FEED_FORWARDS[config.parts.feed_forward](config)

    def initialize(self) -> None:
        """Zeros the output projections of attention and feed-forward layer."""
        nn.init.zeros_(self.attention.o_proj.weight)
        nn.init.zeros_(self.mlp.down_proj.weight)

    def forward(self, x_TD: Float[Tensor, "T D"], row: Row) -> Float[Tensor, "T D"]:
        return recomputing(self.recompute, self._forward, x_TD, row)

    def _forward(self, x_TD: Float[Tensor, "T D"], row: Row) -> Float[Tensor, "T D"]:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), row)
        return x_TD + self.mlp(self.mlp_norm(x_TD))

    def update(self, x_UD: Float[Tensor, "U D"], context_TD: Float[Tensor, "T D"], row: Row) -> Float[Tensor, "U D"]:
        """Returns what the block adds to the states of the tokens that attend.

        Args:
            x_UD: The states of these tokens.
            context_TD: The states of the tokens that they attend to, which may be the same.
            row: The row of `context_TD`.
        """
        attended_UD = self.attention(self.attention_norm(context_TD), row)
        return attended_UD + self.mlp(self.mlp_norm(x_UD + attended_UD))

    def operations(self) -> DenseOperations:
        """Returns the operations of its matrix products."""
        return products_of(self, self.attention)

    def saved_bytes(self, tokens: int, work: int, size: int) -> int:
        """Returns the bytes that it keeps for all tokens."""
        attention, (inner, width) = self.attention, self.mlp.up_proj.weight.shape
        queries, keys = attention.q_proj.out_features, attention.k_proj.out_features
        heads, kv_heads = queries // attention.head_size, keys // attention.head_size
        # Outputs of two norms, which autocast casts for each product that reads them: q, k, v and all of the mlp but
        # its last.
        inputs = 3 + len(list(self.mlp.children())) - 1 if work < size else 2
        # Queries, keys and values side by side, and attention's outputs before and after the backend.
        values = inputs * width + 3 * queries + 2 * keys + self.mlp.kept * inner
        # A norm keeps its input and float32 statistics; a LayerNorm keeps mean and deviation, an RMSNorm also the
        # quotient.
        states, numbers = (1, 2) if isinstance(self.mlp_norm, nn.LayerNorm) else (2, 1)
        normed, norms = 2 * width + queries + keys, 2 + heads + kv_heads
        # The last term is the log-sum-exp of each head's softmax, float32.
        return tokens * (work * values + size * states * normed + 4 * numbers * norms + 4 * heads)

    def sharding(self) -> dict[str, ParallelStyle]:
        """Splits attention by heads and the feed-forward layer by its inner values."""
        whole = (Replicate(), None)
        return {
            **{f"attention.{name}_proj": ColwiseParallel() for name in "qkv"},
            **{f"attention.{name}_norm": SequenceParallel(sequence_dim=1, use_local_output=True) for name in "qk"},
            "attention.o_proj": RowwiseParallel(),
            # Products that share an input: their gradients are added up locally before one sum over the devices.
            "mlp": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate()),
            **{f"mlp.{name}": ColwiseParallel() for name, _ in self.mlp.named_children() if name != "down_proj"},
            "mlp.down_proj": RowwiseParallel(),
            "attention": PrepareModuleInput(input_layouts=whole, desired_input_layouts=whole),
        }
