"""What the stamps of Tux Paint show: short nouns in English and German, read from the texts beside the pictures.

Debian's package `tuxpaint-stamps-default` (GPL-2) holds photographs and drawings with transparent grounds. Beside each
lies a text: its first line is a phrase in English (`A cheetah.`), the others are translations (`de.utf8=Ein Gepard.`).

A stamp is used if both phrases are an article and at most three words with no preposition among them, so that
sentences are left out; signs in `symbols/`, copies and mirrored pictures are left out too. Stamps are of one kind if
their English names end alike and their German ones too, compounds included: `Sumatran tiger` (`Sumatratiger`) and
`tiger` (`Tiger`) are tigers, but a `mandarin orange` (`Mandarine`) is no orange.
"""

import re
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from fuyu_e2e.errors import UserError

KINDS = 100
"""The most kinds that are used: all with several stamps, then others."""
WORDS = 3
"""The most words of a name."""
ENGLISH_ARTICLE = re.compile(r"(?:an?|the) ", re.IGNORECASE)
GERMAN_ARTICLE = re.compile(r"(?:eine?|der|die|das) ", re.IGNORECASE)
PREPOSITIONS = {"of", "with", "in", "at", "for", "aus", "im", "mit", "von", "zur"}
"""Words that names don't contain: what is "a head of lettuce" a picture of?"""
MISLEADING = ("sea lion", "grave marker", "cemetery marker")
"""Names that are no kind of their last word, although their German names end like that of others."""


@dataclass(frozen=True)
class Kind:
    """Stamps that are called alike."""

    english: str
    """In lower case, such as `lion`."""
    german: str
    """As it is spelled in a German sentence, such as `Löwe`."""
    stamps: tuple[Path, ...]
    """Its pictures, in the order of their paths."""

    @property
    def known(self) -> tuple[Path, ...]:
        """The stamps that training shows: the only one, or all but the last."""
        return self.stamps[: max(1, len(self.stamps) - 1)]

    @property
    def held_out(self) -> tuple[Path, ...]:
        """The stamp that training doesn't show: the last of several, or none."""
        return self.stamps[1:][-1:]


def is_held_out(one: Kind, other: Kind) -> bool:
    """Returns whether two kinds never occur together in a training picture: one pair in five, by checksum."""
    names = sorted((one.english, other.english))
    return zlib.crc32("+".join(names).encode()) % 5 == 0


def read_kinds(folder: Path, most: int = KINDS) -> tuple[Kind, ...]:
    """Returns the kinds of stamps in a folder, in alphabetical order.

    All kinds with several stamps come first, then those of one stamp with a name of one word that is no cartoon, in
    the order of their names' checksums, so that no part of the alphabet is preferred.

    Args:
        folder: The package's `usr/share/tuxpaint/stamps`.
        most: The most kinds.

    Raises:
        UserError: The folder holds fewer than two kinds.
    """
    named = _named_stamps(folder)
    several = _grouped(named)
    grouped = {path for kind in several for path in kind.stamps}
    single = [
        Kind(english, german, (path,))
        for path, english, german in named
        if path not in grouped and " " not in english and "cartoon" not in path.parts
    ]
    single.sort(key=lambda kind: zlib.crc32(kind.english.encode()))
    chosen: list[Kind] = []
    for kind in [*several, *single]:
        # Two kinds with one name could not be told apart.
        if not any(kind.english == other.english or kind.german == other.german for other in chosen):
            chosen.append(kind)
    if len(chosen) < 2:
        raise UserError(
            f"{folder} holds no stamps with English and German names: name the folder usr/share/tuxpaint/stamps of "
            "Debian's package tuxpaint-stamps-default by --stamps."
        )
    return tuple(sorted(chosen[:most], key=lambda kind: kind.english))


def _named_stamps(folder: Path) -> list[tuple[Path, str, str]]:
    """Returns the stamps with usable names, in the order of their paths, each with its English and German name."""
    found, seen = [], set()
    for path in sorted(folder.rglob("*.png")):
        texts = path.with_suffix(".txt")
        if "symbols" in path.relative_to(folder).parts or path.stem.endswith("_mirror") or not texts.exists():
            continue
        first, *others = texts.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        translated = (line.removeprefix("de.utf8=") for line in others if line.startswith("de.utf8="))
        english, german = short_name(first, ENGLISH_ARTICLE), short_name(next(translated, ""), GERMAN_ARTICLE)
        content = path.read_bytes()
        if english and german and content not in seen:
            seen.add(content)
            found.append((path, english.lower(), german))
    return found


def short_name(phrase: str, article: re.Pattern[str]) -> str | None:
    """Returns a phrase without article, remarks in brackets, quotation marks and final dot, or None for a sentence."""
    plain = re.sub(r"\([^)]*\)|[“”»«\"]", "", phrase).strip().rstrip(".!")
    without = article.match(plain)
    words = plain[without.end() :].split() if without else []
    if not 1 <= len(words) <= WORDS or PREPOSITIONS & set(words):
        return None
    return " ".join(words) if all(re.fullmatch(r"[\w’'-]+", word) for word in words) else None


def _grouped(named: Sequence[tuple[Path, str, str]]) -> list[Kind]:
    """Returns the kinds that have several stamps."""
    alike = defaultdict(list)
    for stamp in named:
        english = stamp[1]
        alike[english if english in MISLEADING else english.split()[-1]].append(stamp)
    kinds = []
    for stamps in alike.values():
        noun = _commonest_noun([german for _, _, german in stamps])
        paths, english_names, german_names = zip(
            *(stamp for stamp in stamps if _noun(stamp[2]).lower().endswith(noun.lower())), strict=True
        )
        if len(paths) > 1:
            german = german_names[0] if len(set(german_names)) == 1 else noun
            kinds.append(Kind(_common_end(english_names), german, tuple(paths)))
    return kinds


def _noun(german: str) -> str:
    """Returns the noun of a German name, which is its last word, or the last part of a word with hyphens."""
    return re.split("[ -]", german)[-1]


def _commonest_noun(names: Sequence[str]) -> str:
    """Returns the noun with which most of the nouns end, itself among them; the longest of several."""
    nouns = [_noun(name) for name in names]
    return max(
        sorted(set(nouns)),
        key=lambda noun: (sum(other.lower().endswith(noun.lower()) for other in nouns), len(noun)),
    )


def _common_end(names: Sequence[str]) -> str:
    """Returns the last words that all names share."""
    columns = zip(*(name.split()[::-1] for name in names), strict=False)
    shared = [words[0] for words in takewhile(lambda words: len(set(words)) == 1, columns)]
    return " ".join(reversed(shared))
