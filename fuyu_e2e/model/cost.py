"""What a decoder costs: parameters, and floating-point operations of a row, counted exactly."""

from collections.abc import Sequence
from dataclasses import dataclass

from fuyu_e2e.model.config import FuyuConfig, annealed

Counts = Sequence[int | float]
"""Tokens of each document; a fraction where a share of them is meant."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one row of tokens; a multiply-add is two operations, and only matrix products count."""

    parameters: int
    """All trained values, a tied embedding once."""
    tokens: int
    """Tokens of the row."""
    forward_flops: int
    """Operations of the forward pass."""
    training_flops: int
    """Operations of forward and backward pass, nothing computed twice."""

    @property
    def training_flops_per_token(self) -> float:
        """The mean over the row's tokens."""
        return self.training_flops / self.tokens


def cost(
    config: FuyuConfig,
    *,
    document_lengths: tuple[int, ...],
    patches: int,
    targets: int,
    passing: Sequence[Counts] | None = None,
    dense: float = 0.0,
) -> Cost:
    """Counts a row of documents with these lengths that holds `patches` patches and `targets` supervised tokens.

    Attention counts by document and as a full square, as in PaLM (Chowdhery et al. 2022, appendix B) and torch's
    flop counter: the half that a causal kernel saves is not subtracted. The output projection counts at supervised
    tokens, where it is computed, and patches need no gradient, so their projection costs two thirds of the others'.
    A routed block counts for the tokens that pass it; what fills its capacity beyond them doesn't count.

    Args:
        config: Of the decoder.
        document_lengths: Tokens of each document.
        patches: Patches of the row.
        targets: Supervised tokens of the row.
        passing: How many tokens of each document pass, for each routed block; None takes the shares asked for.
        dense: The part by which the shares are still annealed (`Progress.dense`); matters where `passing` is None.
    """
    query_width, kv_width = config.heads * config.head_size, config.kv_heads * config.head_size
    kv_matrices = config.width * 2 * kv_width
    fuyu = config.dialect == "fuyu"
    block_matrices = config.width * (2 * query_width + (2 if fuyu else 3) * config.feed_forward) + kv_matrices
    norm_vectors = 2 if fuyu else 1
    block_vectors = norm_vectors * (2 * config.width + 2 * config.head_size)
    if fuyu:
        block_vectors += query_width + 2 * kv_width + config.feed_forward + 2 * config.width
    projection = config.patch_values * config.width
    embedding = config.vocab_size * config.width
    tokens = sum(document_lengths)

    def block_flops(asking: Counts, seen: Counts, known: int | float) -> int | float:
        """Of tokens that ask, by document, keys that they see, by document, and tokens whose keys are computed."""
        square = sum(a * s for a, s in zip(asking, seen, strict=True))
        return 2 * ((block_matrices - kv_matrices) * sum(asking) + kv_matrices * known) + 4 * query_width * square

    if passing is None:
        passing = [
            [length * share for length in document_lengths] for share in _shares_of_row(config, tokens, patches, dense)
        ]
    through_blocks = (config.layers - len(config.routed)) * block_flops(document_lengths, document_lengths, tokens)
    for counts in passing:
        if config.routing is not None and config.routing.skipped == "keys":
            through_blocks += block_flops(counts, document_lengths, tokens)
        else:
            through_blocks += block_flops(counts, counts, sum(counts))
    output, patch = 2 * embedding * targets, 2 * projection * patches
    rules = len(config.routed) * _rule_parameters(config)
    # The predictor of `topk` sends no gradient to the states it reads.
    inner = config.width // 2 if config.routing is not None and config.routing.rule == "topk" else 0
    first, second = (2 * len(config.routed) * inner * outer * tokens for outer in (config.width, 1))
    return Cost(
        parameters=config.layers * (block_matrices + block_vectors)
        + (projection + config.width)
        + embedding * (1 if config.tie_embeddings else 2)
        + norm_vectors * config.width
        + rules,
        tokens=tokens,
        forward_flops=round(through_blocks + output + patch + first + second),
        training_flops=round(3 * (through_blocks + output + second) + 2 * (patch + first)),
    )


def _shares_of_row(config: FuyuConfig, tokens: int, patches: int, dense: float) -> list[float]:
    shares = [config.shares(block) for block in config.routed]
    asked = [(share.patches * patches + share.others * (tokens - patches)) / max(1, tokens) for share in shares]
    return [annealed(share, dense) for share in asked]


def _rule_parameters(config: FuyuConfig) -> int:
    if config.routing is None or config.routing.rule in ("fixed", "random"):
        return 0
    inner = config.width // 2
    predictor = config.width * inner + 2 * inner + 1 if config.routing.rule == "topk" else 0
    return config.width + predictor


def decode_step_flops(config: FuyuConfig, keys: Counts) -> int:
    """Operations of one more token in each sequence of a dense decoder; it sees so many keys, its own among them."""
    assert config.routing is None
    alone = cost(config, document_lengths=(1,) * len(keys), patches=0, targets=len(keys)).forward_flops
    return alone + round(4 * config.heads * config.head_size * config.layers * (sum(keys) - len(keys)))
