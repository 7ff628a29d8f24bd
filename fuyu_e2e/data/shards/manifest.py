"""The manifest of a folder of shards: a small JSON file next to them, `fuyu-manifest.json`.

Its counts make the order of a stream a function of the seed; its sizes and checksums reveal lost bytes. If the folder
can't be written, the manifest is in this machine's cache.
"""

import contextlib
import fnmatch
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.image import check_image, image_size
from fuyu_e2e.data.progress_bar import Advance, untold
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.cache import ShardCache, read_bytes, write_bytes
from fuyu_e2e.data.shards.locations import folder_of, is_local, name_of
from fuyu_e2e.data.shards.parallel import map_shards
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.errors import UnusableSampleError, UserError
from fuyu_e2e.model.image_layout import ImagePolicy, ImageSpan, fit_policy
from fuyu_e2e.version import __version__

NAME = "fuyu-manifest.json"
VERSION = 3
"""Increases whenever other samples count as documents: manifests are rebuilt, and runs continue only under their
rules.

1: until 29 November 2026. 2: halves of samples, links and kinds that can't be read are not texts (see `formats`).
3: since 30 November 2026. A JSON that is a list of turns is a conversation; `jpgs` and `videos` can't be read.
"""
OUTDATED = "is of an earlier version of fuyu-e2e, which took other samples for documents"
"""What messages say about a manifest whose counts don't hold any more."""
_log = logging.getLogger(__name__)
ASSUMED = ImagePolicy(patch_size=16)
"""Image policy for the estimate of tokens, since a manifest belongs to shards, not to a model."""
BYTES_PER_TOKEN = 4
"""Bytes of text per token, for the estimate of tokens."""

Kind = Literal["caption", "chat", "interleaved", "text"]


@dataclass(frozen=True)
class DocumentFacts:
    """Facts about a document that need neither a tokenizer nor a patch size."""

    kind: Kind
    sizes: tuple[tuple[int, int], ...]
    """(width, height) of each image in pixels, from its header, after EXIF rotation."""
    text_bytes: int

    @classmethod
    def of(cls, document: Document) -> "DocumentFacts":
        """Returns the facts of a document.

        Raises:
            UnusableSampleError: An image's header can't be used (see `fuyu_e2e.data.image`), or a text isn't Unicode.
        """
        images = [segment for segment in document.segments if isinstance(segment, Image)]
        texts = [segment for segment in document.segments if isinstance(segment, Text)]
        kind: Kind = "interleaved"
        if not images:
            kind = "text"
        elif any(not text.loss for text in texts):
            kind = "chat"
        elif len(images) == 1 and len(texts) == 1:
            kind = "caption"
        sizes = tuple(image_size(image.data, ASSUMED) for image in images)
        try:
            return cls(kind, sizes, sum(len(text.text.encode()) for text in texts))
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
            raise UnusableSampleError("text-not-unicode", f"{document.key}: {error}") from error

    def tokens(self, policy: ImagePolicy = ASSUMED) -> int:
        """Returns an estimate of its tokens: exact for images, one token for four bytes of text."""
        text = -(-self.text_bytes // BYTES_PER_TOKEN)
        return text + sum(image_tokens(size, policy) for size in self.sizes)


def image_tokens(size: tuple[int, int], policy: ImagePolicy) -> int:
    """Returns the tokens of an image of (width, height) pixels, including newlines."""
    cols, rows = (-(-side // policy.patch_size) for side in fit_policy(*size, policy))
    return ImageSpan.of_grid(0, rows, cols).stop


@dataclass(frozen=True, kw_only=True)
class ShardFacts:
    """Facts about one shard."""

    documents: int
    """Documents, including unusable ones; a damaged shard ends with one that represents the damage."""
    bytes: int
    sha256: str
    kinds: dict[str, int] = field(default_factory=dict)
    """Usable documents by kind."""
    images: int = 0
    tokens_estimate: int = 0
    """See `DocumentFacts.tokens`."""
    unusable: dict[str, int] = field(default_factory=dict)
    """Unusable documents by reason, as far as headers show."""
    examples: dict[str, str] = field(default_factory=dict, compare=False)
    """The first of each reason, in words; not in the manifest."""

    def stored(self) -> dict[str, Any]:
        """Returns what the manifest holds of the facts."""
        return {name: value for name, value in asdict(self).items() if name != "examples"}

    @classmethod
    def of(cls, path: Path, name: str | None = None, advance: Advance = untold) -> "ShardFacts":
        """Reads a whole local shard, and returns its facts; adds 1 to `advance` in total.

        Raises:
            UserError: The file can't be read, or is not a tar.
        """
        stats, kinds = SampleStats(), Counter[str]()
        images = tokens = 0
        for found in read_documents(path, stats, name, advance):
            try:
                facts = DocumentFacts.of(found)
            except UnusableSampleError as error:
                stats.skip(error)
                continue
            kinds[facts.kind] += 1
            images += len(facts.sizes)
            tokens += facts.tokens()
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(
            documents=stats.read,
            bytes=path.stat().st_size,
            sha256=digest,
            kinds=dict(kinds),
            images=images,
            tokens_estimate=tokens,
            unusable=dict(stats.skipped),
            examples=stats.examples,
        )


@dataclass(frozen=True)
class Manifest:
    """The facts of the shards of one folder, by file name."""

    folder: str
    shards: dict[str, ShardFacts]
    outdated: str | None = None
    """The place of a manifest of an earlier version, which counted other samples and is ignored."""

    @classmethod
    def load(cls, folder: str, cache: ShardCache) -> "Manifest":
        """Returns the manifest of a folder, from next to its shards or this machine's cache; empty if there is none.

        Raises:
            UserError: A manifest can't be read.
        """
        shards: dict[str, ShardFacts] = {}
        outdated = None
        for place in (str(_cached(folder, cache)), *([_beside(folder)] if folder else [])):
            data = read_bytes(place)
            if data is None:
                continue
            try:
                parsed = json.loads(data)
                if parsed["version"] in range(1, VERSION):
                    outdated = place
                    continue
                if parsed["version"] != VERSION:
                    raise ValueError(f"version {parsed['version']}, not {VERSION}")
                shards |= {name: ShardFacts(**facts) for name, facts in parsed["shards"].items()}
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(
                    f"{place} is no manifest of this version of fuyu-e2e ({type(error).__name__}: {error}): remove it "
                    "and run `fuyu-e2e shards index` on the shards."
                ) from error
        return cls(folder, shards, outdated)

    def save(self, cache: ShardCache) -> str:
        """Writes the manifest next to the shards, or else into the cache; returns its place."""
        described = {
            "version": VERSION,
            "written_by": f"fuyu-e2e {__version__}",
            "tokens_estimated_for": {
                "patch_size": ASSUMED.patch_size,
                "max_patches": ASSUMED.max_patches,
                "bytes_per_token": BYTES_PER_TOKEN,
            },
            "totals": totals(self.shards.values()),
            "shards": {name: facts.stored() for name, facts in sorted(self.shards.items())},
        }
        data = (json.dumps(described, indent=1) + "\n").encode()
        if self.folder and write_bytes(_beside(self.folder), data):
            return _beside(self.folder)
        place = _cached(self.folder, cache)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(str(place), data)
        return str(place)


def totals(shards: Collection[ShardFacts]) -> dict[str, Any]:
    """Returns the sums over shards by the names of `ShardFacts`, and the number of `shards`."""
    sums: dict[str, Any] = {
        name: sum(getattr(facts, name) for facts in shards)
        for name in ("documents", "bytes", "images", "tokens_estimate")
    }
    for name in ("kinds", "unusable"):
        sums[name] = sum((Counter(getattr(facts, name)) for facts in shards), Counter())
    return sums | {"shards": len(shards)}


def _beside(folder: str) -> str:
    return f"{folder.rstrip('/')}/{NAME}"


def _cached(folder: str, cache: ShardCache) -> Path:
    return cache.folder / "manifests" / f"{hashlib.sha256(folder.encode()).hexdigest()}.json"


def facts_of(shards: Sequence[str], cache: ShardCache) -> tuple[ShardFacts, ...]:
    """Returns the facts of each shard; indexes local shards that no manifest lists.

    Raises:
        UserError: No manifest lists a remote shard; a local one differs in size from its manifest, can't be read, or
            is not a tar.
    """
    known = known_facts(shards, cache)
    unknown = [shard for shard in shards if shard not in known]
    for folder in dict.fromkeys(map(folder_of, unknown)):
        if outdated := Manifest.load(folder, cache).outdated:
            said = f"{outdated} {OUTDATED}"
            if not is_local(folder):
                raise UserError(f"{said}: run `fuyu-e2e shards index` on the pattern once.")
            _log.warning("%s: its shards are indexed again.", said)
    if remote := [shard for shard in unknown if not is_local(shard)]:
        raise UserError(
            f"No manifest knows {remote[0]}{_others(remote)}: run `fuyu-e2e shards index` on the pattern once. It "
            "reads every shard, which takes as long as that does."
        )
    for shard in shards:
        if shard in known and is_local(shard):
            _check_size(shard, known[shard])
    if unknown:
        known |= index(unknown, cache)[0]
    return tuple(known[shard] for shard in shards)


def index(shards: Sequence[str], cache: ShardCache, processes: int = 1) -> tuple[dict[str, ShardFacts], list[str]]:
    """Reads shards whole and writes their facts into the manifests of their folders; returns facts and manifests'
    places.

    Removes entries of local shards that are gone. For `processes` see `map_shards`.

    Raises:
        UserError: A shard can't be read, or is not a tar.
    """
    facts = map_shards(partial(_facts_of_one, cache=cache), shards, processes, "Indexing shards")
    found = dict(zip(shards, facts, strict=True))
    places = []
    for folder in dict.fromkeys(map(folder_of, shards)):
        fresh = {name_of(shard): facts for shard, facts in found.items() if folder_of(shard) == folder}
        # Read just before writing: another process may have indexed other shards of the folder.
        kept = {
            name: facts
            for name, facts in Manifest.load(folder, cache).shards.items()
            if not is_local(folder) or (Path(folder) / name).exists()
        }
        places.append(Manifest(folder, kept | fresh).save(cache))
    return found, places


def _facts_of_one(shard: str, advance: Advance, cache: ShardCache) -> ShardFacts:
    return ShardFacts.of(cache.path(shard), shard, advance)


def known_facts(shards: Iterable[str], cache: ShardCache) -> dict[str, ShardFacts]:
    """Returns the facts of those shards that a manifest lists; indexes nothing.

    Raises:
        UserError: A manifest can't be read.
    """
    manifests: dict[str, Manifest] = {}
    known = {}
    for shard in shards:
        folder = folder_of(shard)
        if folder not in manifests:
            manifests[folder] = Manifest.load(folder, cache)
        if facts := manifests[folder].shards.get(name_of(shard)):
            known[shard] = facts
    return known


def _check_size(shard: str, facts: ShardFacts) -> None:
    size = Path(shard).stat().st_size
    if size != facts.bytes:
        raise UserError(
            f"The shard {shard} has {size:,} bytes, but its manifest says {facts.bytes:,}: it was cut or "
            "rewritten. `fuyu-e2e shards verify` says what is missing, `fuyu-e2e shards index` takes it as it is now."
        )


def check_complete(shards: Iterable[str], cache: ShardCache) -> None:
    """Checks that no shard is missing that the manifests of the given ones list in the same series of names.

    Names of a series differ only in digits: among other `train-*`, a missing `train-00003.tar` is noticed.

    Raises:
        UserError: Names the missing shards.
    """
    shards = [shard for shard in shards if is_local(shard)]
    for folder in dict.fromkeys(map(folder_of, shards)):
        series = {_series(name_of(shard)) for shard in shards if folder_of(shard) == folder}
        gone = [
            name
            for name in Manifest.load(folder, cache).shards
            if _series(name) in series and not (Path(folder) / name).exists()
        ]
        if gone:
            raise UserError(
                f"{folder}/{gone[0]}{_others(gone)} is listed in {_beside(folder)} but is gone: bring it back, or run "
                "`fuyu-e2e shards index` on the shards that are left."
            )


def _series(name: str) -> str:
    return "".join("#" if letter.isdigit() else letter for letter in name)


def _others(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} others" if len(names) > 1 else ""


@dataclass(frozen=True)
class Fault:
    """One difference between a shard and its manifest."""

    shard: str
    reason: str


def verify(
    patterns: Sequence[str], shards: Sequence[str], cache: ShardCache, processes: int = 1, *, deep: bool = False
) -> list[Fault]:
    """Compares shards with their manifests, and these with the shards that match the patterns.

    Args:
        patterns: The user's patterns, so that missing shards are noticed too.
        shards: The shards that match the patterns.
        cache: The cache for remote shards.
        processes: Shards read at once; see `map_shards`.
        deep: Whether to decode each image as well. An image that can't be decoded is a fault if its header looks
            right; otherwise the manifest counts it as unusable already.

    Returns:
        All differences; empty if every shard is as its manifest says.

    Raises:
        UserError: A remote shard can't be fetched.
    """
    faults = []
    for folder in dict.fromkeys(map(folder_of, shards)):
        manifest = Manifest.load(folder, cache)
        listed = manifest.shards
        here = {name_of(shard): shard for shard in shards if folder_of(shard) == folder}
        for name in sorted(listed.keys() | here.keys()):
            if name not in here:
                if _matches(name, patterns):
                    faults.append(Fault(f"{folder}/{name}", "is gone"))
            elif name not in listed:
                outdated = f"is only in {manifest.outdated}, which {OUTDATED}: `fuyu-e2e shards index` counts it again"
                faults.append(Fault(here[name], outdated if manifest.outdated else "is in no manifest"))
    known = known_facts(shards, cache)
    indexed = [shard for shard in shards if shard in known]
    compare = partial(_compare, known=known, cache=cache, deep=deep)
    for shard, reasons in zip(indexed, map_shards(compare, indexed, processes, "Verifying shards"), strict=True):
        faults += [Fault(shard, reason) for reason in reasons]
    return faults


def _compare(shard: str, advance: Advance, known: dict[str, ShardFacts], cache: ShardCache, deep: bool) -> list[str]:
    path = cache.path(shard)
    try:
        reasons = list(_differences(known[shard], ShardFacts.of(path, shard, untold if deep else advance)))
        return [*reasons, *_undecodable(path, shard, advance)] if deep else reasons
    except UserError as error:
        return [f"can't be compared: {error}"]


def _undecodable(path: Path, name: str, advance: Advance) -> Iterator[str]:
    for found in read_documents(path, SampleStats(), name, advance):
        with contextlib.suppress(UnusableSampleError):  # the manifest counts it
            DocumentFacts.of(found)
            try:
                for segment in found.segments:
                    if isinstance(segment, Image):
                        check_image(segment.data, ASSUMED)
            except UnusableSampleError as error:
                yield f"has an image that can't be decoded in sample {found.key} ({error})"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern.rsplit("/", 1)[-1]) or Path(pattern).is_dir() for pattern in patterns)


def _differences(said: ShardFacts, found: ShardFacts) -> Iterator[str]:
    """Yields what differs; if it is the counts alone, which the rules of another version explain, with the remedy."""
    counts = list(_differing_counts(said, found))
    if (said.bytes, said.sha256) == (found.bytes, found.sha256) and counts:
        counts[-1] += ": `fuyu-e2e shards index` counts them again"
    if said.bytes != found.bytes:
        yield f"has {found.bytes:,} bytes instead of {said.bytes:,}"
    elif said.sha256 != found.sha256:
        yield "has another checksum"
    yield from counts


def _differing_counts(said: ShardFacts, found: ShardFacts) -> Iterator[str]:
    if said.documents != found.documents:
        yield f"has {found.documents:,} documents instead of {said.documents:,}"
    for reason in sorted(found.unusable.keys() | said.unusable.keys()):
        if found.unusable.get(reason, 0) != said.unusable.get(reason, 0):
            yield f"has {found.unusable.get(reason, 0):,} unusable documents ({reason}) instead of " + (
                f"{said.unusable.get(reason, 0):,}"
            )
