"""The progress bar: tokens seen, tokens/s and loss."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from fuyu_e2e.training.module import FuyuModule

REDRAWN = 4
"""Times a second. A terminal's bar takes a millisecond to draw, in which Python does nothing else, and Lightning would
draw it a hundred times: a tenth of the run."""


class Progress(RichProgressBar):
    """Lightning's bar with figures as a person reads them, drawn as often as one looks."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=REDRAWN)

    @property
    def total_train_batches(self) -> int | float:
        """Micro-batches of a process in the whole run: Lightning's are those still to come, as if each were a step."""
        if self.trainer.max_steps < 0:
            return super().total_train_batches
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The figures behind the bar, those that are known by now."""
        known = trainer.progress_bar_metrics
        formats = {"train/loss": "{:.3f}", "val/loss": "{:.3f}", "test/loss": "{:.3f}"}
        shown = {name: text.format(known[name]) for name, text in formats.items() if name in known}
        if trainer.state.fn == TrainerFn.FITTING and isinstance(pl_module, FuyuModule):
            shown["tokens"] = _short(float(pl_module.tokens_seen))
        if "tokens/s" in known:
            shown["tokens/s"] = _short(float(known["tokens/s"]))
        return dict(shown)


def _short(count: float) -> str:
    """A count in at most five letters: 950, 12.3k, 4.56M, 7.89B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return f"{count:.0f}"
