"""Perplexity agrees with torchmetrics' own."""

import torch
from torchmetrics.text import Perplexity

from fuyu_e2e.training.metrics import TokenLoss, TokenPerplexity


def test_perplexity_over_unequal_batches_is_torchmetrics() -> None:
    torch.manual_seed(0)
    ours, loss, theirs = TokenPerplexity(), TokenLoss(), Perplexity()
    for tokens in (3, 50, 1, 17):
        logits, targets = torch.randn(tokens, 11) * 2, torch.randint(0, 11, (tokens,))
        summed = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        ours.update(summed, tokens)
        loss.update(summed, tokens)
        theirs.update(logits[None], targets[None])
    torch.testing.assert_close(ours.compute(), theirs.compute())
    torch.testing.assert_close(loss.compute(), theirs.compute().log())
