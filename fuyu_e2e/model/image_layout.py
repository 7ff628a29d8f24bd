"""What becomes of an image on the host: which views of it are cut into patches, and what it takes in the sequence.

A view is the whole image at some size, or a crop of that. Fuyu's layout is one view, the image at the largest size
that the policy allows, and a newline token after each row of its patches. A design that wants another overrides a
method of `ImageLayout`.
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
    """Which images are used, and at which size.

    Raises:
        UserError: A limit that would refuse every image.
    """

    patch_size: int
    """Side of a patch in pixels."""
    max_patches: int = 1024
    """Patch budget of an image; a larger one is scaled down to it."""
    max_size: tuple[int, int] | None = None
    """Height and width in pixels, whole patches, that an image is scaled down to fit where it is larger, as in the
    released Fuyu; None sets no such limit. Where the budget holds every image that fits, transformers' Fuyu
    processor scales all images as this policy does."""
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
    """The width and height, in pixels, at which an image enters: its own, or the largest that the policy allows."""
    if policy.max_size is not None and (height > policy.max_size[0] or width > policy.max_size[1]):
        scale = min(policy.max_size[0] / height, policy.max_size[1] / width)
        width, height = max(1, int(width * scale)), max(1, int(height * scale))  # cut off, as transformers does
    if _patches(width, height, policy) <= policy.max_patches:
        return width, height
    # Whole patches jump as the scale grows, so the largest scale that fits is found by halving.
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
    """What one grid of patches shows of an image."""

    size: tuple[int, int]
    """Width and height in pixels that the whole image is scaled to."""
    crop: tuple[int, int, int, int] | None = None
    """Left, top, right and bottom in the scaled image; None for all of it."""


class ImageLayout:
    """The views of an image and its tokens: one view, with a newline token after each row of patches (Fuyu)."""

    def views(self, width: int, height: int, policy: ImagePolicy) -> tuple[View, ...]:
        """Returns the views of an image of `width` x `height` pixels, at least one."""
        return (View(fit_policy(width, height, policy)),)

    def tokens(self, grids: tuple[Grid, ...]) -> Bool[np.ndarray, " n"]:
        """Returns the tokens of an image with these grids, one for each view, in the order of the sequence.

        True is a newline token, False the place of an embedding; there may be none at all.
        """
        return np.frombuffer(b"".join(_with_newlines(*grid) for grid in grids), dtype=bool)


def _with_newlines(rows: int, cols: int) -> bytes:
    return (bytes(cols) + b"\1") * rows


FUYU_LAYOUT = ImageLayout()


def most_tokens(layout: ImageLayout, policy: ImagePolicy) -> int:
    """Tokens that an image has at most, by many shapes from the tallest to the widest that the policy lets in."""
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
    """Whether two layouts are known to be the same: equal, or both Fuyu's."""

    def is_fuyus(layout: ImageLayout) -> bool:
        return (type(layout).views, type(layout).tokens) == (ImageLayout.views, ImageLayout.tokens)

    return one == other or (is_fuyus(one) and is_fuyus(other))


@dataclass(frozen=True)
class ImageSpan:
    """Where one image stands in a sequence or row, and what of it."""

    start: int
    """Index of its first token; of the token behind it where it has none."""
    grids: tuple[Grid, ...]
    """Of each view."""
    layout: bytes
    """A byte for each of its tokens: 1 for a newline, 0 for the place of an embedding."""
    paddings: tuple[tuple[int, int], ...] = ()
    """Of each view the rows of pixels at the bottom, and columns at the right, that only fill up the last patches."""

    @classmethod
    def of_grid(cls, start: int, rows: int, cols: int, padding: tuple[int, int] = (0, 0)) -> "ImageSpan":
        """Returns the span of one view in Fuyu's layout."""
        return cls(start, ((rows, cols),), _with_newlines(rows, cols), (padding,))

    @property
    def stop(self) -> int:
        """Index of the token behind it."""
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
        """Patches of all its views."""
        return sum(rows * cols for rows, cols in self.grids)

    @property
    def places(self) -> int:
        """Embeddings that it has in the sequence."""
        return self.layout.count(0)

    @property
    def patch_positions(self) -> Int64[np.ndarray, " N"]:
        """The position of each embedding; of each patch, row by row, where embeddings follow patches one for one."""
        return self.start + np.flatnonzero(~self._newlines)

    @property
    def newline_positions(self) -> Int64[np.ndarray, " L"]:
        """The position of each newline token."""
        return self.start + np.flatnonzero(self._newlines)

    @property
    def _newlines(self) -> Bool[np.ndarray, " n"]:
        return np.frombuffer(self.layout, dtype=bool)
