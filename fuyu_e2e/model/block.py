"""One block of the decoder in the `qwen3` dialect: attention, then SwiGLU, each behind an RMSNorm.

A `DenseBlock` updates every token, a `RoutedBlock` those that its rule lets pass: x + gate * update(x), and x for the
rest. The residual itself is never scaled.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fuyu_e2e.model.attention import Attend, RowAttention, rotate
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.routing import Layout, Routed, build_rule, gather_passing

Rotary = tuple[Float[Tensor, "T 1 K"], Float[Tensor, "T 1 K"]]


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) with RMSNorm on queries and keys."""

    def __init__(self, config: FuyuConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.q_proj = nn.Linear(config.width, config.heads * config.head_size, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_size, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_size, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_size, config.width, bias=False)
        self.q_norm = nn.RMSNorm(config.head_size, eps=config.norm_eps)
        self.k_norm = nn.RMSNorm(config.head_size, eps=config.norm_eps)

    def forward(
        self,
        x_TD: Float[Tensor, "T D"],
        rotary: Rotary,
        attend: Attend,
        layer: int,
        asking: Int64[Tensor, " C"] | None = None,
    ) -> Float[Tensor, "C D"]:
        """Attention of the tokens at `asking`, or of all, to all that `attend` shows them."""
        x_CD, rotary_C = (x_TD, rotary) if asking is None else (x_TD.index_select(0, asking), turns_at(rotary, asking))
        q_CHK = rotate(self.q_norm(self.q_proj(x_CD).unflatten(-1, (-1, self.head_size))), *rotary_C)
        k_TGK = rotate(self.k_norm(self.k_proj(x_TD).unflatten(-1, (-1, self.head_size))), *rotary)
        v_TGK = self.v_proj(x_TD).unflatten(-1, (-1, self.head_size))
        return self.o_proj(attend(layer, q_CHK, k_TGK, v_TGK).flatten(-2))


class SwiGLU(nn.Module):
    """The gated feed-forward layer of Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, config: FuyuConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.feed_forward, bias=False)
        self.up_proj = nn.Linear(config.width, config.feed_forward, bias=False)
        self.down_proj = nn.Linear(config.feed_forward, config.width, bias=False)

    def forward(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


def turns_at(rotary: Rotary, index: Int64[Tensor, " C"]) -> tuple[Float[Tensor, "C 1 K"], Float[Tensor, "C 1 K"]]:
    """The rotary angles of some tokens."""
    return rotary[0].index_select(0, index), rotary[1].index_select(0, index)


class Block(nn.Module):
    """The parts of a block, by the same names whether it is dense or routed."""

    def __init__(self, config: FuyuConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = SwiGLU(config)


class DenseBlock(Block):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, for every token."""

    def forward(self, x_TD: Float[Tensor, "T D"], rotary: Rotary, attend: Attend, layer: int) -> Float[Tensor, "T D"]:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), rotary, attend, layer)
        return x_TD + self.mlp(self.mlp_norm(x_TD))


class RoutedBlock(Block):
    """The same for the tokens that pass, which attend to each other, or to all where skipped tokens leave their keys.

    Shapes depend on the capacity alone, and nothing waits for the device; in evaluation, without a capacity, every
    token that passes is taken and their number has to be read.
    """

    def __init__(self, config: FuyuConfig, layer: int) -> None:
        super().__init__(config)
        assert config.routing is not None
        self.leaves_keys = config.routing.skipped == "keys"
        self.rule = build_rule(config, layer)

    def forward(
        self,
        x_TD: Float[Tensor, "T D"],
        rotary: Rotary,
        attend: RowAttention,
        layer: int,
        layout: Layout,
        capacity: int | None,
    ) -> tuple[Float[Tensor, "T D"], Routed]:
        choice = self.rule.choose(x_TD, layout, capacity)
        passing = gather_passing(choice.passes, capacity)
        x_CD = x_TD.index_select(0, passing.index)
        if self.leaves_keys:
            norm_TD = self.attention_norm(x_TD)
            attended_CD = self.attention(norm_TD, rotary, attend.asking(passing), layer, passing.index)
        else:
            norm_CD = self.attention_norm(x_CD)
            attended_CD = self.attention(norm_CD, turns_at(rotary, passing.index), attend.among(passing), layer)
        update_CD = attended_CD + self.mlp(self.mlp_norm(x_CD + attended_CD))
        gates_C = torch.where(passing.real, choice.gates.index_select(0, passing.index), 0.0)
        x_TD = x_TD.index_add(0, passing.index, (gates_C[:, None] * update_CD).to(x_TD.dtype))
        scores = None if choice.scores is None else choice.scores.detach()
        passed = torch.zeros_like(choice.passes).index_copy(0, passing.index, passing.real)
        return x_TD, Routed(self.rule.block, choice.passes, passed, scores, choice.auxiliary)
