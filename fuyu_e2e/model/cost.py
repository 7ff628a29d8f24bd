"""What a decoder costs: parameters, and floating-point operations of a row, counted exactly."""

from dataclasses import dataclass

from fuyu_e2e.model.config import FuyuConfig


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


def cost(config: FuyuConfig, *, document_lengths: tuple[int, ...], patches: int, targets: int) -> Cost:
    """Counts a row of documents with these lengths that holds `patches` patches and `targets` supervised tokens.

    Attention counts by document and as a full square, as in PaLM (Chowdhery et al. 2022, appendix B) and torch's
    flop counter: the half that a causal kernel saves is not subtracted. The output projection counts at supervised
    tokens, where it is computed, and patches need no gradient, so their projection costs two thirds of the others'.
    """
    query_width, kv_width = config.heads * config.head_size, config.kv_heads * config.head_size
    block_matrices = config.width * (2 * query_width + 2 * kv_width + 3 * config.feed_forward)
    block_norms = 2 * config.width + 2 * config.head_size
    projection = config.patch_values * config.width
    embedding = config.vocab_size * config.width

    tokens = sum(document_lengths)
    attention = 4 * query_width * sum(length**2 for length in document_lengths)
    through_blocks = config.layers * (2 * block_matrices * tokens + attention)
    output, patch = 2 * embedding * targets, 2 * projection * patches
    return Cost(
        parameters=config.layers * (block_matrices + block_norms)
        + (projection + config.width)
        + embedding * (1 if config.tie_embeddings else 2)
        + config.width,
        tokens=tokens,
        forward_flops=through_blocks + output + patch,
        training_flops=3 * (through_blocks + output) + 2 * patch,
    )
