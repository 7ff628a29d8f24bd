"""The exact cost of a decoder: parameters, and floating-point operations of a row."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import meta_decoder
from fuyu_e2e.model.flops import CountedRow, Counts, Flops, Operations
from fuyu_e2e.model.image_layout import Grid


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one row of tokens; a multiply-add is two operations, and only matrix products count."""

    parameters: int
    """Trained values, counting a tied embedding once."""
    tokens: int
    """Tokens of the row."""
    forward_flops: int
    """Operations of the forward pass."""
    training_flops: int
    """Operations of the forward and backward pass, without recomputation."""

    @property
    def training_flops_per_token(self) -> float:
        """The mean over the row's tokens."""
        return self.training_flops / self.tokens


def cost(
    config: FuyuConfig,
    *,
    document_lengths: tuple[int, ...],
    grids: Sequence[Grid],
    targets: int,
    passing: Sequence[Counts] | None = None,
    done: float | None = 1.0,
) -> Cost:
    """Returns the cost of a row of documents with images and `targets` supervised tokens.

    Blocks and the connector count themselves (`Block.operations`, `Connector.flops`). The output projection counts
    only at supervised tokens, where it is computed. A block that selects tokens counts the selected ones, not the
    filler of its capacity.

    Args:
        config: The decoder's configuration.
        document_lengths: Tokens of each document.
        grids: (rows, columns) of each view of its images, in patches.
        targets: Supervised tokens of the row.
        passing: For each block that selects tokens, passing tokens of each document; None for the configured shares.
        done: The completed fraction of a training, since blocks may compute more at first; None for the mean over all
            of it. Only used if `passing` is None.
    """
    by_block = {} if passing is None else dict(zip(meta_decoder(config).selecting, passing, strict=True))
    patches = sum(rows * cols for rows, cols in grids)
    row = CountedRow(lengths=document_lengths, patches=patches, passing=by_block, done=done)
    flops = _flops(config, row, targets).plus(meta_decoder(config).patch_projection.flops(grids))
    return Cost(
        parameters=_counted(config)[0],
        tokens=sum(document_lengths),
        forward_flops=round(flops.forward),
        training_flops=round(flops.training),
    )


def batch_cost(
    config: FuyuConfig, batch: PackedBatch, *, passing: Sequence[Counts] | None = None, done: float | None = 1.0
) -> Cost:
    """Returns the cost of a packed batch; for the other arguments, see `cost`."""
    return cost(
        config,
        document_lengths=batch.document_lengths,
        grids=batch.grids,
        targets=len(batch.targets),
        passing=passing,
        done=done,
    )


def decode_step_flops(config: FuyuConfig, keys: Counts) -> int:
    """Returns the operations of one more token in each sequence, each seeing `keys` keys including its own.

    The decoder must not have blocks that select tokens.
    """
    assert not meta_decoder(config).selecting
    row = CountedRow(lengths=(1,) * len(keys), cached=[seen - 1 for seen in keys])
    return round(_flops(config, row, targets=len(keys)).forward)


@lru_cache
def _counted(config: FuyuConfig) -> tuple[int, Flops, dict[Operations, int]]:
    """Returns the parameters, the operations of a supervised token, and how many blocks have which operations."""
    decoder = meta_decoder(config)
    parameters = sum(weight.numel() for weight in decoder.parameters())
    target = Flops(decoder.lm_head.weight.numel())
    return parameters, target, Counter(block.operations() for block in decoder.each_block())


def _flops(config: FuyuConfig, row: CountedRow, targets: int) -> Flops:
    """Returns the operations of the blocks and of the output projection."""
    _, target, blocks = _counted(config)
    flops = Flops()
    for operations, times in blocks.items():
        flops = flops.plus(operations(row), times)
    return flops.plus(target, targets)
