"""Counts of the samples: how many were read and used, and how many were skipped for which reason."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fuyu_e2e.data.lightning_internals import accumulates, steps_between_logs
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.stream import Stream
from fuyu_e2e.distributed import DataRank, all_ranks
from fuyu_e2e.model.batch import PackedBatch


class DataReport(Callback):
    """Logs the counts of samples read, used and skipped by reason; prints those of validation, test and predict.

    `Ending` prints those of training.

    For a mixture it also logs the share of each source that was drawn, the share that was asked for, how many times
    the source was read, and the rung if the mixture climbs. Counts of training continue in a resumed run from its last
    complete step.
    """

    def __init__(self) -> None:
        self._evaluated = SampleStats()
        self._before, self._trained = SampleStats(), SampleStats()
        self._of_this_step = SampleStats()
        self._counts = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Selects one process to count among those that read the same rows."""
        self._counts = DataRank.of(trainer).first

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts of training over all processes and resumed runs, as primitives."""
        return self.training().to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the counts of the runs before."""
        self._before = SampleStats.from_dict(state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resets the counts of this run; those of the runs before are added when counts are shown."""
        self._trained, self._of_this_step = SampleStats(), SampleStats()

    def training(self) -> SampleStats:
        """Returns the counts of training over all processes and resumed runs; a collective."""
        return _total(self._before, *all_ranks(self._trained))

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resets the counts of a validation or test."""
        self._evaluated = SampleStats()

    on_test_epoch_start = on_validation_epoch_start

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Counts a batch once its step is done, and logs the counts at every `log_every_n_steps`-th step."""
        self._add(self._of_this_step, trainer)
        if accumulates(trainer):
            return
        self._trained.add(self._of_this_step.take())
        if trainer.global_step % steps_between_logs(trainer) == 0:
            stats = self.training()
            pl_module.log("data/read", float(stats.read))
            for reason, count in stats.skipped.items():
                pl_module.log(f"data/skipped/{reason}", float(count))
            if stats.read_of:
                self._log_mixture(trainer, pl_module, stats)

    def _log_mixture(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stats: SampleStats) -> None:
        stream: Stream = trainer.train_dataloader.rows.stream  # type: ignore[union-attr]
        drawn = stats.tokens_of if stream.mix_by == "tokens" else stats.used_of
        if stream.climb is not None:
            pl_module.log("data/rung", float(stream.rung(trainer.global_step)))
        for source, share in zip(stream.sources, stream.shares(trainer.global_step), strict=True):
            pl_module.log(f"data/share_asked/{source.name}", share)
            pl_module.log(f"data/share_drawn/{source.name}", drawn[source.name] / max(1, drawn.total()))
            documents = sum(facts.documents for facts in source.facts)
            pl_module.log(f"data/epoch/{source.name}", stats.read_of[source.name] / documents)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Counts a batch of a validation or test."""
        self._add(self._evaluated, trainer)

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def _add(self, stats: SampleStats, trainer: pl.Trainer) -> None:
        if self._counts:
            stats.add(trainer.datamodule.row.stats)  # type: ignore[attr-defined]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the validation data's counts if anything was skipped or cut."""
        if not trainer.sanity_checking:
            self._print("val", self._evaluated, only_losses=True)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the test data's counts."""
        self._print("test", self._evaluated)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the counts of the documents to be continued."""
        self._print("predict", trainer.datamodule.prompt_tally)  # type: ignore[attr-defined]

    def _print(self, split: str, own: SampleStats, only_losses: bool = False) -> None:
        stats = _total(*all_ranks(own))
        if not only_losses or stats.skipped or stats.tokens_cut:
            rank_zero_info(f"\n{split} data: {stats.summary()}")
        for example in stats.examples.values():
            rank_zero_warn(f"{split} data, skipped for example: {example}")


def _total(*parts: SampleStats) -> SampleStats:
    total = SampleStats()
    for part in parts:
        total.add(part)
    return total
