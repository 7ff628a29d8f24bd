"""The shards that a process reads, local or remote, with the facts of their manifests."""

from functools import lru_cache
from pathlib import Path

from fuyu_e2e.data.document import Document
from fuyu_e2e.data.shards.cache import ShardCache
from fuyu_e2e.data.shards.formats import document
from fuyu_e2e.data.shards.manifest import ShardFacts
from fuyu_e2e.data.shards.reading import Shard
from fuyu_e2e.errors import UserError

OPEN_SHARDS = 1_024
"""Shards whose scan a process remembers, at 16 bytes a document."""


class OpenShards:
    """The shards that a process reads, each scanned once while it is in use.

    Args:
        cache: Provides the files.
    """

    def __init__(self, cache: ShardCache) -> None:
        self.cache = cache
        self._open = lru_cache(OPEN_SHARDS)(_open)

    def document(self, shard: str, facts: ShardFacts, number: int) -> Document:
        """Returns a document of a shard by number.

        Raises:
            UnusableSampleError: It can't be used, or is missing although the manifest counts it.
            UserError: The shard can't be read, or contains more documents than its manifest says.
        """
        path = self.cache.path(shard, facts.bytes, facts.sha256)
        opened = self._open(path, shard, facts.documents)
        try:
            return document(opened.sample(number))
        except OSError as error:
            raise UserError(f"The shard {shard} can't be read: {error.strerror}.") from error


def _open(path: Path, shard: str, documents: int) -> Shard:
    opened = Shard(path, shard)
    if len(opened) > documents:
        raise UserError(
            f"The shard {shard} holds {len(opened):,} documents, but its manifest says {documents:,}: run "
            "`fuyu-e2e shards index` on the shards."
        )
    return opened
