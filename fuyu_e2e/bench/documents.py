"""Documents of random pixels and words for benchmarks: captions, questions and text, with images of many sizes."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import IterableDataset

from fuyu_e2e.data.packing import PackedRow, Packer
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.sequence import TokenSequence
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.image_layout import ImageSpan

PATCH, NEWLINE, BOS, EOS, FIRST_WORD = 3, 4, 1, 2, 10
"""Token ids; all from `FIRST_WORD` on are words."""
SHAPES = ((1, 1), (3, 4), (4, 3), (2, 3), (3, 2), (9, 16), (16, 9))
"""Common height to width ratios of cameras and screens."""
KINDS = ("caption", "caption", "question", "question", "text")
"""Kinds of documents, in proportion to how often they are listed."""
LEARNT = {"caption": (12, 48), "question": (2, 24), "text": (32, 256)}
"""Range of supervised tokens of each kind, without the upper bound."""


def draw(
    rng: np.random.Generator,
    config: FuyuConfig,
    key: str,
    *,
    grid: tuple[int, int] | None,
    asked: int,
    supervised: int,
) -> TokenSequence:
    """Returns a document: an image of `grid` patches, `asked` question tokens and `supervised` tokens with loss."""
    rows, cols = grid or (0, 0)
    image = np.full((rows, cols + 1), PATCH)
    image[:, -1] = NEWLINE
    words = rng.integers(FIRST_WORD, config.vocab_size, asked + supervised - 1)
    tokens = np.concatenate((image.ravel(), [BOS], words, [EOS]))
    loss = np.zeros(len(tokens), dtype=bool)
    loss[-supervised:] = True
    return TokenSequence(
        key=key,
        tokens=tokens,
        loss=loss,
        patches=rng.integers(0, 256, (rows * cols, config.patch_values), dtype=np.uint8),
        images=(ImageSpan.of_grid(0, rows, cols),) if grid else (),
    )


def mixture(
    config: FuyuConfig, *, rows: int, budget: int, sides: tuple[int, int], seed: int = 0
) -> list[list[TokenSequence]]:
    """Returns the documents of packed rows: two captions and two questions for each text.

    Args:
        config: The configuration of the decoder that reads them.
        rows: Number of rows.
        budget: Tokens of a row.
        sides: Fewest and most patches along an image's longer side, uniformly distributed.
        seed: Seeds all draws.
    """
    rng = np.random.default_rng(seed)
    packer = Packer(budget, "skip", SampleStats())
    drawn = 0
    packed: list[list[TokenSequence]] = []
    while len(packed) < rows:
        kind = KINDS[drawn % len(KINDS)]
        height, width = SHAPES[rng.integers(len(SHAPES))]
        scale = rng.integers(*sides, endpoint=True) / max(height, width)
        grid = None if kind == "text" else (max(1, round(height * scale)), max(1, round(width * scale)))
        asked = int(rng.integers(8, 24)) if kind == "question" else 0
        supervised = int(rng.integers(*LEARNT[kind]))
        packer.add(draw(rng, config, str(drawn), grid=grid, asked=asked, supervised=supervised))
        drawn += 1
        if packer.full:
            packed.append(packer.fill_row())
    return packed


def histogram(lengths: Sequence[int]) -> dict[str, int]:
    """Returns the number of documents by length in tokens, in ranges of a factor of two."""
    counts = Counter(max(16, 1 << (length - 1).bit_length()) for length in lengths)
    return {f"up to {most}": counts[most] for most in sorted(counts)}


class Rows(IterableDataset):
    """Rows in memory, as a data set."""

    def __init__(self, rows: Sequence[PackedRow]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[PackedRow]:
        return iter(self.rows)
