"""Causal attention inside each document of a packed row.

`AttentionPlan` sorts the documents of a row into groups of nearly equal length and pads within a group, so that a
row costs the sum of squares of its documents' lengths instead of the square of its own. Padding stands behind the
tokens of its document, where a causal token never looks: no mask is ever built.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

LENGTH_STEP = 16
"""Documents are padded to a multiple of this many tokens, which bounds the number of groups and of kernel calls."""


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""How a block attends: (layer, queries "T H K", keys "T G K", values "T G K") to outputs "T H K".

Training and prefill attend within the row (`AttentionPlan`), decoding attends to a cache; a block can't tell.
"""


@dataclass(frozen=True)
class AttentionPlan:
    """Where each token of a row goes for attention, and where it comes back from.

    Holds for one row on one device, and for every block.
    """

    groups: tuple[tuple[int, int], ...]
    """(documents, padded length) of each group."""
    gather: Int64[Tensor, " padded"]
    """For each place in the groups, the token that fills it; padding repeats the first token of its document."""
    scatter: Int64[Tensor, " T"]
    """For each token, its place in the groups."""

    @classmethod
    def of(cls, document_lengths: tuple[int, ...], device: torch.device) -> "AttentionPlan":
        """Plans a row of documents with these lengths, laid end to end."""
        lengths = np.array([length for length in document_lengths if length], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        padded = -(-lengths // LENGTH_STEP) * LENGTH_STEP
        scatter = np.empty(int(lengths.sum()), dtype=np.int64)
        groups, gather, base = [], [], 0
        for size in np.unique(padded):
            members = np.flatnonzero(padded == size)
            within = np.arange(size)
            inside = within < lengths[members, None]
            places = np.where(inside, starts[members, None] + within, starts[members, None])
            scatter[places[inside]] = base + np.flatnonzero(inside)
            groups.append((len(members), int(size)))
            gather.append(places.ravel())
            base += places.size
        index = torch.from_numpy(np.concatenate([*gather, scatter])).to(device, non_blocking=True)
        return cls(tuple(groups), index[:base], index[base:])

    def __call__(
        self,
        layer: int,
        queries: Float[Tensor, "T H K"],
        keys: Float[Tensor, "T G K"],
        values: Float[Tensor, "T G K"],
    ) -> Float[Tensor, "T H K"]:
        """Causal attention of every token to the tokens of its own document up to itself."""
        heads, kv_heads = queries.shape[1], keys.shape[1]
        packed = torch.cat((queries, keys, values), dim=1).index_select(0, self.gather)
        outputs = []
        for block, (documents, length) in zip(
            packed.split([documents * length for documents, length in self.groups]), self.groups, strict=True
        ):
            q, k, v = (
                block.view(documents, length, -1, block.shape[-1])
                .transpose(1, 2)
                .split([heads, kv_heads, kv_heads], dim=1)
            )
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.scatter)


def reference_attention(
    queries: Float[Tensor, "T H K"],
    keys: Float[Tensor, "T G K"],
    values: Float[Tensor, "T G K"],
    document_lengths: tuple[int, ...],
) -> Float[Tensor, "T H K"]:
    """The same attention as one masked softmax over the whole row: the definition that every fast path must match."""
    repeat = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(repeat, dim=1), values.repeat_interleave(repeat, dim=1)
    document = torch.repeat_interleave(
        torch.arange(len(document_lengths), device=queries.device),
        torch.tensor(document_lengths, device=queries.device),
    )
    order = torch.arange(queries.shape[0], device=queries.device)
    allowed = (document[:, None] == document) & (order[:, None] >= order)
    scores = torch.einsum("thk,shk->hts", queries, keys) / queries.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    return torch.einsum("hts,shk->thk", weights, values)


def rotary(
    positions: Int64[Tensor, " T"], head_size: int, theta: float
) -> tuple[Float[Tensor, "T 1 K"], Float[Tensor, "T 1 K"]]:
    """Cosines and sines of the rotary embedding (Su et al. 2021, arXiv 2104.09864) in the rotate-half layout.

    Always float32: bfloat16 can't tell neighbouring positions of a long document apart.
    """
    exponent = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size
    angles = positions[:, None].float() * theta**-exponent
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "T heads K"], cos: Float[Tensor, "T 1 K"], sin: Float[Tensor, "T 1 K"]
) -> Float[Tensor, "T heads K"]:
    """Turns the pairs (k, k + K/2) of each head by its token's angles."""
    first, second = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
