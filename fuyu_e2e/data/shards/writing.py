"""Writes rows as webdataset shards.

First a plan assigns rows to shards: in stored order, split by a hash of seed and row number, shards closed at a size
known from file sizes alone. Then processes write whole shards, each from its own rows. So the bytes of a shard depend
only on the source and the settings.

The plan holds 16 bytes a row for tables, and the file names for folders; a writing process holds one sample. Training
shuffles shards, and windows of documents within them, so rows are not shuffled here.

Other files in the folder of the shards:

train-00000_stats.json    what became of the rows of a shard; written before the shard appears, which is therefore
                          complete or missing (img2dataset uses the same name)
write-plan.json           the settings, and a hash of all rows, by which another source is refused
report.json               the sums, once all shards are written
"""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

from fuyu_e2e.data.image import check_image
from fuyu_e2e.data.progress_bar import Advance, ProgressBar
from fuyu_e2e.data.shards.formats import TEXT_BYTES, Sample, document, is_text
from fuyu_e2e.data.shards.parallel import run_jobs
from fuyu_e2e.data.shards.reading import SAMPLE_BYTES
from fuyu_e2e.data.shards.tables import Members, RowSource, open_source
from fuyu_e2e.data.shards.tar_writer import write_samples
from fuyu_e2e.data.shards.write_plan import (
    Plan,
    RowCounts,
    Settings,
    ShardPlan,
    WriteReport,
    kind_of,
    plan_shards,
    stat_of,
    tar_bytes,
)
from fuyu_e2e.errors import UnusableSampleError, UserError, of_signal
from fuyu_e2e.model.image_layout import ImagePolicy

VERSION = 3
"""Version of the written bytes: a folder begun by another version is not continued."""
PLAN, REPORT = "write-plan.json", "report.json"
LIMITS = ImagePolicy(patch_size=1)
"""Limits for images that training would refuse with any patch size."""
INTERRUPTED = of_signal(signal.SIGINT)
"""Exit code of a run that Ctrl-C ended."""


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
    """Writes a source as webdataset shards, or completes them after an interruption.

    Skips unusable rows and counts them by reason. Decodes each image once: one that training would skip is left out
    here, for the same reason.

    Args:
        source: A file or folder; `fuyu_e2e.data.shards.tables` lists the forms.
        out: The folder of the shards, created if needed.
        image_column: Image column of a table, if its name is not a common one.
        text_column: Column of texts or turns of a table, if its name is not a common one.
        images: The folder of relative image paths in a table; by default the table's folder.
        settings: How rows are distributed over shards.
        processes: Shards written at once; their bytes don't depend on it.

    Returns:
        The counts of all rows, those of an interrupted run included.

    Raises:
        UserError: The source has no known form, can't be read, or has no usable row, in which case nothing is left in
            `out`; or `out` contains other shards, or can't be written.
    """
    if processes < 1:
        raise UserError(f"--processes is {processes}, but must be at least 1.")
    source, out = Path(source), Path(out)
    opened = open_source(
        source, image_column=image_column, text_column=text_column, images=None if images is None else Path(images)
    )
    with _claimed(out):
        with ProgressBar("Planning", unit="rows") as progress:
            plan = plan_shards(opened.samples(), settings, progress.advance)
        _begin(out, source, opened, settings, plan)
        outcomes = {shard.name: outcome for shard in plan.shards if (outcome := _finished(out, shard)) is not None}
        remaining = [shard for shard in plan.shards if shard.name not in outcomes]
        rows = sum(len(shard.numbers) for shard in remaining)
        with ProgressBar("Writing shards", rows, "rows") as progress:
            written = run_jobs(partial(_write_shard, opened, out), remaining, processes, progress)
            outcomes |= zip((shard.name for shard in remaining), written, strict=True)
        report = _report(opened, plan, outcomes)
        if not report.total.written:
            examples = "; ".join(report.left_out())
            raise UserError(f"{source} has no usable row ({report.summary()}): mend or replace {examples}.")
        _write_json(out / REPORT, report.to_json())
    return report


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Creates the folder, or checks that it has no shards but ours, and removes the unfinished files of a killed run.

    A failure before the first shard leaves nothing in the folder, nor the folder itself if it is new; complete shards
    stay, for the same command to continue from.

    Raises:
        UserError: The folder contains other shards, or can't be created.
    """
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / PLAN).exists() and any(out.glob("*.tar")):
            raise UserError(f"{out} holds shards that this command did not write: take an empty folder.")
        for path in out.glob("*.writing"):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"The folder {out} can't be written: {error.strerror}.") from error
    try:
        yield
    except BaseException:
        if not any(out.glob("*.tar")):
            for path in (out / PLAN, *out.glob("*_stats.json")):
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the folder has other content
                for folder in new:
                    folder.rmdir()
        raise


def _begin(out: Path, source: Path, opened: RowSource, settings: Settings, plan: Plan) -> None:
    """Writes the plan file of the folder, or checks that the existing one agrees.

    Raises:
        UserError: The folder contains shards of another source or other settings.
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


def _finished(out: Path, shard: ShardPlan) -> RowCounts | None:
    """Returns the counts of a complete shard; None if it has to be written."""
    if not (stored := _read_json(_stats_path(out, shard))):
        return None
    outcome = RowCounts.from_json(stored)
    path = _path(out, shard)
    return outcome if (path.stat().st_size if path.exists() else 0) == outcome.bytes else None


def _write_shard(source: RowSource, out: Path, shard: ShardPlan, advance: Advance) -> RowCounts:
    """Writes a shard under a temporary name, then the counts of its rows, then renames it."""
    path, outcome = _path(out, shard), RowCounts()
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            samples = _samples(source, shard, outcome, advance)
            write_samples(file, ((sample.key, sample.members) for sample in samples))
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


def _samples(source: RowSource, shard: ShardPlan, outcome: RowCounts, advance: Advance) -> Iterator[Sample]:
    """Yields the usable samples of a shard; counts all its rows."""
    places, seen = shard.places.tolist(), 0
    for number, (place, make) in zip(shard.numbers.tolist(), source.samples(places), strict=False):
        seen += 1
        advance(1.0)
        file = source.reader.file(place)
        try:
            # A key made of the row number is unique, without dots and paths.
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
    """Returns the members of a sample, all as bytes.

    Raises:
        UnusableSampleError: A file is missing, not a regular file or unreadable; an image can't be decoded; or the
            members together exceed the size limit of a sample.
    """
    loaded, size = {}, 0
    for name, content in members.items():
        loaded[name] = _read(name, content) if isinstance(content, Path) else content
        if isinstance(content, bytes) and not is_text(name):  # an image out of a table
            check_image(content, LIMITS)
        size += tar_bytes(len(loaded[name]))
        if size > SAMPLE_BYTES:
            raise UnusableSampleError("sample-too-many-bytes", f"more than {SAMPLE_BYTES:,} bytes")
    return loaded


def _read(name: str, path: Path) -> bytes:
    if stat_of(name, path).st_size > (TEXT_BYTES if name == "txt" else LIMITS.max_bytes):
        raise UnusableSampleError("text-too-long" if name == "txt" else "image-too-many-bytes", str(path))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnusableSampleError(f"{kind_of(name)}-unreadable", f"{path}: {error.strerror}") from error
    if name != "txt":
        try:
            check_image(data, LIMITS)
        except UnusableSampleError as error:
            raise UnusableSampleError(error.reason, f"{path}: {error}") from error
    return data


def _report(source: RowSource, plan: Plan, outcomes: dict[str, RowCounts]) -> WriteReport:
    splits = {"train": RowCounts(), "val": RowCounts()}
    shards = dict.fromkeys(splits, 0)
    for shard in plan.shards:
        outcome = outcomes[shard.name]
        splits[shard.split].add(outcome)
        shards[shard.split] += outcome.written > 0
    return WriteReport(type(source.kind).__name__, plan.rows, shards, splits)


def _path(out: Path, shard: ShardPlan) -> Path:
    return out / f"{shard.name}.tar"


def _stats_path(out: Path, shard: ShardPlan) -> Path:
    return out / f"{shard.name}_stats.json"


def _temporary(path: Path) -> Path:
    """Returns a name that no other process writes to, and that no killed run left."""
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
    """Returns the content of a file of ours; empty if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
