"""The depth that each token of a prompt gets: the routed blocks that it passed."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sequence import TokenSequence
from fuyu_e2e.errors import UserError
from fuyu_e2e.inference.cache import KeyValueCache
from fuyu_e2e.inference.generation import decode_step, prefill
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.routing.block import routed_blocks
from fuyu_e2e.model.row import Row, TokenType

KIND_NAMES = {
    TokenType.PATCH: "patches",
    TokenType.NEWLINE: "newlines",
    TokenType.TEXT: "text",
    TokenType.ANSWER: "answers",
}
"""Names of token types in figures, in the order in which they are shown."""


@dataclass(frozen=True)
class TokenDepth:
    """The routed blocks that the tokens of one prompt and its continuation passed."""

    sequence: TokenSequence
    """The prompt."""
    continuation: list[int]
    """The tokens that the model generated after the prompt."""
    blocks: tuple[int, ...]
    """The numbers of the routed blocks."""
    passed: Bool[Tensor, "blocks tokens"]
    """Whether each token of the prompt and the continuation passed each routed block."""
    kinds: Int64[Tensor, " tokens"]
    """The `TokenType` of each token."""

    @property
    def counts(self) -> Int64[Tensor, " tokens"]:
        """The number of routed blocks that each token passed."""
        return self.passed.sum(dim=0)

    @property
    def kind_names(self) -> list[str]:
        """The name of each token's type."""
        return [KIND_NAMES[TokenType(kind)] for kind in self.kinds.tolist()]

    @property
    def shares(self) -> dict[str, float]:
        """The mean fraction of routed blocks passed, by token type; types that don't occur are left out."""
        return {
            name: float(self.passed[:, self.kinds == kind].float().mean())
            for kind, name in KIND_NAMES.items()
            if (self.kinds == kind).any()
        }


@torch.no_grad()
def token_depth(decoder: Decoder, sequence: TokenSequence, continuation: list[int]) -> TokenDepth:
    """Reads a prompt and then its continuation token by token, like generation; returns the depth of each token.

    Args:
        decoder: A decoder with routed blocks, in evaluation mode.
        sequence: The prompt.
        continuation: The generated tokens.

    Raises:
        UserError: The decoder has no routed blocks.
    """
    if decoder.config.routing is None:
        raise UserError("The model is dense: every token passes every block, so there is no depth to show.")
    weight = decoder.embed_tokens.weight
    batch = pack_row([sequence])
    cache = KeyValueCache(decoder, 1, len(sequence) + len(continuation))
    rows: list[Row] = []
    prefill(decoder, batch, cache, rows.append)
    for token in continuation:
        decode_step(decoder, torch.tensor([token], device=weight.device), cache, rows.append)
    return TokenDepth(
        sequence,
        continuation,
        decoder.config.routed,
        torch.cat([torch.stack([routed.passed for routed in routed_blocks(row)]) for row in rows], dim=1).cpu(),
        torch.cat([row.types for row in rows]).cpu(),
    )
