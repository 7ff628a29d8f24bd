"""Which row goes into which shard, and what became of it."""

import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from fuyu_e2e.data.progress_bar import Advance
from fuyu_e2e.data.shards.extensions import TEXTS, is_media, last_extension
from fuyu_e2e.data.shards.reading import BLOCK
from fuyu_e2e.data.shards.tables import Members, Pairs, Place, TextFiles
from fuyu_e2e.errors import UnusableSampleError, UserError

EXAMPLES = 20
"""Rows shown in the report for each reason."""
NAMED = 3
"""Rows named on the terminal for each reason."""
MEGABYTE = 10**6
"""Bytes of a megabyte."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How rows are dealt out to shards.

    Raises:
        UserError: A value that would leave no shard to train on, or none at all.
    """

    val_share: float = 0.01
    """Share of the rows that goes into `val` shards."""
    seed: int = 0
    """Seeds which rows these are."""
    shard_megabytes: float = 256.0
    """Bytes of a shard's samples at most, unless a single one is larger, in millions."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_share < 1:
            raise UserError(f"--val-share is {self.val_share}, but must be at least 0 and below 1.")
        if not self.shard_megabytes > 0:
            raise UserError(f"--shard-megabytes is {self.shard_megabytes}, but must be above 0.")

    def split(self, number: int) -> str:
        """Returns the split of a row: the same in every order and number of rows."""
        digest = blake2b(f"{self.seed}/{number}".encode(), digest_size=8).digest()
        return "val" if int.from_bytes(digest, "big") < self.val_share * 2**64 else "train"


@dataclass(frozen=True)
class ShardPlan:
    """Which rows go into a shard."""

    split: str
    index: int
    """Number among the shards of its split."""
    numbers: np.ndarray
    """Row numbers, from 0, in stored order."""
    places: np.ndarray
    """Where the rows are in their source, for its reader."""

    @property
    def name(self) -> str:
        """The name of its files, without extension."""
        return f"{self.split}-{self.index:05}"


@dataclass(frozen=True)
class Example:
    """A row that was skipped."""

    row: int
    """Its number in its file, from 0; headers and blank lines don't count."""
    file: str
    detail: str


@dataclass
class RowCounts:
    """What became of some rows: every one is written or skipped."""

    written: int = 0
    bytes: int = 0
    """Of the shards; 0 where no row was usable, for which no shard is written."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""
    examples: dict[str, list[Example]] = field(default_factory=dict)
    """The first rows left out for each reason."""

    def skip(self, error: UnusableSampleError, row: int, file: str) -> None:
        """Counts one row that is left out."""
        self.skipped[error.reason] = self.skipped.get(error.reason, 0) + 1
        if len(shown := self.examples.setdefault(error.reason, [])) < EXAMPLES:
            shown.append(Example(row, file, str(error)))

    def add(self, other: "RowCounts") -> None:
        """Adds what became of other rows."""
        self.written += other.written
        self.bytes += other.bytes
        for reason, count in other.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
        for reason, examples in other.examples.items():
            both = self.examples.get(reason, []) + examples
            self.examples[reason] = sorted(both, key=lambda example: example.row)[:EXAMPLES]

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "RowCounts":
        """Returns what `asdict` made of one."""
        examples = {reason: [Example(**each) for each in listed] for reason, listed in stored["examples"].items()}
        return cls(stored["written"], stored["bytes"], stored["skipped"], examples)


@dataclass(frozen=True)
class WriteReport:
    """What became of a source: read = written + skipped."""

    kind: str
    """What it was taken for."""
    read: int
    """Rows of the plan."""
    shards: dict[str, int]
    """Shards written, of each split."""
    splits: dict[str, RowCounts]

    @property
    def total(self) -> RowCounts:
        """Over both splits."""
        total = RowCounts()
        for outcome in self.splits.values():
            total.add(outcome)
        return total

    def summary(self) -> str:
        """One line: `9 read, 8 written (7 in 2 train, 1 in 1 val shards), 1 skipped (image-missing 1)`."""
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
        """For each reason, most frequent first, the first rows left out: `image-unreadable 5 (a.png, b.png, …)`."""
        total, of_files = self.total, self.kind in (Pairs.__name__, TextFiles.__name__)
        said = []
        for reason, count in sorted(total.skipped.items(), key=lambda item: -item[1]):
            examples = total.examples[reason][:NAMED]
            names = [
                each.file if of_files or is_media(last_extension(each.file)) else f"row {each.row} of {each.file}"
                for each in examples
            ]
            said.append(f"{reason} {count:,} ({', '.join(names)}{', …' if count > NAMED else ''})")
        return said

    def to_json(self) -> dict[str, Any]:
        """Returns what report.json holds."""
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
    """Which row goes into which shard."""

    rows: int
    shards: list[ShardPlan]
    fingerprint: str
    """A hash of what all rows say, and of size and time of the files they name."""


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
        # A usable row takes two blocks at least: rows in such numbers that can't be used fill a shard as well.
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
    """Returns the bytes that a row takes in a shard, and what changes whenever the row does."""
    size, stamp = 0, []
    try:
        for name, content in make().items():
            if isinstance(content, bytes):
                length, said = len(content), content if name in TEXTS else blake2b(content, digest_size=16).digest()
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
