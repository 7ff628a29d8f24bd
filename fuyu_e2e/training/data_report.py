"""What became of the samples: every sample that was left out, by reason."""

from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fuyu_e2e.batch import PackedBatch
from fuyu_e2e.tally import Tally
from fuyu_e2e.training.module import steps_between_logs


class DataReport(Callback):
    """Logs how many samples were read, used and skipped by reason, and prints them at the end of an epoch."""

    def __init__(self) -> None:
        self.tallies: dict[str, Tally] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts anew."""
        self.tallies["train"] = Tally()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts anew."""
        self.tallies["val"] = Tally()

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts anew."""
        self.tallies["test"] = Tally()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Counts a batch, and logs the counts of this process at every `log_every_n_steps`-th step."""
        tally = self.tallies["train"]
        tally.add(batch.tally)
        if trainer.global_step % steps_between_logs(trainer) == 0:
            pl_module.log("data/read", float(tally.read))
            for reason, count in tally.skipped.items():
                pl_module.log(f"data/skipped/{reason}", float(count))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PackedBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts a batch."""
        self.tallies["val"].add(batch.tally)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PackedBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts a batch."""
        self.tallies["test"].add(batch.tally)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the training data's counts."""
        self._print("train")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the validation data's counts where something was left out."""
        if not trainer.sanity_checking:
            self._print("val", only_losses=True)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the test data's counts."""
        self._print("test")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints what became of the documents to be continued."""
        self.tallies["predict"] = trainer.datamodule.prompt_tally  # type: ignore[attr-defined]
        self._print("predict")

    def _print(self, split: str, only_losses: bool = False) -> None:
        tally = _over_ranks(self.tallies[split])
        if not only_losses or tally.skipped or tally.tokens_cut:
            rank_zero_info(f"\n{split} data: {tally.summary()}")
        for example in tally.examples.values():
            rank_zero_warn(f"{split} data, skipped for example: {example}")


def _over_ranks(tally: Tally) -> Tally:
    if not (dist.is_available() and dist.is_initialized()):
        return tally
    tallies: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(tallies, tally)
    total = Tally()
    for one in tallies:
        total.add(one)
    return total
