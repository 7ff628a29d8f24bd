"""What a token sees of its document: the attention mask of a block."""

from dataclasses import dataclass
from typing import Any, Literal, get_args, no_type_check

from fuyu_e2e.errors import UserError

ImageAttention = Literal["causal", "bidirectional"]


@dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """Which keys a query sees: never of another document, and of its own no later one unless both are of one image.

    Backends, the cache and the count of operations ask nothing else. A mask of another kind is a subclass with `sees`
    of its own, which may narrow what the settings below say but not widen it: they tell which keys are computed and
    kept at all.

    Raises:
        UserError: A value is out of its range, or two contradict each other.
    """

    window: int | None = None
    """Tokens that a query sees at most, itself and those right before it (Beltagy et al. 2020, arXiv 2004.05150);
    None for all before it."""
    sinks: int = 0
    """First tokens of the document that are seen from everywhere, beside the window (Xiao et al. 2023,
    arXiv 2309.17453)."""
    images: ImageAttention = "causal"
    """Whether the tokens of one image see only those before them, or all of the image."""

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

    @no_type_check  # flex compiles it into its kernel, which no check of types may be part of
    def sees(self, query: Any, key: Any, same_image: Any) -> Any:
        """Whether a query sees a key of its own document.

        Args:
            query: Its position in the document; an int64 tensor, as the key's, of shapes that broadcast.
            key: The position of the key.
            same_image: Whether both are tokens of the same image, a bool tensor; False where that is known of all.

        Returns:
            A bool tensor. Every token sees itself.
        """
        seen = query >= key
        if self.window is not None:
            near = query - key < self.window
            seen = seen & ((near | (key < self.sinks)) if self.sinks else near)
        return seen | same_image if self.images == "bidirectional" else seen

    @property
    def room(self) -> int | None:
        """Tokens of a sequence that a cache has to hold; None for all."""
        return None if self.window is None else self.window + self.sinks

    def keys(self, tokens: int | float) -> int | float:
        """Keys that each query is counted with in a document of so many: a causal mask's other half counts, too."""
        return tokens if self.room is None else min(tokens, self.room)

    def check_images(self, tokens: int) -> None:
        """Refuses images of so many tokens, if they are to see each other through a smaller window.

        Raises:
            UserError: Names both sizes.
        """
        if self.images == "bidirectional" and self.window is not None and tokens > self.window:
            raise UserError(
                f"decoder.masks holds images 'bidirectional' with a window of {self.window}, but an image has up to "
                f"{tokens} tokens: set the window to {tokens} or more, or lower data.max_patches."
            )

    @property
    def reads_images(self) -> bool:
        """Whether `sees` may read `same_image`."""
        return self.images == "bidirectional" or type(self) is not AttentionMask


CAUSAL = AttentionMask()
"""All before it in its document."""
