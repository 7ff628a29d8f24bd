"""Image layout, decided on the host: the views of an image that are cut into patches, and its tokens in the sequence.

A view is the whole image at some size, or a crop of it. Fuyu's layout has one view, the image at the largest size
that the policy allows, and a newline token after each row of patches. Another design overrides a method of
`ImageLayout`.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from fuyu_e2e.errors import UserError

Grid = tuple[int, int]
"""Rows and columns of patches."""


@dataclass(frozen=True, kw_only=True)
class ImagePolicy:
    """Which images are used, and at what size.

    Raises:
        UserError: A limit would refuse every image.
    """

    patch_size: int
    """Side of a patch in pixels."""
    max_patches: int = 1024
    """Patch budget of an image; a larger one is scaled down to it."""
    max_size: tuple[int, int] | None = None
    """Height and width in pixels, multiples of the patch size; a larger image is scaled down to fit, as in the
    released Fuyu. None for no limit. If the budget holds every image that fits, transformers' Fuyu processor
    scales all images to the same sizes."""
    max_pixels: int = 2**26
    """Pixels of an image, as its header says, above which it is not decoded: 64 megapixels."""
    max_bytes: int = 2**25
    """Bytes of an image file above which it is not opened: 32 MiB."""
    max_aspect: float = 200.0
    """Longer side over shorter above which an image is left out."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "max_patches", "max_pixels", "max_bytes", "max_aspect"):
            if not (value := getattr(self, name)) >= 1:  # also when it is not a number
                raise UserError(f"{name} is {value}, but must be at least 1.")
        if self.max_size is not None and any(side < 1 or side % self.patch_size for side in self.max_size):
            raise UserError(
                f"max_size is {list(self.max_size)}, but must be two multiples of the patch size {self.patch_size}."
            )


def fit_policy(width: int, height: int, policy: ImagePolicy) -> tuple[int, int]:
    """Returns the (width, height) in pixels at which an image is read: its own, or the largest that the policy
    allows."""
    if policy.max_size is not None and (height > policy.max_size[0] or width > policy.max_size[1]):
        scale = min(policy.max_size[0] / height, policy.max_size[1] / width)
        width, height = max(1, int(width * scale)), max(1, int(height * scale))  # truncated, as in transformers
    if _patches(width, height, policy) <= policy.max_patches:
        return width, height
    # The patch count is a step function of the scale, so bisection finds the largest scale that fits.
    low, high = 0.0, 1.0
    for _ in range(32):
        scale = (low + high) / 2
        if _patches(*_scaled(width, height, scale), policy) <= policy.max_patches:
            low = scale
        else:
            high = scale
    return _scaled(width, height, low)


def _patches(width: int, height: int, policy: ImagePolicy) -> int:
    return math.ceil(width / policy.patch_size) * math.ceil(height / policy.patch_size)


def _scaled(width: int, height: int, scale: float) -> tuple[int, int]:
    return max(1, round(width * scale)), max(1, round(height * scale))


@dataclass(frozen=True)
class View:
    """The part of an image that one grid of patches shows."""

    size: tuple[int, int]
    """(width, height) in pixels that the whole image is scaled to."""
    crop: tuple[int, int, int, int] | None = None
    """Left, top, right and bottom in the scaled image; None for all of it."""


class ImageLayout:
    """The views of an image and its tokens: one view, with a newline token after each row of patches (Fuyu)."""

    def views(self, width: int, height: int, policy: ImagePolicy) -> tuple[View, ...]:
        """Returns the views of an image of `width` x `height` pixels, at least one."""
        return (View(fit_policy(width, height, policy)),)

    def tokens(self, grids: tuple[Grid, ...]) -> Bool[np.ndarray, " n"]:
        """Returns the tokens of an image in the order of the sequence.

        Args:
            grids: (rows, columns) of each of its views.

        Returns:
            True for a newline token, False for an embedding; may be empty.
        """
        return np.frombuffer(b"".join(_with_newlines(*grid) for grid in grids), dtype=bool)


def _with_newlines(rows: int, cols: int) -> bytes:
    return (bytes(cols) + b"\1") * rows


FUYU_LAYOUT = ImageLayout()


def most_tokens(layout: ImageLayout, policy: ImagePolicy) -> int:
    """Returns the most tokens that an image takes, tried on 65 shapes from the tallest to the widest that is
    allowed."""
    most = 0
    for step in range(65):
        aspect = policy.max_aspect ** (step / 32 - 1)
        width, height = (max(1, int((policy.max_pixels * times) ** 0.5)) for times in (aspect, 1 / aspect))
        crops = (view.crop or (0, 0, *view.size) for view in layout.views(width, height, policy))
        grids = [
            (math.ceil((bottom - top) / policy.patch_size), math.ceil((right - left) / policy.patch_size))
            for left, top, right, bottom in crops
        ]
        most = max(most, len(layout.tokens(tuple(grids))))
    return most


def same_layout(one: ImageLayout, other: ImageLayout) -> bool:
    """Returns whether two layouts are known to be the same: equal, or both Fuyu's."""

    def is_fuyus(layout: ImageLayout) -> bool:
        return (type(layout).views, type(layout).tokens) == (ImageLayout.views, ImageLayout.tokens)

    return one == other or (is_fuyus(one) and is_fuyus(other))


@dataclass(frozen=True)
class ImageSpan:
    """The place of one image in a sequence or row, and its layout."""

    start: int
    """Index of its first token; of the next token if it has none."""
    grids: tuple[Grid, ...]
    """(rows, columns) of each view."""
    layout: bytes
    """One byte for each of its tokens: 1 for a newline, 0 for an embedding."""
    paddings: tuple[tuple[int, int], ...] = ()
    """For each view, the rows of pixels at the bottom and the columns at the right that only pad the last patches."""

    @classmethod
    def of_grid(cls, start: int, rows: int, cols: int, padding: tuple[int, int] = (0, 0)) -> "ImageSpan":
        """Returns the span of one view in Fuyu's layout."""
        return cls(start, ((rows, cols),), _with_newlines(rows, cols), (padding,))

    @property
    def stop(self) -> int:
        """Index of the next token after it."""
        return self.start + len(self.layout)

    @property
    def rows(self) -> int:
        """Rows of patches of its first view."""
        return self.grids[0][0]

    @property
    def cols(self) -> int:
        """Columns of patches of its first view."""
        return self.grids[0][1]

    @property
    def patches(self) -> int:
        """The number of patches in all its views."""
        return sum(rows * cols for rows, cols in self.grids)

    @property
    def places(self) -> int:
        """The number of its embeddings in the sequence."""
        return self.layout.count(0)

    @property
    def patch_positions(self) -> Int64[np.ndarray, " N"]:
        """The position of each embedding; if there is one for each patch, of each patch row by row."""
        return self.start + np.flatnonzero(~self._newlines)

    @property
    def newline_positions(self) -> Int64[np.ndarray, " L"]:
        """The position of each newline token."""
        return self.start + np.flatnonzero(self._newlines)

    @property
    def _newlines(self) -> Bool[np.ndarray, " n"]:
        return np.frombuffer(self.layout, dtype=bool)
