"""The packed batch: what the decoder reads.

Documents lie end to end in one row of `T` tokens; attention never crosses from one to the next and positions
restart in each. Ten tokens, two documents: an image of one patch asked about and answered, and plain text.

    index        0         1      2    3      4     5     6      7    8    9
    token    |SPEAKER| |NEWLINE| <s>   q   <0x04>   7    </s>   <s>   a   </s>
    position     0         1      2    3      4     5     6      0    1    2
    target       -         -      -    -      7    </s>   -      a   </s>  -
    patch        0         -      -    -      -     -     -      -    -    -
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from fuyu_e2e.model.device_copy import to_device
from fuyu_e2e.model.image_layout import Grid, ImageSpan


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Sequences laid end to end under a fixed token budget.

    Only tensors move to the device. Lengths, numbers and grids stay on the host, so that planning attention and
    counting supervised tokens never wait for it.
    """

    tokens: Int64[Tensor, " T"]
    """Token ids; patch positions hold the placeholder's id, the padding at the end any valid id."""
    positions: Int64[Tensor, " T"]
    """Position in the document: 0, 1, 2, …"""
    patches: UInt8[Tensor, "P C"]
    """Raw pixels, flattened row, column, channel; normalised to [-1, 1] on the device."""
    patch_positions: Int64[Tensor, " N"]
    """Indices in `tokens` of the image embeddings; Fuyu's connector gives one for each patch."""
    target_positions: Int64[Tensor, " Y"]
    """The positions whose next token carries loss."""
    targets: Int64[Tensor, " Y"]
    """The id of that next token."""
    document_lengths: tuple[int, ...]
    """Tokens of each document, in order. The rest of `tokens` is padding."""
    newline_positions: Int64[Tensor, " L"] = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """Indices in `tokens` of the images' newline tokens."""
    images: tuple[ImageSpan, ...] = ()
    """Each image in this row, in the order of `patches`."""
    image_documents: tuple[int, ...] = ()
    """The number of each image's document in the row. An image that takes no tokens may lie between two documents."""
    document_ids: tuple[int, ...] = ()
    """The CRC of each document's sample key, below 2^32: the seed of random choices for the document."""

    @property
    def padding(self) -> int:
        """The number of tokens at the end that belong to no document."""
        return self.tokens.shape[0] - sum(self.document_lengths)

    @property
    def image_bounds(self) -> tuple[tuple[int, int], ...]:
        """The (start, stop) indices of each image in `tokens`."""
        return tuple((span.start, span.stop) for span in self.images)

    @property
    def target_documents(self) -> Int64[Tensor, " Y"]:
        """The number of the document of each supervised token."""
        ends = torch.tensor(self.document_lengths).cumsum(0)
        return torch.bucketize(self.target_positions, to_device(ends, self.tokens.device), right=True)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """(rows, columns) of each view of the images, in the order of `patches`."""
        return tuple(grid for span in self.images for grid in span.grids)

    def _apply(self, move: Any) -> "PackedBatch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: move(t) for name, t in tensors.items() if isinstance(t, Tensor)})

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "PackedBatch":
        """Returns the same batch with its tensors on `device`."""
        return self._apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        """Returns the same batch with its tensors in page-locked memory."""
        return self._apply(lambda tensor: tensor.pin_memory())
