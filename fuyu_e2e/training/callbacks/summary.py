"""Describes the model that a run trains, in two lines."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities import rank_zero_info

from fuyu_e2e.model.cost import cost
from fuyu_e2e.training.module import FuyuModule


class Summary(ModelSummary):
    """Replaces Lightning's table, which has a single row and counts operations that it can't see as none."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the decoder's parameters and shape."""
        assert isinstance(pl_module, FuyuModule)
        config = pl_module.config
        parameters = cost(config, document_lengths=(1,), grids=(), targets=0).parameters
        kinds = "".join(
            f", {len(those)} of them {block.kind}" for block, those in pl_module.decoder.other_kinds.items()
        )
        rank_zero_info(
            f"\nDecoder of {parameters:,} parameters: {config.layers} blocks of width {config.width:,}{kinds}, "
            f"{config.vocab_size:,} tokens, patches of {config.patch_size} pixels.\n"
            "What a step costs: fuyu-e2e estimate with the same settings."
        )
