"""One block of the decoder in the `qwen3` dialect: attention, then SwiGLU, each behind an RMSNorm."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fuyu_e2e.model.attention import Attend, rotate
from fuyu_e2e.model.config import FuyuConfig

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

    def forward(self, x_TD: Float[Tensor, "T D"], rotary: Rotary, attend: Attend, layer: int) -> Float[Tensor, "T D"]:
        q_THK = rotate(self.q_norm(self.q_proj(x_TD).unflatten(-1, (-1, self.head_size))), *rotary)
        k_TGK = rotate(self.k_norm(self.k_proj(x_TD).unflatten(-1, (-1, self.head_size))), *rotary)
        v_TGK = self.v_proj(x_TD).unflatten(-1, (-1, self.head_size))
        return self.o_proj(attend(layer, q_THK, k_TGK, v_TGK).flatten(-2))


class SwiGLU(nn.Module):
    """The gated feed-forward layer of Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, config: FuyuConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.feed_forward, bias=False)
        self.up_proj = nn.Linear(config.width, config.feed_forward, bias=False)
        self.down_proj = nn.Linear(config.feed_forward, config.width, bias=False)

    def forward(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: FuyuConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x_TD: Float[Tensor, "T D"], rotary: Rotary, attend: Attend, layer: int) -> Float[Tensor, "T D"]:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), rotary, attend, layer)
        return x_TD + self.mlp(self.mlp_norm(x_TD))
