"""Logs how much depth each type of token gets over a run."""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from fuyu_e2e.data.lightning_internals import accumulates, steps_between_logs
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sequence import Prompt
from fuyu_e2e.inference.depth import KIND_NAMES, token_depth
from fuyu_e2e.inference.depth_map import depth_map
from fuyu_e2e.inference.generation import generate
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.routing.block import RoutedBlock, routed_blocks
from fuyu_e2e.model.routing.routers import Threshold
from fuyu_e2e.model.row import Row
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.tensorboard import shown_step, tensorboard_of


class RoutingReport(Callback):
    """Logs what routed blocks do; does nothing for a dense decoder.

    For each block, in training and in validation: the fraction of patches, newlines, text and answers that passed it.
    In training also its threshold, the spread of its scores and the tokens that exceeded its capacity. At each
    validation: the fraction of choices that changed since the last one on the same documents, and heat maps of some
    documents.

    Args:
        maps: Number of documents with heat maps.
        followed: Number of documents whose choices are compared between validations.
    """

    def __init__(self, maps: int = 4, followed: int = 32) -> None:
        self.maps = maps
        self.followed = followed
        self._training, self._validation = _Sums(), _Sums()
        self._prompts: list[Prompt] | None = None
        self._choices: Tensor | None = None

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Counts the row of a batch."""
        assert isinstance(pl_module, FuyuModule)
        if pl_module.config.routing is not None:
            self._training.add(pl_module.row)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Requests the figures of every `log_every_n_steps`-th step for the host, and resets them."""
        assert isinstance(pl_module, FuyuModule)
        if pl_module.config.routing is None or (trainer.global_step + 1) % steps_between_logs(trainer):
            return
        pl_module.beside |= self._training.figures("routing")
        for block in pl_module.decoder.blocks:
            if isinstance(block, RoutedBlock) and isinstance(block.rule, Threshold):
                for group, threshold in enumerate(block.rule.threshold.unbind()):
                    name = f"routing/block{block.rule.block}/threshold"
                    pl_module.beside[name if not group else f"{name}_of_others"] = threshold
        self._training = _Sums()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Logs the requested figures."""
        assert isinstance(pl_module, FuyuModule)
        if accumulates(trainer) or trainer.global_step % steps_between_logs(trainer):
            return
        assert pl_module.figures is not None
        for name, value in pl_module.figures.beside.items():
            pl_module.log(name, value)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resets the counts."""
        self._validation = _Sums()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PackedBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the row of a batch."""
        assert isinstance(pl_module, FuyuModule)
        if pl_module.config.routing is not None and batch.document_lengths:
            self._validation.add(pl_module.row)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the fractions over this process's rows."""
        for name, value in self._validation.figures("val/routing").items():
            pl_module.log(name, value)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compares choices with the last validation's, and draws heat maps, on the first process.

        Runs in the run's precision, like validation.
        """
        logger = tensorboard_of(trainer)
        assert isinstance(pl_module, FuyuModule)
        if pl_module.config.routing is None or trainer.sanity_checking or logger is None:
            return
        if (decoder := pl_module.whole_decoder()) is None:
            return
        if self._prompts is None:
            self._prompts = pl_module.datamodule.validation_prompts(max(self.maps, self.followed))
        shown = [prompt.sequence for prompt in self._prompts[: self.maps]]
        eos_id = pl_module.datamodule.tokenizer.eos_id
        with trainer.precision_plugin.forward_context():
            choices = self._choose(decoder, self._prompts[: self.followed])
            written = generate(decoder, shown, max_new_tokens=pl_module.max_new_tokens, eos_id=eos_id)
            depths = [token_depth(decoder, *pair) for pair in zip(shown, written, strict=True)]
        if self._choices is not None:
            changed = (choices != self._choices).float().mean()
            logger.experiment.add_scalar("val/routing/changed_choices", changed, shown_step(trainer))
        self._choices = choices
        for number, depth in enumerate(depths):
            picture = depth_map(depth, pl_module.datamodule.tokenizer)
            logger.experiment.add_image(
                f"routing/{number}", np.asarray(picture), shown_step(trainer), dataformats="HWC"
            )

    @staticmethod
    @torch.no_grad()
    def _choose(decoder: Decoder, prompts: list[Prompt]) -> Tensor:
        batch = pack_row([prompt.sequence for prompt in prompts]).to(decoder.embed_tokens.weight.device)
        row = decoder.row(batch)
        decoder.logits(batch, row)
        return torch.stack([routed.passed for routed in routed_blocks(row)])


class _Sums:
    """Counts over batches, on the device until they are logged."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.tokens = self.passed = self.dropped = torch.tensor(0)
        self.spread: Tensor | None = None

    def add(self, row: Row | None) -> None:
        """Adds the reports of one row's routed blocks."""
        if row is None or not (blocks := routed_blocks(row)):
            return
        self.blocks = [routed.block for routed in blocks]
        kinds = torch.stack([(row.types == kind) & row.info.valid for kind in KIND_NAMES])
        passed = torch.stack([(kinds & routed.passed).sum(dim=1) for routed in blocks])
        dropped = torch.stack([(routed.chosen & ~routed.passed).sum() for routed in blocks])
        scores = [routed.scores for routed in blocks if routed.scores is not None]
        # 0 on the host adds to a tensor of any device without a copy.
        self.tokens = self.tokens + kinds.sum(dim=1)
        self.passed = self.passed + passed
        self.dropped = self.dropped + dropped
        self.spread = torch.stack([score.std() for score in scores]) if scores else None

    def figures(self, prefix: str) -> dict[str, Tensor]:
        """Returns the figures to log, by name."""
        if not self.blocks:
            return {}
        figures = {}
        for row, block in enumerate(self.blocks):
            for column, name in enumerate(KIND_NAMES.values()):
                figures[f"{prefix}/block{block}/{name}"] = self.passed[row, column] / self.tokens[column].clamp(min=1)
            figures[f"{prefix}/block{block}/all"] = self.passed[row].sum() / self.tokens.sum()
            if self.spread is not None:
                figures[f"{prefix}/block{block}/score_spread"] = self.spread[row]
        figures[f"{prefix}/overflow"] = self.dropped.sum() / (self.tokens.sum() * len(self.blocks))
        return figures
