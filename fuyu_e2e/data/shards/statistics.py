"""Statistics of documents in shards: sizes and shapes of images, lengths of texts, tokens.

A survey counts rounded values without storing them, so it stays small for any number of documents, and surveys of
parts add up exactly to the survey of the whole, in any order. A random sample would miss the few long documents that
matter most to the length of a row.
"""

import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as cached
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow
from rich import box
from rich.table import Table

from fuyu_e2e.data.document import Document, Image
from fuyu_e2e.data.progress_bar import Advance
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.data.shards.cache import ShardCache
from fuyu_e2e.data.shards.manifest import BYTES_PER_TOKEN, DocumentFacts, image_tokens
from fuyu_e2e.data.shards.parallel import map_shards
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.errors import UnusableSampleError, UserError, writing
from fuyu_e2e.model.image_layout import ImagePolicy

ROW_LENGTHS = (2_048, 8_192)
"""Common lengths of a packed row in tokens."""
STEPS = 256
"""Values are rounded to this fraction of the next power of two: 8 significant bits."""
BARS = 40
"""Approximate number of bars in a picture of lengths."""
CELLS = 4
"""Cells of the picture of resolutions for each doubling of a side."""
COLOR, MARK = "#3a6ea5", "#c8553d"
"""Colours of the counts and of the marks in a picture."""


class NoPlotsError(UserError):
    """matplotlib is not installed; the figures can still be printed."""


@dataclass
class Distribution:
    """How often each value occurs, for values of at least 0 rounded to 8 significant bits.

    Whole numbers up to 256 are exact, others off by at most 0.4 %. Ranks, and so percentiles, are exact apart from
    that. There are at most 128 counts for each doubling of the value.
    """

    counts: Counter[float] = field(default_factory=Counter)
    minimum: int | float = math.inf
    """The smallest value, exactly."""
    maximum: int | float = -math.inf
    """The largest value, exactly."""

    def record(self, value: int | float) -> None:
        """Counts one value."""
        mantissa, exponent = math.frexp(value)
        # Python's rounding to even would assign three whole numbers to even steps, and one to odd steps.
        self.counts[math.ldexp(math.floor(mantissa * STEPS + 0.5), exponent) / STEPS] += 1
        self.minimum, self.maximum = min(self.minimum, value), max(self.maximum, value)

    def add(self, other: "Distribution") -> None:
        """Adds the counts of another distribution."""
        self.counts.update(other.counts)
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)

    def percentile(self, percent: int) -> int | float:
        """Returns the smallest value that at least `percent` % of all values don't exceed; needs at least one
        value."""
        values, counts = list(self.counts), list(self.counts.values())
        found = float(np.percentile(values, percent, weights=counts, method="inverted_cdf"))
        return min(max(found, self.minimum), self.maximum)


@dataclass(frozen=True)
class TokenCount:
    """Counts the tokens of documents from the headers of their images."""

    images: ImagePolicy
    tokenizer: Tokenizer | None
    """None estimates text at `BYTES_PER_TOKEN`, without special tokens between texts."""

    def of(self, document: Document, facts: DocumentFacts) -> int:
        """Returns the tokens of a document: exactly those of `SequenceBuilder.build`, or an estimate without a
        tokenizer.

        Raises:
            UnusableSampleError: With a tokenizer: the text can't be used, or no token carries loss.
        """
        if self.tokenizer is None:
            return facts.tokens(self.images)
        in_images = sum(image_tokens(size, self.images) for size in facts.sizes)
        # An image only takes room, so an image of one patch replaces each.
        segments = tuple(_one_pixel() if isinstance(segment, Image) else segment for segment in document.segments)
        laid_out = SequenceBuilder(self.tokenizer, self.images).build(replace(document, segments=segments))
        return len(laid_out) + in_images - sum(span.stop - span.start for span in laid_out.images)


@dataclass(kw_only=True)
class Survey:
    """Statistics of the documents of some shards."""

    images: ImagePolicy
    """The image policy for counting tokens."""
    exact: bool
    """Whether tokens are counted by a tokenizer or estimated."""
    shards: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """Usable documents by kind (see `DocumentFacts`)."""
    unusable: Counter[str] = field(default_factory=Counter)
    """Unusable documents by reason, as far as can be seen without decoding images."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first of each reason, in words."""
    longer: Counter[int] = field(default_factory=Counter)
    """Usable documents with more tokens than each of `ROW_LENGTHS`."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Images by the logarithms of width and height, in `CELLS` for a doubling."""
    widths: Distribution = field(default_factory=Distribution)
    """Width of each image in pixels, as a person sees it."""
    heights: Distribution = field(default_factory=Distribution)
    """Height of each image in pixels, as a person sees it."""
    aspects: Distribution = field(default_factory=Distribution)
    """Width over height of each image."""
    text_bytes: Distribution = field(default_factory=Distribution)
    """UTF-8 bytes of each usable document, which mean about the same to a tokenizer in every script."""
    tokens: Distribution = field(default_factory=Distribution)
    """Tokens of each usable document."""

    def record(self, kind: str, sizes: Iterable[tuple[int, int]], text_bytes: int, tokens: int) -> None:
        """Counts a usable document."""
        self.kinds[kind] += 1
        self.text_bytes.record(text_bytes)
        self.tokens.record(tokens)
        for length in ROW_LENGTHS:
            self.longer[length] += tokens > length
        for width, height in sizes:
            self.widths.record(width)
            self.heights.record(height)
            self.aspects.record(width / height)
            self.sizes[round(CELLS * math.log2(width)), round(CELLS * math.log2(height))] += 1

    def add(self, other: "Survey") -> None:
        """Adds the statistics of other shards."""
        self.shards += other.shards
        self.examples = other.examples | self.examples
        for name in ("kinds", "unusable", "longer", "sizes"):
            getattr(self, name).update(getattr(other, name))
        for name in ("widths", "heights", "aspects", "text_bytes", "tokens"):
            getattr(self, name).add(getattr(other, name))

    def table(self) -> Table:
        """Returns a table of counts, and of percentiles of each quantity."""
        both = Table.grid()
        both.add_row(self._counts())
        both.add_row(self._percentiles())
        return both

    def draw(self, path: Path) -> None:
        """Writes a PNG of the distributions.

        Raises:
            NoPlotsError: matplotlib is not installed.
            UserError: The file can't be written.
        """
        try:
            from matplotlib.figure import Figure  # an extra: nothing but this picture needs it
            from matplotlib.layout_engine import ConstrainedLayoutEngine
        except ImportError as error:
            raise NoPlotsError(
                "Drawing the distributions needs matplotlib: install it with pip install 'fuyu-e2e[plots]'."
            ) from error
        figure = Figure(figsize=(12, 9), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
        figure.suptitle(self._title(), fontsize=13)
        sizes, aspects, texts, tokens = figure.subplots(2, 2).flat
        _draw_sizes(sizes, self.sizes)
        _draw_aspects(aspects, self.aspects)
        _draw_whole_numbers(texts, self.text_bytes)
        _draw_whole_numbers(tokens, self.tokens)
        sizes.set(title="Resolution of images", xlabel="width, pixels", ylabel="height, pixels")
        aspects.set(title="Aspect ratio of images", xlabel="width : height", ylabel="share of images")
        texts.set(title="Text of documents", xlabel="bytes of UTF-8", ylabel="share of documents")
        tokens.set(title=self._tokens_label("Tokens of documents"), ylabel="share of documents")
        tokens.set(xlabel=f"tokens, at patches of {self.images.patch_size} x {self.images.patch_size} pixels")
        self._mark_row_lengths(tokens)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=120, format="png")

    def _counts(self) -> Table:
        usable, unusable = self.kinds.total(), self.unusable.total()
        table = Table("", "number", "share", box=box.SIMPLE)
        _right_align(table)
        table.add_row("shards", f"{self.shards:,}")
        table.add_row("documents", f"{usable + unusable:,}")
        for reason, count in sorted(self.unusable.items()):
            table.add_row(f"  unusable: {reason}", f"{count:,}", _share(count, usable + unusable))
        table.add_row("  usable", f"{usable:,}", _share(usable, usable + unusable))
        for kind, count in sorted(self.kinds.items()):
            table.add_row(f"    {kind}", f"{count:,}", _share(count, usable))
        for length in ROW_LENGTHS:
            said = self._tokens_label(f"    more than {length:,} tokens")
            table.add_row(said, f"{self.longer[length]:,}", _share(self.longer[length], usable))
        table.add_row("images", f"{self.widths.counts.total():,}")
        return table

    def _percentiles(self) -> Table:
        table = Table("", "min", "5 %", "median", "95 %", "max", box=box.SIMPLE)
        table.caption, table.caption_justify = self._caption(), "left"
        _right_align(table)
        whole, ratio = "{:,.0f}", "{:.3g}"
        for label, values, form in (
            ("image width, pixels", self.widths, whole),
            ("image height, pixels", self.heights, whole),
            ("aspect ratio, width / height", self.aspects, ratio),
            ("text, bytes", self.text_bytes, whole),
            (self._tokens_label("tokens"), self.tokens, whole),
        ):
            if values.counts:
                between = map(values.percentile, (5, 50, 95))
                table.add_row(label, *map(form.format, (values.minimum, *between, values.maximum)))
            else:
                table.add_row(label, *["-"] * 5)
        return table

    def _caption(self) -> str:
        patches = f"patches of {self.images.patch_size} pixels, at most {self.images.max_patches:,} an image"
        text = "" if self.exact else f", {BYTES_PER_TOKEN} bytes of text a token"
        return f"Tokens: {patches}{text}. Percentiles are off by at most 0.4 %."

    def _tokens_label(self, name: str) -> str:
        return name if self.exact else f"{name}, estimated"

    def _title(self) -> str:
        counts = (self.kinds.total(), self.widths.counts.total(), self.shards, self.unusable.total())
        usable, images, shards, unusable = (f"{count:,}" for count in counts)
        return f"Shards: {shards}.  Documents: {usable} usable, {unusable} unusable.  Images: {images}."

    def _mark_row_lengths(self, axis: Any) -> None:
        if not self.tokens.counts:
            return
        low, high = axis.get_xlim()
        for length, style in zip(ROW_LENGTHS, ("--", ":"), strict=True):
            if low < length < high:
                said = f"{_share(self.longer[length], self.kinds.total())} longer than {length:,}"
                axis.axvline(length, color=MARK, linestyle=style, label=said)
        _add_legend(axis)


def survey(
    shards: Sequence[str],
    cache: ShardCache,
    tokenizer: Path | None,
    patch_size: int,
    max_patches: int,
    processes: int,
) -> Survey:
    """Reads shards whole and returns the statistics of their documents.

    Args:
        shards: Paths or URLs.
        cache: The cache for remote shards.
        tokenizer: A tokenizer to count tokens exactly; None estimates them.
        patch_size: Side of a patch in pixels.
        max_patches: Patch budget of an image.
        processes: Shards read at once; see `map_shards`.

    Raises:
        UserError: A shard or the tokenizer can't be read, or the image limits would refuse every image.
    """
    images = ImagePolicy(patch_size=patch_size, max_patches=max_patches)
    count = TokenCount(images, Tokenizer.from_file(tokenizer) if tokenizer else None)
    whole = Survey(images=images, exact=tokenizer is not None)
    one = partial(_survey_one, cache=cache, count=count)
    for part in map_shards(one, shards, processes, "Reading shards"):
        whole.add(part)
    return whole


def _survey_one(shard: str, advance: Advance, cache: ShardCache, count: TokenCount) -> Survey:
    found = Survey(images=count.images, exact=count.tokenizer is not None, shards=1)
    stats = SampleStats()
    for document in read_documents(cache.path(shard), stats, shard, advance):
        try:
            facts = DocumentFacts.of(document)
            tokens = count.of(document, facts)
        except UnusableSampleError as error:
            stats.skip(error)
            continue
        found.record(facts.kind, facts.sizes, facts.text_bytes, tokens)
    found.unusable, found.examples = stats.skipped, stats.examples
    return found


@cached
def _one_pixel() -> Image:
    file = io.BytesIO()
    Pillow.new("L", (1, 1)).save(file, "PNG")
    return Image(file.getvalue())


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %" if total else ""


def _right_align(table: Table) -> None:
    for column in table.columns[1:]:
        column.justify = "right"


def _draw_sizes(axis: Any, sizes: Counter[tuple[int, int]]) -> None:
    """Draws images by width and height, on logarithmic scales."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, NullLocator

    if not sizes:
        _draw_nothing(axis)
        return
    cells = np.array(list(sizes))
    # Leaves room for a doubling on every side, so that a single size is a spot and not a wall.
    low, high = int(cells.min()) - CELLS, int(cells.max()) + CELLS
    counts = np.zeros((high - low + 1, high - low + 1))
    counts[cells[:, 1] - low, cells[:, 0] - low] = list(sizes.values())
    edges = 2 ** ((np.arange(low, high + 2) - 0.5) / CELLS)
    shown = np.ma.masked_equal(counts, 0)
    norm = LogNorm(1, max(10, counts.max()))
    mesh = axis.pcolormesh(edges, edges, shown, norm=norm, cmap="viridis_r", edgecolor="white", linewidth=0.3)
    axis.plot(edges[[0, -1]], edges[[0, -1]], color="0.6", linewidth=0.8, linestyle="--")
    axis.set(xscale="log", yscale="log", aspect="equal", xlim=edges[[0, -1]], ylim=edges[[0, -1]])
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(LogLocator(2))
        one.set_major_formatter("{x:,.0f}")
        one.set_minor_locator(NullLocator())
    axis.tick_params(axis="x", rotation=45)
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.figure.colorbar(mesh, ax=axis, label="images", format="{x:,.0f}")


def _draw_aspects(axis: Any, aspects: Distribution) -> None:
    """Draws bars of equal ratios, one of them for squares."""
    from matplotlib.ticker import LogLocator, NullLocator

    if not aspects.counts:
        _draw_nothing(axis)
        return
    farthest = max(abs(math.log2(ratio)) for ratio in (aspects.minimum, aspects.maximum))
    bars = 6 if farthest > 3 else 12  # of each doubling
    reach = bars * max(2, math.ceil(farthest))
    edges = 2 ** ((np.arange(-reach, reach + 2) - 0.5) / bars)
    _draw_bars(axis, aspects, np.array(list(aspects.counts)), edges, _ratio)
    axis.xaxis.set_major_locator(LogLocator(4 if farthest > 3 else 2, numticks=20))
    axis.xaxis.set_major_formatter(lambda ratio, position: _ratio(ratio))
    axis.xaxis.set_minor_locator(NullLocator())


def _draw_whole_numbers(axis: Any, values: Distribution) -> None:
    """Draws bars that widen with the values, each over at least one whole number."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if not values.counts:
        _draw_nothing(axis)
        return
    # A logarithmic scale has no 0: documents without text count in the first bar.
    numbers = np.maximum(np.array(list(values.counts)), 1)
    low, high = int(numbers.min()), int(numbers.max())
    if high < 4 * low:  # room for at least two labelled ticks
        low, high = max(1, low // 3), high * 3
    growth = (high / low) ** (1 / BARS) - 1
    edges = [low]
    while edges[-1] <= high:
        edges.append(edges[-1] + max(1, round(edges[-1] * growth)))
    _draw_bars(axis, values, numbers, np.array(edges) - 0.5, "{:,.0f}".format)
    axis.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high < 1_000 * low else (1,)))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def _draw_bars(axis: Any, values: Distribution, numbers: np.ndarray, edges: np.ndarray, form: Any) -> None:
    percents = 100 * np.array(list(values.counts.values())) / values.counts.total()
    heights, _ = np.histogram(numbers, edges, weights=percents)
    axis.bar(edges[:-1], heights, np.diff(edges), align="edge", color=COLOR, edgecolor="white", linewidth=0.4)
    low, median, high = (max(values.percentile(percent), numbers.min()) for percent in (5, 50, 95))
    axis.axvspan(low, high, color=COLOR, alpha=0.1, zorder=0, label=f"5 % to 95 %: {form(low)} to {form(high)}")
    axis.axvline(median, color="black", linewidth=1.2, label=f"median: {form(median)}")
    axis.set(xscale="log", xlim=edges[[0, -1]], ylim=(0, 1.45 * heights.max()))  # with room for the legend
    axis.set_yticks([tick for tick in axis.get_yticks() if tick <= 100])
    axis.yaxis.set_major_formatter("{x:g} %")
    axis.spines[["top", "right"]].set_visible(False)
    _add_legend(axis)


def _add_legend(axis: Any) -> None:
    axis.legend(loc="upper right", fontsize=9, framealpha=1, edgecolor="white")


def _ratio(ratio: int | float) -> str:
    return f"{ratio:.3g}:1" if ratio >= 1 else f"1:{1 / ratio:.3g}"


def _draw_nothing(axis: Any) -> None:
    axis.text(0.5, 0.5, "none", ha="center", va="center", transform=axis.transAxes, color="0.5")
    axis.set(xticks=[], yticks=[])
