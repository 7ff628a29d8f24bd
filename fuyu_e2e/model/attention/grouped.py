"""Attention within documents by torch's scaled dot product, on any device.

`GroupedRow`, for causal attention, sorts the documents of a row into groups of nearly equal length and pads within
a group. The padding follows the tokens of its document, where a causal token never looks, so no mask is built.

`TiledAttention`, for every other mask and for queries that differ from the keys, cuts documents into tiles of
queries, pairs each with the keys that the mask can show it, and groups tiles by their number of keys: a window costs
its own width, not the document's length.

Only the device knows how many tokens of each document a block selects. On the CPU, where reading that is free, the
selected tokens are planned like a row; on other devices `MaskedAttention` computes every pair of them, at the cost of
the square of the block's capacity, so that the host never waits.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fuyu_e2e.model.attention.interface import KEYS, QUERIES, Attend, Passing, Places, RowAttention, seen_by
from fuyu_e2e.model.attention.mask import CAUSAL, AttentionMask
from fuyu_e2e.model.device_copy import to_device

LENGTH_STEP = 16
"""Documents are padded to a multiple of this many tokens, which bounds the groups and so the kernel calls."""
TILE = 256
"""Queries of a tile, or half a window if that is more. Enough for an efficient product, few enough to skip most of
what the window hides; with fewer, keys would be copied more often."""

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels of a GPU, in order of preference, for the documents of a group. Without cuDNN's, torch's first choice on
Hopper: it takes seconds to plan each new shape."""


@dataclass(frozen=True)
class PlacedRow(RowAttention):
    """A row with known document positions, so that a selection of its tokens can attend under its mask."""

    mask: AttentionMask
    places: Places
    """The places of its tokens, on their device."""

    @torch.compiler.disable
    def select(self, passing: Passing) -> Attend:
        """Returns attention among the selected tokens; capacity filler forms one more document."""
        if passing.index.device.type == "cpu":
            return self._tiles(own := self.places.take(passing.index[passing.valid]), own)
        own = self.selected(passing)
        return MaskedAttention.of(self.mask, own, own)

    @torch.compiler.disable
    def cross(self, passing: Passing) -> Attend:
        """Returns attention of the selected tokens to the whole row."""
        if passing.index.device.type == "cpu":
            return self._tiles(self.places.take(passing.index[passing.valid]), self.places)
        return MaskedAttention.of(self.mask, self.places.take(passing.index), self.places)

    def selected(self, passing: Passing) -> Places:
        """Returns the places of the selected tokens; capacity filler gets document -1."""
        return self.places.take(passing.index)._replace(document=passing.documents(self.places.document, -1))

    def _tiles(self, queries: Places, keys: Places) -> "TiledAttention":
        return TiledAttention.of(self.mask, queries.numpy(), keys.numpy(), keys.document.device)


@dataclass(frozen=True)
class GroupedRow(PlacedRow):
    """Causal attention of a row, computed in groups of documents padded to the same length.

    One plan serves all blocks of a forward pass.
    """

    lengths: tuple[int, ...]
    """Tokens of each document."""
    groups: tuple[tuple[int, int], ...]
    """(documents, padded length) for each group."""
    gather: Int64[Tensor, " padded"]
    """For each slot of the groups, the token that fills it; padding repeats the first token of its document."""
    scatter: Int64[Tensor, " T"]
    """For each token, its slot in the groups."""

    @classmethod
    def of(cls, document_lengths: tuple[int, ...], device: torch.device) -> "GroupedRow":
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
        gathered, scattered, documents = index.split([base, len(scatter), len(document)])
        # A causal mask compares positions only, so positions in the row will do.
        order = Places(documents, torch.arange(len(document), device=device), None)
        return cls(CAUSAL, order, tuple(lengths.tolist()), tuple(groups), gathered, scattered)

    @torch.compiler.disable
    def __call__(
        self,
        queries: Float[Tensor, "T H K"],
        keys: Float[Tensor, "T G K"],
        values: Float[Tensor, "T G K"],
    ) -> Float[Tensor, "T H K"]:
        """Returns the attention of every token to the tokens of its document up to itself."""
        if not self.groups:  # a block selected no token of any document
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
    def select(self, passing: Passing) -> Attend:
        """Returns attention among the selected tokens."""
        if passing.index.device.type != "cpu":
            return super().select(passing)
        counts = torch.bincount(passing.documents(self.places.document, len(self.lengths)))
        return GroupedRow.of(tuple(counts.tolist()), passing.index.device)


@dataclass(frozen=True)
class TiledRow(PlacedRow):
    """A row under any mask."""

    plan: "TiledAttention"
    """Attention of all its tokens."""

    @classmethod
    def of(
        cls, mask: AttentionMask, lengths: tuple[int, ...], images: tuple[tuple[int, int], ...], device: torch.device
    ) -> "TiledRow":
        """Plans a row of documents with these lengths, laid end to end; `images` are the (start, stop) of each
        image."""
        places = Places.of(lengths, images)
        return cls(mask, places.on(device), TiledAttention.of(mask, places, places, device))

    def __call__(
        self,
        queries: Float[Tensor, "T H K"],
        keys: Float[Tensor, "T G K"],
        values: Float[Tensor, "T G K"],
    ) -> Float[Tensor, "T H K"]:
        """Returns the attention of every token to the tokens that the mask shows it."""
        return self.plan(queries, keys, values)


@dataclass(frozen=True)
class TiledAttention:
    """Attention of queries to keys under a mask, in tiles of queries; planned on the host."""

    groups: tuple[tuple[int, int, int], ...]
    """(tiles, padded queries, padded keys) for each group."""
    query_gather: Int64[Tensor, " padded_queries"]
    """For each query slot of the groups, the query that fills it."""
    key_gather: Int64[Tensor, " padded_keys"]
    """For each key slot of the groups, the key that fills it."""
    seen: tuple[Bool[Tensor, "_ _ _"], ...]
    """For each group, whether a query sees a key: (tiles, queries, keys)."""
    scatter: Int64[Tensor, " queries"]
    """For each query, its slot in the groups."""

    @classmethod
    def of(cls, mask: AttentionMask, queries: Places, keys: Places, device: torch.device) -> "TiledAttention":
        """Plans attention between tokens that are sorted by document and by position within.

        Args:
            mask: Which keys of its document a query sees.
            queries: Places of the tokens that attend; each is among the keys, too.
            keys: Places of the tokens that are attended to.
            device: The device that computes it.
        """
        tiles = _Tiles.of(mask, queries, keys)
        padded = -(-tiles.keys // LENGTH_STEP) * LENGTH_STEP
        groups, query_gather, key_gather, seen, base = [], [], [], [], 0
        scatter = np.empty(len(queries.document), dtype=np.int64)
        for size in np.unique(padded):
            of_size = tiles.take(np.flatnonzero(padded == size))
            within_queries, within_keys = np.arange(of_size.queries.max()), np.arange(size)
            inside = within_queries < of_size.queries[:, None]
            asked = of_size.first_query[:, None] + np.where(inside, within_queries, 0)
            scatter[asked[inside]] = base + np.flatnonzero(inside)
            near = of_size.first_key[:, None] + within_keys - of_size.sinks[:, None]
            shown = np.where(within_keys < of_size.sinks[:, None], of_size.first_sink[:, None] + within_keys, near)
            real = within_keys < of_size.keys[:, None]
            shown = np.where(real, shown, 0)
            own, others = queries.take(asked), keys.take(shown)
            # Padding keys of a tile belong to no document.
            others = others._replace(document=np.where(real, others.document, -1))
            seen.append(seen_by(mask, own.on(device).take(QUERIES), others.on(device).take(KEYS)))
            groups.append((len(asked), asked.shape[1], int(size)))
            query_gather.append(asked.ravel())
            key_gather.append(shown.ravel())
            base += asked.size
        empty = np.empty(0, np.int64)
        parts = [np.concatenate([empty, *gather]) for gather in (query_gather, key_gather)] + [scatter]
        index = to_device(torch.from_numpy(np.concatenate(parts)), device).split([len(part) for part in parts])
        return cls(tuple(groups), index[0], index[1], tuple(seen), index[2])

    @torch.compiler.disable
    def __call__(
        self,
        queries: Float[Tensor, "Q H K"],
        keys: Float[Tensor, "S G K"],
        values: Float[Tensor, "S G K"],
    ) -> Float[Tensor, "Q H K"]:
        """Returns the attention of every query; 0 for queries after the planned ones, which fill a capacity."""
        kv_heads = keys.shape[1]
        asked = queries.index_select(0, self.query_gather)
        known = torch.cat((keys, values), dim=1).index_select(0, self.key_gather)
        outputs = []
        query_sizes = [tiles * count for tiles, count, _ in self.groups]
        key_sizes = [tiles * length for tiles, _, length in self.groups]
        for (tiles, count, length), q, kv, seen in zip(
            self.groups, asked.split(query_sizes), known.split(key_sizes), self.seen, strict=True
        ):
            q = q.unflatten(0, (tiles, count)).transpose(1, 2)
            k, v = kv.unflatten(0, (tiles, length)).transpose(1, 2).split(kv_heads, dim=1)
            attended = shared_attention(q, k, v, attn_mask=seen[:, None])
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        planned = torch.cat([queries[:0], *outputs]).index_select(0, self.scatter)
        return torch.cat((planned, torch.zeros_like(queries[len(planned) :])))


class _Tiles(NamedTuple):
    """Tiles of queries, each of one document, and the keys that a mask can show them; int64 arrays of one length."""

    first_query: Any
    queries: Any
    """The number of queries."""
    first_sink: Any
    sinks: Any
    """Tokens from `first_sink` on that are seen besides those from `first_key` on."""
    first_key: Any
    keys: Any
    """The number of keys, sinks included."""

    @classmethod
    def of(cls, mask: AttentionMask, queries: Places, keys: Places) -> "_Tiles":
        _, starts, counts = np.unique(queries.document, return_index=True, return_counts=True)
        size = TILE if mask.window is None else max(TILE, mask.window // 2)
        tiles = -(-counts // size)
        number = np.arange(tiles.sum()) - np.repeat(np.cumsum(tiles) - tiles, tiles)
        first = np.repeat(starts, tiles) + number * size
        count = np.minimum(size, np.repeat(starts + counts, tiles) - first)
        document, last = queries.document[first], first + count - 1
        # One number to sort keys by: the document first, then the position in it.
        step = int(max(keys.position.max(initial=0), queries.position.max(initial=0))) + 2
        order = keys.document * step + keys.position

        def key_at(position: Any) -> Any:
            return np.searchsorted(order, document * step + position)

        begin = key_at(0 if mask.window is None else np.maximum(queries.position[first] - mask.window + 1, 0))
        end = key_at(queries.position[last] + 1)
        if mask.images == "bidirectional":
            image, inside = queries.image[last], np.flatnonzero(keys.image >= 0)
            ends = np.zeros(keys.image.max(initial=0) + 1, np.int64)
            ends[keys.image[inside]] = inside + 1  # the last token of an image wins
            end = np.maximum(end, np.where(image >= 0, ends[image], 0))
        first_sink = key_at(0)
        sinks = np.minimum(key_at(min(mask.sinks, step - 1)), begin) - first_sink
        return cls(first, count, first_sink, sinks, begin, end - begin + sinks)

    def take(self, index: Any) -> "_Tiles":
        return _Tiles(*(part[index] for part in self))


@dataclass(frozen=True)
class MaskedAttention:
    """Attention under a mask, computed for every pair of query and key: its cost doesn't depend on the data."""

    seen: Bool[Tensor, "Q S"]
    """Whether a query sees a key."""

    @classmethod
    def of(cls, mask: AttentionMask, queries: Places, keys: Places) -> "MaskedAttention":
        """Plans attention between tokens with these places on the device."""
        return cls(seen_by(mask, queries.take(QUERIES), keys.take(KEYS)))

    def __call__(
        self,
        queries: Float[Tensor, "Q H K"],
        keys: Float[Tensor, "S G K"],
        values: Float[Tensor, "S G K"],
    ) -> Float[Tensor, "Q H K"]:
        """Returns the attention of every query to the keys that it sees."""
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
    """Returns torch's scaled dot product attention; several query heads may share one key/value head."""
    shares = queries.shape[1] // keys.shape[1]
    if shares > 1 and queries.is_cuda and (attn_mask is not None or queries.dtype == torch.float32):
        # GPU kernels for masks and float32 can't share heads: torch would fall back to computing all scores.
        keys, values = keys.repeat_interleave(shares, dim=1), values.repeat_interleave(shares, dim=1)
    return F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=attn_mask,
        is_causal=is_causal,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
