"""The plan of which row goes into which shard, and counts of what became of the rows."""

import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from fuyu_e2e.data.progress_bar import Advance
from fuyu_e2e.data.shards.extensions import is_media
from fuyu_e2e.data.shards.formats import is_text
from fuyu_e2e.data.shards.reading import BLOCK
from fuyu_e2e.data.shards.tables import Members, Pairs, Place, TextFiles
from fuyu_e2e.errors import UnusableSampleError, UserError

EXAMPLES = 20
"""Rows listed in the report for each reason."""
NAMED = 3
"""Rows named on the terminal for each reason."""
MEGABYTE = 10**6
"""Bytes of a megabyte."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How rows are distributed over shards.

    Raises:
        UserError: A value would leave no shard to train on, or none at all.
    """

    val_share: float = 0.01
    """Fraction of the rows that goes into `val` shards."""
    seed: int = 0
    """Seeds the choice of these rows."""
    shard_megabytes: float = 256.0
    """The most bytes of a shard's samples, in millions, unless a single sample is larger."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_share < 1:
            raise UserError(f"--val-share is {self.val_share}, but must be at least 0 and below 1.")
        if not self.shard_megabytes > 0:
            raise UserError(f"--shard-megabytes is {self.shard_megabytes}, but must be above 0.")

    def split(self, number: int) -> str:
        """Returns the split of a row, which depends only on its number and the seed."""
        digest = blake2b(f"{self.seed}/{number}".encode(), digest_size=8).digest()
        return "val" if int.from_bytes(digest, "big") < self.val_share * 2**64 else "train"


@dataclass(frozen=True)
class ShardPlan:
    """The rows of one shard."""

    split: str
    index: int
    """Number among the shards of its split."""
    numbers: np.ndarray
    """Row numbers, from 0, in stored order."""
    places: np.ndarray
    """Places of the rows in their source, for its reader."""

    @property
    def name(self) -> str:
        """The name of its files without extension."""
        return f"{self.split}-{self.index:05}"


@dataclass(frozen=True)
class Example:
    """A row that was skipped."""

    row: int
    """Its number in its file, from 0, without headers and blank lines."""
    file: str
    detail: str


@dataclass
class RowCounts:
    """Counts of what became of some rows: each is written or skipped."""

    written: int = 0
    bytes: int = 0
    """Bytes of the shards; 0 if no row was usable, for which no shard is written."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Skipped rows, by reason."""
    examples: dict[str, list[Example]] = field(default_factory=dict)
    """The first skipped rows of each reason."""

    def skip(self, error: UnusableSampleError, row: int, file: str) -> None:
        """Counts one skipped row."""
        self.skipped[error.reason] = self.skipped.get(error.reason, 0) + 1
        if len(shown := self.examples.setdefault(error.reason, [])) < EXAMPLES:
            shown.append(Example(row, file, str(error)))

    def add(self, other: "RowCounts") -> None:
        """Adds the counts of other rows."""
        self.written += other.written
        self.bytes += other.bytes
        for reason, count in other.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
        for reason, examples in other.examples.items():
            both = self.examples.get(reason, []) + examples
            self.examples[reason] = sorted(both, key=lambda example: example.row)[:EXAMPLES]

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "RowCounts":
        """Returns the counts that `asdict` described."""
        examples = {reason: [Example(**each) for each in listed] for reason, listed in stored["examples"].items()}
        return cls(stored["written"], stored["bytes"], stored["skipped"], examples)


@dataclass(frozen=True)
class WriteReport:
    """What became of the rows of a source: read = written + skipped."""

    kind: str
    """The kind that was detected."""
    read: int
    """Rows of the plan."""
    shards: dict[str, int]
    """Shards written, of each split."""
    splits: dict[str, RowCounts]

    @property
    def total(self) -> RowCounts:
        """The sum over both splits."""
        total = RowCounts()
        for outcome in self.splits.values():
            total.add(outcome)
        return total

    def summary(self) -> str:
        """Returns a line: `9 read, 8 written (7 in 2 train, 1 in 1 val shards), 1 skipped (image-missing 1)`."""
        total = self.total
        written = ", ".join(
            f"{self.splits[split].written:,} in {count:,} {split}" for split, count in self.shards.items()
        )
        reasons = ", ".join(
            f"{reason} {count:,}" for reason, count in sorted(total.skipped.items(), key=lambda item: -item[1])
        )
        skipped = f"{sum(total.skipped.values()):,} skipped" + (f" ({reasons})" if reasons else "")
        return f"{self.read:,} read, {total.written:,} written ({written} shards), {skipped}"

    def left_out(self) -> list[str]:
        """Returns for each reason, most frequent first, the first skipped rows: `image-unreadable 5 (a.png, b.png,
        …)`."""
        total, of_files = self.total, self.kind in (Pairs.__name__, TextFiles.__name__)
        said = []
        for reason, count in sorted(total.skipped.items(), key=lambda item: -item[1]):
            examples = total.examples[reason][:NAMED]
            names = [
                each.file if of_files or is_media(each.file) else f"row {each.row} of {each.file}" for each in examples
            ]
            said.append(f"{reason} {count:,} ({', '.join(names)}{', …' if count > NAMED else ''})")
        return said

    def to_json(self) -> dict[str, Any]:
        """Returns the content of report.json."""
        return {
            "kind": self.kind,
            "read": self.read,
            **asdict(self.total),
            "splits": {
                split: {"shards": count, "written": self.splits[split].written, "bytes": self.splits[split].bytes}
                for split, count in self.shards.items()
            },
        }


@dataclass(frozen=True)
class Plan:
    """The distribution of all rows over shards."""

    rows: int
    shards: list[ShardPlan]
    fingerprint: str
    """A hash of the content of all rows, and of the sizes and times of the files that they name."""


def plan_shards(rows: Iterable[tuple[Place, Callable[[], Members]]], settings: Settings, advance: Advance) -> Plan:
    limit = settings.shard_megabytes * MEGABYTE
    filling: dict[str, list[tuple[int, Place]]] = {"train": [], "val": []}
    sizes = dict.fromkeys(filling, 0)
    closed: dict[str, list[ShardPlan]] = {split: [] for split in filling}
    fingerprint = blake2b(digest_size=16)
    number = 0

    def close(split: str) -> None:
        numbers, places = zip(*filling[split], strict=True)
        closed[split].append(ShardPlan(split, len(closed[split]), np.array(numbers), np.array(places)))
        filling[split], sizes[split] = [], 0

    for place, make in rows:
        advance(1.0)
        size, stamp = _weigh(make)
        fingerprint.update(stamp)
        split = settings.split(number)
        # A usable row takes at least two blocks; counted for unusable ones too, very many of them also fill a shard.
        if filling[split] and max(sizes[split] + size, 2 * BLOCK * len(filling[split])) > limit:
            close(split)
        filling[split].append((number, place))
        sizes[split] += size
        number += 1
    for split in filling:
        if filling[split]:
            close(split)
    return Plan(number, [shard for shards in closed.values() for shard in shards], fingerprint.hexdigest())


def _weigh(make: Callable[[], Members]) -> tuple[int, bytes]:
    """Returns the bytes that a row takes in a shard, and a stamp that changes whenever the row does."""
    size, stamp = 0, []
    try:
        for name, content in make().items():
            if isinstance(content, bytes):
                length, said = len(content), content if is_text(name) else blake2b(content, digest_size=16).digest()
            else:
                found = stat_of(name, content)
                length, said = found.st_size, f"{found.st_size} {found.st_mtime_ns}".encode()
            size += tar_bytes(length)
            stamp.append((name, said))
    except UnusableSampleError as error:
        return 0, repr(error.reason).encode()
    return size, repr(stamp).encode()


def tar_bytes(length: int) -> int:
    """Returns the bytes of a member in a tar: a header, and whole blocks."""
    return BLOCK + -(-length // BLOCK) * BLOCK


def stat_of(name: str, path: Path) -> os.stat_result:
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise UnusableSampleError(
            f"{kind_of(name)}-missing", f"{path}: {getattr(error, 'strerror', error)}"
        ) from error
    if not stat.S_ISREG(found.st_mode):  # reading a pipe or a device might never end
        raise UnusableSampleError(f"{kind_of(name)}-no-file", str(path))
    return found


def kind_of(name: str) -> str:
    return "text" if name == "txt" else "image"
