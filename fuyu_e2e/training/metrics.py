"""Means over tokens or documents, independent of batch sizes."""

import torch
from torch import Tensor
from torchmetrics import Metric

from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.decoder import TokenScores


class Mean(Metric):
    """A mean from sums over batches and ranks, in float64.

    torchmetrics' MeanMetric takes means, which a row without supervised tokens has none of, and adds in float32.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.total: Tensor
        self.count: Tensor

    def update(self, total: Tensor, count: int) -> None:
        """Adds the sum of `count` values."""
        self.total += total.detach()
        self.count += count

    def compute(self) -> Tensor:
        """Returns the mean; nan without any value."""
        return (self.total / self.count).float()


class Perplexity(Mean):
    """The exponential of the mean loss.

    torchmetrics' Perplexity needs the logits of all positions at once, which are never in memory for a packed row.
    """

    def compute(self) -> Tensor:
        """Returns the perplexity; nan without any value."""
        return super().compute().exp()


def evaluation_metrics() -> torch.nn.ModuleDict:
    """Returns the metrics of a validation or test, by name: those of `evaluation_sums`, and perplexity."""
    return torch.nn.ModuleDict(
        {"loss": Mean(), "perplexity": Perplexity(), "token_accuracy": Mean(), "exact_match": Mean()}
    )


def evaluation_sums(scores: TokenScores, batch: PackedBatch) -> dict[str, tuple[Tensor, int]]:
    """Returns for each metric what a packed batch adds to it: a sum and the number of its terms.

    `exact_match` counts documents whose supervised tokens are all the likeliest. If a document's last text alone is
    supervised, greedy generation gives exactly that text.
    """
    tokens, documents = batch.targets.numel(), len(batch.document_lengths)
    missed = torch.zeros(documents, dtype=torch.int64, device=scores.likeliest.device)
    missed.index_add_(0, batch.target_documents, (~scores.likeliest).long())
    loss = scores.losses.sum()
    return {
        "loss": (loss, tokens),
        "perplexity": (loss, tokens),
        "token_accuracy": (scores.likeliest.sum(), tokens),
        "exact_match": ((missed == 0).sum(), documents),
    }
