"""A mask of a user's own: a token sees the tokens of its chunk of the document alone, as in some layers of Llama 4."""

from dataclasses import dataclass
from typing import Any

from fuyu_e2e.model.attention.mask import AttentionMask


@dataclass(frozen=True, kw_only=True)
class Chunked(AttentionMask):
    """Chunks of `window` tokens; no token of a chunk is further from another, so that a cache of a window serves."""

    def sees(self, query: Any, key: Any, same_image: Any) -> Any:
        return super().sees(query, key, same_image) & (query // self.window == key // self.window)
