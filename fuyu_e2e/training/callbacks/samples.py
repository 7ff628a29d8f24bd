"""Logs sample generations at each validation, with the images that they are about."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from fuyu_e2e.data.sequence import Prompt
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.tensorboard import shown_step, tensorboard_of


class SampleGenerations(Callback):
    """Continues the first validation documents at each validation, and logs images and texts to TensorBoard.

    Runs in the run's precision, like validation.

    Args:
        count: Number of documents.
    """

    def __init__(self, count: int = 4) -> None:
        self.count = count
        self._prompts: list[Prompt] | None = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Generates and logs, on the first process."""
        logger = tensorboard_of(trainer)
        if trainer.sanity_checking or logger is None:
            return
        assert isinstance(pl_module, FuyuModule)
        if (decoder := pl_module.whole_decoder()) is None:
            return
        if self._prompts is None:
            self._prompts = pl_module.datamodule.validation_prompts(self.count)
        with trainer.precision_plugin.forward_context():
            texts = pl_module.continue_prompts(self._prompts, decoder)
        for index, (prompt, text) in enumerate(zip(self._prompts, texts, strict=True)):
            written = f"truth:\n\n    {prompt.truth}\n\ngenerated:\n\n    {text}"
            logger.experiment.add_text(f"samples/{index}", written, shown_step(trainer))
            for number, pixels in enumerate(prompt.sequence.unpadded_pictures):
                logger.experiment.add_image(
                    f"samples/{index}/image{number}", torch.from_numpy(pixels), shown_step(trainer), dataformats="HWC"
                )
