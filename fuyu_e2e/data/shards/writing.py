"""From rows to webdataset shards.

First a plan says which row goes into which shard: rows in stored order, split by a hash of seed and row number, shards
closed at a size known from file sizes alone. Then processes write whole shards, each from its own rows. So the bytes
of a shard depend on nothing but the source and the settings, whoever writes it and whenever.

The plan holds 16 bytes a row for tables, and the file names for folders; a process that writes holds one sample.
Training shuffles shards, and windows of documents within them, so rows are not shuffled here.

In the folder written, beside the shards:

train-00000_stats.json    what became of the rows of a shard; there before the shard is, so that a shard is whole or
                          not there (img2dataset names its own so)
write-plan.json           the settings, and a hash of all rows, by which another source is refused
report.json               the sums, once all shards are written
"""

import contextlib
import json
import multiprocessing
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import IO, Any

import numpy as np

from fuyu_e2e.data.image import check_image
from fuyu_e2e.data.progress_bar import Advance, Progress, add
from fuyu_e2e.data.shards.extensions import TEXTS, is_media, last_extension
from fuyu_e2e.data.shards.formats import TEXT_BYTES, document
from fuyu_e2e.data.shards.parallel import deaf_to_interrupts
from fuyu_e2e.data.shards.reading import BLOCK, SAMPLE_BYTES, Sample
from fuyu_e2e.data.shards.tables import Members, Pairs, Place, RowSource, TextFiles, open_source
from fuyu_e2e.data.shards.tar_writer import TarWriter
from fuyu_e2e.errors import UnusableSampleError, UserError, of_signal
from fuyu_e2e.model.image_layout import ImagePolicy

VERSION = 2
"""Of the bytes written: a folder begun by another version is not gone on with."""
EXAMPLES = 20
"""Rows shown in the report for each reason."""
NAMED = 3
"""Rows named on the terminal for each reason."""
MEGABYTE = 10**6
"""Bytes of a megabyte."""
PLAN, REPORT = "write-plan.json", "report.json"
LIMITS = ImagePolicy(patch_size=1)
"""Which images training would refuse, whatever its patches."""
INTERRUPTED = of_signal(signal.SIGINT)
"""Exit code of a run that Ctrl-C ended."""


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
        """The split of a row: the same in every order and number of rows."""
        digest = blake2b(f"{self.seed}/{number}".encode(), digest_size=8).digest()
        return "val" if int.from_bytes(digest, "big") < self.val_share * 2**64 else "train"


@dataclass(frozen=True)
class Shard:
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
class Outcome:
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

    def add(self, other: "Outcome") -> None:
        """Adds what became of other rows."""
        self.written += other.written
        self.bytes += other.bytes
        for reason, count in other.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
        for reason, examples in other.examples.items():
            both = self.examples.get(reason, []) + examples
            self.examples[reason] = sorted(both, key=lambda example: example.row)[:EXAMPLES]

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Outcome":
        """What `asdict` made of one."""
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
    splits: dict[str, Outcome]

    @property
    def total(self) -> Outcome:
        """Over both splits."""
        total = Outcome()
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
        """What report.json holds."""
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
    shards: list[Shard]
    fingerprint: str
    """A hash of what all rows say, and of size and time of the files they name."""


def write_shards(
    source: str | Path,
    out: str | Path,
    *,
    image_column: str | None = None,
    text_column: str | None = None,
    images: str | Path | None = None,
    settings: Settings = Settings(),
    processes: int = 1,
) -> WriteReport:
    """Writes a source as webdataset shards, or what is missing of them after an interruption.

    Rows that can't be used are skipped and counted by reason. Each image is decoded once: one that training would skip
    is left out here, for the same reason.

    Args:
        source: A file or folder; `fuyu_e2e.data.shards.tables` lists the forms.
        out: The folder of the shards, made where there is none.
        image_column: Column of images in a table, where its name is not a common one.
        text_column: Column of texts or of turns in a table, where its name is not a common one.
        images: What relative image paths in a table start from; by default the table's folder.
        settings: How rows are dealt out to shards.
        processes: Shards written at once; their bytes don't depend on it.

    Raises:
        UserError: The source is of no known form, can't be read or has no usable row, for which nothing is left in
            `out`; or `out` holds other shards, or can't be written.
    """
    if processes < 1:
        raise UserError(f"--processes is {processes}, but must be at least 1.")
    source, out = Path(source), Path(out)
    opened = open_source(
        source, image_column=image_column, text_column=text_column, images=None if images is None else Path(images)
    )
    with _claimed(out):
        with Progress("Planning", unit="rows") as progress:
            plan = _plan(opened.samples(), settings, progress.advance)
        _begin(out, source, opened, settings, plan)
        outcomes = {shard.name: outcome for shard in plan.shards if (outcome := _finished(out, shard)) is not None}
        remaining = [shard for shard in plan.shards if shard.name not in outcomes]
        rows = sum(len(shard.numbers) for shard in remaining)
        with Progress("Writing shards", rows, "rows") as progress:
            outcomes |= _write_all(opened, out, remaining, processes, progress)
        report = _report(opened, plan, outcomes)
        if not report.total.written:
            examples = "; ".join(report.left_out())
            raise UserError(f"{source} has no usable row ({report.summary()}): mend or replace {examples}.")
        _write_json(out / REPORT, report.to_json())
    return report


def _plan(rows: Iterable[tuple[Place, Callable[[], Members]]], settings: Settings, advance: Advance) -> Plan:
    limit = settings.shard_megabytes * MEGABYTE
    filling: dict[str, list[tuple[int, Place]]] = {"train": [], "val": []}
    sizes = dict.fromkeys(filling, 0)
    closed: dict[str, list[Shard]] = {split: [] for split in filling}
    fingerprint = blake2b(digest_size=16)
    number = 0

    def close(split: str) -> None:
        numbers, places = zip(*filling[split], strict=True)
        closed[split].append(Shard(split, len(closed[split]), np.array(numbers), np.array(places)))
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
    """The bytes that a row takes in a shard, and what changes whenever the row does."""
    size, stamp = 0, []
    try:
        for name, content in make().items():
            if isinstance(content, bytes):
                length, said = len(content), content if name in TEXTS else blake2b(content, digest_size=16).digest()
            else:
                found = _stat(name, content)
                length, said = found.st_size, f"{found.st_size} {found.st_mtime_ns}".encode()
            size += _tar_bytes(length)
            stamp.append((name, said))
    except UnusableSampleError as error:
        return 0, repr(error.reason).encode()
    return size, repr(stamp).encode()


def _tar_bytes(length: int) -> int:
    """The bytes of a member in a tar: a header, and whole blocks."""
    return BLOCK + -(-length // BLOCK) * BLOCK


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Makes the folder, or sees that it holds no shards but ours, and removes what a killed run was writing.

    What fails before there is a shard leaves nothing in the folder, nor the folder itself where it is new; shards that
    are whole stay, for the same command to go on from.

    Raises:
        UserError: It holds shards of something else, or can't be made.
    """
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    _claim(out)
    try:
        yield
    except BaseException:
        if not any(out.glob("*.tar")):
            for path in (out / PLAN, *out.glob("*_stats.json")):
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else lies there
                for folder in new:
                    folder.rmdir()
        raise


def _claim(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / PLAN).exists() and any(out.glob("*.tar")):
            raise UserError(f"{out} holds shards that this command did not write: take an empty folder.")
        for path in out.glob("*.writing"):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"The folder {out} can't be written: {error.strerror}.") from error


def _begin(out: Path, source: Path, opened: RowSource, settings: Settings, plan: Plan) -> None:
    """Writes down what the folder is for, or sees that it is for this.

    Raises:
        UserError: It holds shards of another source or of other settings.
    """
    described = {
        "version": VERSION,
        "kind": type(opened.kind).__name__,
        "columns": list(opened.kind.columns),
        **asdict(settings),
        "rows": plan.rows,
        "fingerprint": plan.fingerprint,
    }
    known = _read_json(out / PLAN)
    changed = [name for name, value in described.items() if known.get(name) != value]
    if not changed:
        return
    if any(out.glob("*.tar")):
        raise UserError(
            f"{out} holds shards of another source or other settings ({', '.join(changed)} differ): take an empty "
            "folder."
        )
    for path in out.glob("*_stats.json"):
        path.unlink()
    _write_json(out / PLAN, {"source": str(source), **described})


def _finished(out: Path, shard: Shard) -> Outcome | None:
    """What became of the rows of a shard that is whole; None where it has to be written."""
    if not (stored := _read_json(_stats_path(out, shard))):
        return None
    outcome = Outcome.from_json(stored)
    path = _path(out, shard)
    return outcome if (path.stat().st_size if path.exists() else 0) == outcome.bytes else None


def _write_all(
    source: RowSource, out: Path, shards: Sequence[Shard], processes: int, progress: Progress
) -> dict[str, Outcome]:
    """Writes shards; gives what became of their rows, by their names."""
    if processes == 1 or len(shards) <= 1:
        return {shard.name: _write_shard(source, out, shard, progress.advance) for shard in shards}
    # Not forked: a copy of a process that runs torch's threads can hang. This module imports no torch, so that a new
    # process starts in a fraction of a second.
    pool = ProcessPoolExecutor(
        min(processes, len(shards)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin_process,
        initargs=(progress.count,),
    )
    try:
        with deaf_to_interrupts():
            jobs = {pool.submit(_write_in_process, source, out, shard): shard.name for shard in shards}
        return {jobs[done]: done.result() for done in as_completed(jobs)}
    except BrokenProcessPool as error:
        raise UserError(
            f"A process that wrote to {out} was killed, perhaps for want of memory: run the same command again, with "
            "fewer --processes."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)  # lets the shards that are being written end


_count: "Synchronized[float]"
"""The rows that all processes have written."""


def _begin_process(count: "Synchronized[float]") -> None:
    global _count
    _count = count
    _follow_parent()


def _write_in_process(source: RowSource, out: Path, shard: Shard) -> Outcome:
    return _write_shard(source, out, shard, partial(add, _count))


def _follow_parent() -> None:
    """Exits when the parent does: the workers of a killed one would stay for good."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _write_shard(source: RowSource, out: Path, shard: Shard, advance: Advance) -> Outcome:
    """Writes a shard under another name, then what became of its rows, then gives it its name."""
    path, outcome = _path(out, shard), Outcome()
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            with TarWriter(file) as writer:
                for sample in _samples(source, shard, outcome, advance):
                    writer.write(sample.key, sample.members)
            _sync(file)
        if outcome.written:
            outcome.bytes = temporary.stat().st_size
        _write_json(_stats_path(out, shard), asdict(outcome))
        if outcome.written:
            temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"The shard {path} can't be written ({error.strerror}): make room, and run the same command again, which "
            "goes on from the shards that are whole."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return outcome


def _samples(source: RowSource, shard: Shard, outcome: Outcome, advance: Advance) -> Iterator[Sample]:
    """The usable samples of a shard; counts all its rows."""
    places, seen = shard.places.tolist(), 0
    for number, (place, make) in zip(shard.numbers.tolist(), source.samples(places), strict=False):
        seen += 1
        advance(1.0)
        file = source.reader.file(place)
        try:
            # A key made of the row number is unique, and holds no dot and no path.
            sample = Sample(f"{number:09}", file, _load(make()))
            document(sample)
        except UnusableSampleError as error:
            outcome.skip(error, source.reader.row_number(place, number), file)
            continue
        outcome.written += 1
        yield sample
    if seen < len(places):
        raise UserError(
            f"{source.reader.file(places[0])} was changed while it was read: write it again, into an empty folder."
        )


def _load(members: Members) -> dict[str, bytes]:
    """The members of a sample, all in bytes.

    Raises:
        UnusableSampleError: A file is missing, no regular file or unreadable, or an image that can't be decoded; or
            all together are more than is read of a sample.
    """
    loaded, size = {}, 0
    for name, content in members.items():
        loaded[name] = _read(name, content) if isinstance(content, Path) else content
        if isinstance(content, bytes) and name not in TEXTS:  # an image out of a table
            check_image(content, LIMITS)
        size += _tar_bytes(len(loaded[name]))
        if size > SAMPLE_BYTES:
            raise UnusableSampleError("sample-too-many-bytes", f"more than {SAMPLE_BYTES:,} bytes")
    return loaded


def _read(name: str, path: Path) -> bytes:
    if _stat(name, path).st_size > (TEXT_BYTES if name == "txt" else LIMITS.max_bytes):
        raise UnusableSampleError("text-too-long" if name == "txt" else "image-too-many-bytes", str(path))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnusableSampleError(f"{_what(name)}-unreadable", f"{path}: {error.strerror}") from error
    if name != "txt":
        try:
            check_image(data, LIMITS)
        except UnusableSampleError as error:
            raise UnusableSampleError(error.reason, f"{path}: {error}") from error
    return data


def _stat(name: str, path: Path) -> os.stat_result:
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise UnusableSampleError(f"{_what(name)}-missing", f"{path}: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(found.st_mode):  # reading a pipe or a device might never end
        raise UnusableSampleError(f"{_what(name)}-no-file", str(path))
    return found


def _what(name: str) -> str:
    return "text" if name == "txt" else "image"


def _report(source: RowSource, plan: Plan, outcomes: dict[str, Outcome]) -> WriteReport:
    splits = {"train": Outcome(), "val": Outcome()}
    shards = dict.fromkeys(splits, 0)
    for shard in plan.shards:
        outcome = outcomes[shard.name]
        splits[shard.split].add(outcome)
        shards[shard.split] += outcome.written > 0
    return WriteReport(type(source.kind).__name__, plan.rows, shards, splits)


def _path(out: Path, shard: Shard) -> Path:
    return out / f"{shard.name}.tar"


def _stats_path(out: Path, shard: Shard) -> Path:
    return out / f"{shard.name}_stats.json"


def _temporary(path: Path) -> Path:
    """A name that no other process writes to, not even one that a killed run left behind."""
    return path.with_name(f"{path.name}.{os.getpid()}.writing")


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with (temporary := _temporary(path)).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        _sync(file)
    temporary.replace(path)


def _read_json(path: Path) -> dict[str, Any]:
    """What a file of ours holds; nothing where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
