"""Loss and perplexity as means over tokens, independent of batch sizes."""

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenLoss(Metric):
    """The mean cross-entropy of supervised tokens, in nats, from sums over batches and ranks.

    torchmetrics' Perplexity needs the logits of all positions at once, which are never in memory for a packed row, and
    its MeanMetric the mean of each row, which one without supervised tokens has not.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")
        self.total: Tensor
        self.tokens: Tensor

    def update(self, loss_sum: Tensor, tokens: int) -> None:
        """Adds the summed loss of `tokens` supervised tokens."""
        self.total += loss_sum.detach()
        self.tokens += tokens

    def compute(self) -> Tensor:
        """Returns the mean; nan without any token."""
        return (self.total / self.tokens).float()


class TokenPerplexity(TokenLoss):
    """The exponential of the mean loss."""

    def compute(self) -> Tensor:
        """Returns the perplexity; nan without any token."""
        return super().compute().exp()
