"""Attention by documents with torch's own scaled dot product, on any device.

`AttentionPlan` sorts the documents of a row into groups of nearly equal length and pads within a group. Padding stands
behind the tokens of its document, where a causal token never looks: no mask is ever built.

How many tokens of each document pass a routed block is known on the device alone. On the CPU, where looking costs
nothing, those that pass are planned like a row of their own; elsewhere `MaskedAttention` takes them as they are, at
the price of the square of a routed block's capacity, so that the host never waits.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fuyu_e2e.model.attention import Attend, Passing, RowAttention
from fuyu_e2e.model.device_copy import to_device

LENGTH_STEP = 16
"""Documents are padded to a multiple of this many tokens, which bounds the number of groups and of kernel calls."""


KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of a GPU, the first that serves computes the documents of a group. cuDNN's, which torch would try first on Hopper,
takes seconds to plan for each new shape."""


@dataclass(frozen=True)
class AttentionPlan(RowAttention):
    """Where each token of a row goes for attention, and where it comes back from.

    Holds for one row on one device, and for every block.
    """

    lengths: tuple[int, ...]
    """Tokens of each document."""
    groups: tuple[tuple[int, int], ...]
    """(documents, padded length) of each group."""
    gather: Int64[Tensor, " padded"]
    """For each place in the groups, the token that fills it; padding repeats the first token of its document."""
    scatter: Int64[Tensor, " T"]
    """For each token, its place in the groups."""
    document: Int64[Tensor, " T"]
    """For each token, the number of its document."""

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
        document = np.repeat(np.arange(len(lengths)), lengths)
        index = to_device(torch.from_numpy(np.concatenate([*gather, scatter, document])), device)
        return cls(tuple(lengths.tolist()), tuple(groups), *index.split([base, len(scatter), len(document)]))

    @torch.compiler.disable
    def __call__(
        self,
        queries: Float[Tensor, "T H K"],
        keys: Float[Tensor, "T G K"],
        values: Float[Tensor, "T G K"],
    ) -> Float[Tensor, "T H K"]:
        """Causal attention of every token to the tokens of its own document up to itself."""
        if not self.groups:  # no token of any document passes a routed block
            return queries
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
            with sdpa_kernel(KERNELS, set_priority=True) if q.is_cuda else nullcontext():
                attended = shared_attention(q, k, v, is_causal=True)
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.scatter)

    @torch.compiler.disable
    def among(self, passing: Passing) -> Attend:
        """The attention of passing tokens to each other."""
        document = self._documents_of(passing)
        if document.device.type != "cpu":
            return MaskedAttention.among(document)
        return AttentionPlan.of(tuple(self._counts(document)), document.device)

    @torch.compiler.disable
    def asking(self, passing: Passing) -> Attend:
        """The attention of passing tokens to the whole row."""
        if passing.index.device.type != "cpu":
            return MaskedAttention.asking(passing.index, self.document)
        return AskingPlan.of(self._counts(self._documents_of(passing))[:-1], self.lengths, passing.index)

    def _documents_of(self, passing: Passing) -> Int64[Tensor, " C"]:
        """The document of each passing token; what only fills the capacity forms one more behind the last."""
        return passing.documents(self.document, len(self.lengths))

    def _counts(self, document: Int64[Tensor, " C"]) -> list[int]:
        return torch.bincount(document, minlength=len(self.lengths) + 1).tolist()


@dataclass(frozen=True)
class AskingPlan:
    """Attention of some tokens of a row to all of it, planned by document as in `AttentionPlan`; for the CPU."""

    groups: tuple[tuple[int, int, int], ...]
    """(documents, padded queries, padded keys) of each group."""
    query_gather: Int64[Tensor, " padded_queries"]
    """For each query's place in the groups, the asking token that fills it."""
    key_gather: Int64[Tensor, " padded_keys"]
    """For each key's place in the groups, the token of the row that fills it."""
    places: Int64[Tensor, " padded_queries"]
    """The place in its document up to which each query sees keys."""
    scatter: Int64[Tensor, " asked"]
    """For each asking token but those that fill the capacity, its place in the groups."""

    @classmethod
    def of(cls, asking: list[int], lengths: tuple[int, ...], index: Int64[Tensor, " C"]) -> "AskingPlan":
        """Plans a row of documents with these lengths, of which `asking` tokens each ask; they stand at `index`."""
        counts, totals = np.array(asking, dtype=np.int64), np.array(lengths, dtype=np.int64)
        query_starts, key_starts = np.cumsum(counts) - counts, np.cumsum(totals) - totals
        place = index.numpy()[: counts.sum()] - np.repeat(key_starts, counts)
        padded = -(-totals // LENGTH_STEP) * LENGTH_STEP
        groups, query_gather, key_gather, places, base = [], [], [], [], 0
        scatter = np.empty(int(counts.sum()), dtype=np.int64)
        for size in np.unique(padded[counts > 0]):
            members = np.flatnonzero((padded == size) & (counts > 0))
            most = int(counts[members].max())
            within_queries, within_keys = np.arange(most), np.arange(size)
            inside = within_queries < counts[members, None]
            queries = np.where(inside, query_starts[members, None] + within_queries, query_starts[members, None])
            scatter[queries[inside]] = base + np.flatnonzero(inside)
            # Keys behind a document's end stand at places that none of its queries sees.
            keys = np.where(within_keys < totals[members, None], key_starts[members, None] + within_keys, 0)
            groups.append((len(members), most, int(size)))
            query_gather.append(queries.ravel())
            key_gather.append(keys.ravel())
            places.append(place[queries].ravel())
            base += queries.size
        empty = np.empty(0, np.int64)
        joined = (torch.from_numpy(np.concatenate([empty, *part])) for part in (query_gather, key_gather, places))
        return cls(tuple(groups), next(joined), next(joined), next(joined), torch.from_numpy(scatter))

    @torch.compiler.disable
    def __call__(
        self,
        queries: Float[Tensor, "C H K"],
        keys: Float[Tensor, "T G K"],
        values: Float[Tensor, "T G K"],
    ) -> Float[Tensor, "C H K"]:
        """Causal attention of every asking token to the tokens of its own document up to itself."""
        kv_heads = keys.shape[1]
        asked = queries.index_select(0, self.query_gather)
        known = torch.cat((keys, values), dim=1).index_select(0, self.key_gather)
        outputs = []
        query_sizes = [documents * count for documents, count, _ in self.groups]
        key_sizes = [documents * length for documents, _, length in self.groups]
        for (documents, count, length), q, kv, place in zip(
            self.groups,
            asked.split(query_sizes),
            known.split(key_sizes),
            self.places.split(query_sizes),
            strict=True,
        ):
            q = q.unflatten(0, (documents, count)).transpose(1, 2)
            k, v = kv.unflatten(0, (documents, length)).transpose(1, 2).split(kv_heads, dim=1)
            seen = torch.arange(length) <= place.view(documents, 1, count, 1)
            attended = shared_attention(q, k, v, attn_mask=seen)
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        real = torch.cat([queries[:0], *outputs]).index_select(0, self.scatter)
        return torch.cat((real, torch.zeros_like(queries[len(real) :])))


@dataclass(frozen=True)
class MaskedAttention:
    """Attention under a mask of every query against every key: what it costs doesn't depend on the data."""

    seen: Bool[Tensor, "C S"]
    """Whether a query sees a key."""

    @classmethod
    def among(cls, document: Int64[Tensor, " C"]) -> "MaskedAttention":
        """Tokens of these documents, among themselves, in their order."""
        order = torch.arange(len(document), device=document.device)
        return cls((document[:, None] == document) & (order[:, None] >= order))

    @classmethod
    def asking(cls, index: Int64[Tensor, " C"], row: Int64[Tensor, " T"]) -> "MaskedAttention":
        """Tokens that stand at `index` of a row of the documents `row`, to all of that row."""
        order = torch.arange(len(row), device=row.device)
        return cls((row.index_select(0, index)[:, None] == row) & (index[:, None] >= order))

    def __call__(
        self,
        queries: Float[Tensor, "C H K"],
        keys: Float[Tensor, "S G K"],
        values: Float[Tensor, "S G K"],
    ) -> Float[Tensor, "C H K"]:
        """Attention of every query to the keys that it sees."""
        attended = shared_attention(
            queries.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=self.seen,
        )
        return attended[0].transpose(0, 1)


def shared_attention(
    queries: Float[Tensor, "B H Q K"],
    keys: Float[Tensor, "B G S K"],
    values: Float[Tensor, "B G S K"],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Float[Tensor, "B H Q K"]:
    """torch's scaled dot product, where several heads of queries may share one of keys and values."""
    shares = queries.shape[1] // keys.shape[1]
    if shares > 1 and queries.is_cuda and (attn_mask is not None or queries.dtype == torch.float32):
        # A GPU's kernel for masks and float32 knows no sharing: torch would take the slow way through all scores.
        keys, values = keys.repeat_interleave(shares, dim=1), values.repeat_interleave(shares, dim=1)
    return F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=attn_mask,
        is_causal=is_causal,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
