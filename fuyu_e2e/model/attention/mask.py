"""The attention mask of a block: what a token sees of its document."""

from dataclasses import dataclass
from typing import Any, Literal, get_args, no_type_check

import torch

from fuyu_e2e.errors import UserError

LEAST_CHECKED, MOST_CHECKED = 32, 256
"""Positions at which `check_sees` looks."""
ImageAttention = Literal["causal", "bidirectional"]


@dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """Which keys a query sees: none of another document, and no later one unless both belong to the same image.

    Backends, the cache and the FLOP count ask only this class. A subclass with its own `sees` makes another mask. It
    may narrow what the settings below allow but not widen it, since they decide which keys are computed and kept.

    Raises:
        UserError: A value is out of its range, or two contradict each other.
    """

    window: int | None = None
    """The most tokens that a query sees, counting itself and those right before it (Beltagy et al. 2020, arXiv
    2004.05150); None for all before it."""
    sinks: int = 0
    """First tokens of the document that every query sees besides the window (Xiao et al. 2023, arXiv 2309.17453)."""
    images: ImageAttention = "causal"
    """Whether a token of an image sees only earlier tokens of it, or the whole image."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise UserError(
                f"decoder.masks holds a window of {self.window}, but a token sees itself at least: set 1 or more."
            )
        if self.sinks < 0:
            raise UserError(f"decoder.masks holds {self.sinks} sinks, but it must be 0 or more.")
        if self.sinks and self.window is None:
            raise UserError(
                f"decoder.masks holds {self.sinks} sinks without a window, where every token is seen anyway: set a "
                "window beside them, or leave sinks out."
            )
        if self.images not in get_args(ImageAttention):
            raise UserError(f"decoder.masks holds images {self.images!r}, but must be 'causal' or 'bidirectional'.")

    @no_type_check  # flex compiles it into its kernel, where runtime type checks can't run
    def sees(self, query: Any, key: Any, same_image: Any) -> Any:
        """Returns whether a query sees a key of its own document.

        Args:
            query: The query's position in the document, an int64 tensor that broadcasts with the key's.
            key: The key's position.
            same_image: Whether both are tokens of the same image, a bool tensor; False if they never are.

        Returns:
            A bool tensor. Every token must see itself.
        """
        seen = query >= key
        if self.window is not None:
            near = query - key < self.window
            seen = seen & ((near | (key < self.sinks)) if self.sinks else near)
        return seen | same_image if self.images == "bidirectional" else seen

    def check_sees(self) -> None:
        """Refuses a subclass whose `sees` breaks what backends and the cache rely on.

        Raises:
            UserError: It is not overridden, returns no bool tensor, hides a token from itself, or shows a key that
                the settings hide.
        """
        if type(self) is AttentionMask:
            return
        name = f"{type(self).__name__} in decoder.masks"
        if type(self).sees is AttentionMask.sees:
            raise UserError(f"{name} has no method `sees` of its own: define it, or use AttentionMask.")
        position = torch.arange(min(MOST_CHECKED, 2 * (self.cache_slots or 0) + LEAST_CHECKED))
        query, key = position[:, None], position[None, :]
        for same_image in (torch.tensor(False), torch.tensor(True)):
            seen = self.sees(query, key, same_image)
            shape = torch.broadcast_shapes(query.shape, key.shape)
            if not isinstance(seen, torch.Tensor) or seen.dtype != torch.bool or seen.shape != shape:
                raise UserError(
                    f"{name}: `sees` must return a bool tensor of the shape to which query and key broadcast, not "
                    f"{getattr(seen, 'dtype', type(seen).__name__)} {list(getattr(seen, 'shape', []))}."
                )
            if not seen.diagonal().all():
                raise UserError(f"{name} hides a token from itself: let `sees` be true where query == key.")
            if (leaks := seen & ~AttentionMask.sees(self, query, key, same_image)).any():
                at, shown = leaks.nonzero()[0].tolist()
                raise UserError(
                    f"{name} shows position {shown} to position {at}, which its window, sinks and images hide: narrow "
                    "super().sees(...) with `&`, or change these settings."
                )

    @property
    def cache_slots(self) -> int | None:
        """Tokens of a sequence that a cache has to hold; None for all."""
        return None if self.window is None else self.window + self.sinks

    def keys_per_query(self, tokens: int | float) -> int | float:
        """Returns the keys that count for each query in a document of `tokens`; the half that a causal mask hides is
        not subtracted."""
        return tokens if self.cache_slots is None else min(tokens, self.cache_slots)

    def check_images(self, tokens: int) -> None:
        """Refuses images of `tokens` tokens that would have to see each other through a smaller window.

        Raises:
            UserError: The images are bidirectional and larger than the window.
        """
        if self.images == "bidirectional" and self.window is not None and tokens > self.window:
            raise UserError(
                f"decoder.masks holds images 'bidirectional' with a window of {self.window}, but an image has up to "
                f"{tokens} tokens: set the window to {tokens} or more, or lower data.max_patches."
            )

    @property
    def needs_image_ids(self) -> bool:
        """Whether `sees` may read `same_image`."""
        return self.images == "bidirectional" or type(self) is not AttentionMask


CAUSAL = AttentionMask()
"""A token sees itself and all before it in its document."""
