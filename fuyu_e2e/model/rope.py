"""Rotary positions: along the sequence, or along rows and columns of images."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fuyu_e2e.model.image_layout import ImageSpan

Rope = tuple[Float[Tensor, "T 1 R"], Float[Tensor, "T 1 R"]]
"""Cosines and sines of the rotary embedding, float32; the second half of R repeats the first."""


def rotary(positions: Int64[Tensor, " T"] | Int64[Tensor, "2 T"], size: int, theta: float) -> Rope:
    """Returns cosines and sines of the rotary embedding (Su et al. 2021, arXiv 2104.09864) in the rotate-half layout.

    Always float32: bfloat16 can't tell neighbouring positions of a long document apart.

    Args:
        positions: One position for each token, or a row and a column. Frequencies alternate between row and column
            from the highest down, so that both get high and low ones. A token whose row equals its column gets the
            same angles as in one dimension.
        size: Values of a head that are turned (R).
        theta: Base of the wavelengths.
    """
    # Few and simple operations: on a CPU, the overhead of each call shows in a decoding step.
    exponent = torch.arange(0, -size, -2, device=positions.device, dtype=torch.float32) / size
    angles = positions.unsqueeze(-1).float() * torch.pow(theta, exponent)
    if positions.ndim == 2:
        angles = torch.where(torch.arange(size // 2, device=positions.device) % 2 == 0, angles[0], angles[1])
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "T heads K"], cos: Float[Tensor, "T 1 R"], sin: Float[Tensor, "T 1 R"]
) -> Float[Tensor, "T heads K"]:
    """Returns `x` with the pairs (r, r + R/2) of each head's first R values turned by the token's angles."""
    if (size := cos.shape[-1]) < x.shape[-1]:
        return torch.cat((rotate(x[..., :size], cos, sin), x[..., size:]), dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def grid_positions(lengths: tuple[int, ...], images: tuple[ImageSpan, ...]) -> Int64[np.ndarray, "2 T"]:
    """Returns the row and the column of each token of a packed row, counted as in Qwen2-VL (Wang et al. 2024,
    arXiv 2409.12191, section 2.1) in two dimensions.

    A text token has the same number in both, one more than the token before. An image starts at such a number: its
    patches count on down and across, and the newline of a row is one more column. The token after the image
    continues after its longer side.

    Args:
        lengths: Tokens of each document, laid end to end.
        images: Their spans, in order; each has one embedding for each patch.
    """
    counts = np.array(lengths, np.int64)
    ends = np.cumsum(counts)
    found = np.tile(np.arange(counts.sum()) - np.repeat(ends - counts, counts), (2, 1))
    for span in images:
        inside, extent = _within(span)
        end = ends[np.searchsorted(ends, span.start, side="right")]
        found[:, span.start : span.stop] = found[0, span.start] + inside
        found[:, span.stop : end] += extent - inside.shape[1]
    return found


def following_positions(lengths: tuple[int, ...], images: tuple[ImageSpan, ...]) -> Int64[np.ndarray, " B"]:
    """Returns the number, both row and column, of the token that would follow each document of such a row.

    The last token alone doesn't determine it: an image may end there, in any layout of its connector.
    """
    ends, longer = np.cumsum(lengths), tuple(length + 1 for length in lengths)
    before = [int(np.searchsorted(ends, span.start, side="right")) for span in images]
    moved = tuple(replace(span, start=span.start + count) for span, count in zip(images, before, strict=True))
    return grid_positions(longer, moved)[0, np.cumsum(longer) - 1]


def _within(span: ImageSpan) -> tuple[Int64[np.ndarray, "2 n"], int]:
    """Returns the row and column of each token of an image, its views stacked, and the number that follows them."""
    places, below = [], 0
    for rows, cols in span.grids:
        places.append(below + np.indices((rows, cols)).reshape(2, -1))
        below += max(rows, cols + 1)
    newline = np.frombuffer(span.layout, dtype=bool)
    patch = np.maximum(np.cumsum(~newline) - 1, 0)
    inside = np.concatenate(places, axis=1)[:, patch]
    inside[1] += newline
    return inside, below
