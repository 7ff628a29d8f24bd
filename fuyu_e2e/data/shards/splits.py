"""Keeps training, validation and test shards apart: a figure on training data says nothing about other data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from fuyu_e2e.data.shards.manifest import ShardFacts
from fuyu_e2e.errors import UserError


@dataclass(frozen=True)
class NamedShards:
    """The shards of one split, and the setting that named them."""

    setting: str
    """The setting with its value, for messages: `data.val 'val/*.tar'`."""
    facts: Mapping[str, ShardFacts]
    """The manifests' facts of each shard, by its path or URL."""


def check_disjoint(read: Sequence[NamedShards], others: Sequence[NamedShards]) -> None:
    """Checks that no split in `read` shares a shard with another one there or in `others`.

    Compares content by the manifests' checksums, so it also finds a copy or a link under another name.

    Raises:
        UserError: Names the first two settings that share a shard, and the shard in each.
    """
    for one, other in (*combinations(read, 2), *product(read, others)):
        known = {facts.sha256: shard for shard, facts in one.facts.items()}
        for shard, facts in other.facts.items():
            if (same := known.get(facts.sha256)) is not None:
                shared = f"both hold {shard}" if same == shard else f"hold the same data, in {same} and in {shard}"
                raise UserError(
                    f"{one.setting} and {other.setting} {shared}: name each shard in one of them only, such as "
                    "'FOLDER/train-*.tar' and 'FOLDER/val-*.tar' of a folder that `fuyu-e2e shards write` made."
                )
