"""One block of the decoder: attention, then a feed-forward layer, each behind a norm; the dialect says which.

A `DenseBlock` updates every token, a `RoutedBlock` those that its rule lets pass: x + gate * update(x), and x for the
rest. The residual itself is never scaled.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fuyu_e2e.model.attention import Attend, RowAttention, rotate
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.recomputation import ActivationCheckpointing, recomputing
from fuyu_e2e.model.routing import Layout, Routed, build_rule, gather_passing

Rotary = tuple[Float[Tensor, "T 1 R"], Float[Tensor, "T 1 R"]]


def build_norm(config: FuyuConfig, size: int) -> nn.RMSNorm | nn.LayerNorm:
    """The dialect's norm over `size` values."""
    if config.dialect == "fuyu":
        return nn.LayerNorm(size, eps=config.norm_eps)
    return nn.RMSNorm(size, eps=config.norm_eps)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) with the dialect's norm on queries and keys."""

    def __init__(self, config: FuyuConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        query_width, kv_width = config.heads * config.head_size, config.kv_heads * config.head_size
        bias = config.dialect == "fuyu"
        self.q_proj = nn.Linear(config.width, query_width, bias=bias)
        self.k_proj = nn.Linear(config.width, kv_width, bias=bias)
        self.v_proj = nn.Linear(config.width, kv_width, bias=bias)
        self.o_proj = nn.Linear(query_width, config.width, bias=bias)
        self.q_norm = build_norm(config, config.head_size)
        self.k_norm = build_norm(config, config.head_size)

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
        v_TGK = self.v_proj(x_TD).unflatten(-1, (-1, self.head_size))
        # Under autocast, products come in bfloat16: a norm is one kernel only of what has the type of its weight, and
        # attention takes three of one type.
        norms = self.q_norm.weight.dtype
        q_CHK = rotate(self.q_norm(self.q_proj(x_CD).unflatten(-1, (-1, self.head_size)).to(norms)), *rotary_C)
        k_TGK = rotate(self.k_norm(self.k_proj(x_TD).unflatten(-1, (-1, self.head_size)).to(norms)), *rotary)
        q_CHK, k_TGK = q_CHK.to(v_TGK.dtype), k_TGK.to(v_TGK.dtype)
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


class SquaredReLU(nn.Module):
    """The feed-forward layer with relu(x)^2 of So et al. 2021 (arXiv 2109.08668, section 3), with biases."""

    def __init__(self, config: FuyuConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.width, config.feed_forward)
        self.down_proj = nn.Linear(config.feed_forward, config.width)

    def forward(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.down_proj(F.relu(self.up_proj(x_TD)).square())


def turns_at(rotary: Rotary, index: Int64[Tensor, " C"]) -> tuple[Float[Tensor, "C 1 R"], Float[Tensor, "C 1 R"]]:
    """The rotary angles of some tokens."""
    return rotary[0].index_select(0, index), rotary[1].index_select(0, index)


class Block(nn.Module):
    """The parts of a block, by the same names whether it is dense or routed."""

    def __init__(self, config: FuyuConfig) -> None:
        super().__init__()
        self.attention_norm = build_norm(config, config.width)
        self.attention = Attention(config)
        self.mlp_norm = build_norm(config, config.width)
        self.mlp = SquaredReLU(config) if config.dialect == "fuyu" else SwiGLU(config)


class DenseBlock(Block):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, for every token."""

    def forward(
        self,
        x_TD: Float[Tensor, "T D"],
        rotary: Rotary,
        attend: Attend,
        layer: int,
        *,
        recompute: ActivationCheckpointing = "none",
    ) -> Float[Tensor, "T D"]:
        return recomputing(recompute, self._update, x_TD, rotary, attend, layer)

    def _update(self, x_TD: Float[Tensor, "T D"], rotary: Rotary, attend: Attend, layer: int) -> Float[Tensor, "T D"]:
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
        *,
        recompute: ActivationCheckpointing = "none",
    ) -> tuple[Float[Tensor, "T D"], Routed]:
        return recomputing(recompute, self._update, x_TD, rotary, attend, layer, layout, capacity)

    def _update(
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
