"""Counts what became of every sample, so that no sample is lost silently."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fuyu_e2e.errors import UnusableSampleError


@dataclass
class SampleStats:
    """Counts of documents read and used, and of those skipped, by reason.

    Every `read` document is used, skipped or still waiting to be packed.
    """

    read: int = 0
    """Documents and unusable samples read from the shards."""
    used: int = 0
    """Documents that went into a packed row."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Skipped samples, by reason."""
    tokens_cut: int = 0
    """Tokens cut off documents longer than a row."""
    read_of: Counter[str] = field(default_factory=Counter)
    """For a mixture, documents read by source; empty for a single source."""
    used_of: Counter[str] = field(default_factory=Counter)
    """For a mixture, usable documents drawn by source."""
    tokens_of: Counter[str] = field(default_factory=Counter)
    """For a mixture, tokens of usable documents drawn by source."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first sample of each reason, in words."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts as primitives."""
        return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, counts: dict[str, Any]) -> "SampleStats":
        """Returns the stats that `to_dict` described."""
        stats = cls()
        for name, value in counts.items():
            setattr(stats, name, type(getattr(stats, name))(value))
        return stats

    def skip(self, error: UnusableSampleError, where: str | None = None) -> None:
        """Counts a skipped sample; `where` is its shard and key, for errors that don't contain them."""
        self.skipped[error.reason] += 1
        said = str(error)
        self.examples.setdefault(error.reason, said if where is None or where in said else f"{said} ({where})")

    def add(self, other: "SampleStats") -> None:
        """Adds the counts of `other`, from another stream or another time."""
        for name, count in vars(other).items():
            if name != "examples":
                setattr(self, name, getattr(self, name) + count)
        self.examples = other.examples | self.examples

    def take(self) -> "SampleStats":
        """Returns the counts so far and resets them."""
        taken = replace(self)
        vars(self).update(vars(SampleStats()))
        return taken

    @property
    def waiting(self) -> int:
        """Documents that are read but not yet packed."""
        return self.read - self.used - self.skipped.total()

    def summary(self) -> str:
        """Returns a line for logs: `1200 read, 1180 used, 20 skipped (image-truncated 12, caption-empty 8)`."""
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.skipped.most_common())
        skipped = f"{self.skipped.total():,} skipped" + (f" ({reasons})" if reasons else "")
        cut = f", {self.tokens_cut:,} tokens cut" if self.tokens_cut else ""
        return f"{self.read:,} read, {self.used:,} used, {skipped}{cut}"

    @property
    def summary_with_examples(self) -> str:
        """The summary, and the first skipped sample of each reason, for the sentence that ends a command."""
        return "; ".join([self.summary(), *skipped_first(self.examples)])


def skipped_first(examples: Mapping[str, str]) -> list[str]:
    """Returns a line for the first skipped sample of each reason."""
    return [f"skipped first: {example}" for example in examples.values()]
