"""Which of Lightning's settings don't work here, and what to say in their stead.

All others do what Lightning's documentation says. A setting that would be taken and mean something else is refused.
"""

from math import isnan

import lightning.pytorch as pl
from jsonargparse import Namespace

from fuyu_e2e.errors import UserError

SHARES = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches",
          "val_check_interval")  # fmt: skip
"""What Lightning takes a number of rows for, or a share of them."""
SEEDS = 2**32
"""numpy takes those below."""


def check_settings(settings: Namespace) -> None:
    """Refuses what can be told from a recipe alone, before Lightning builds anything of it.

    Raises:
        UserError: Names the setting.
    """
    seed = settings["seed_everything"]
    if isinstance(seed, bool) or not 0 <= seed < SEEDS:
        raise UserError(
            f"seed_everything is {str(seed).lower()}, but must be a whole number from 0 to {SEEDS - 1}: the order of "
            "the data follows from it."
        )
    trainer = settings["trainer"]
    for name in SHARES:
        if isinstance(value := trainer[name], float) and 0 < value < 1:
            raise UserError(
                f"trainer.{name} is {value}, a share of rows that nobody counts beforehand: say how many rows."
            )
    if trainer["model_registry"]:
        raise UserError(
            "trainer.model_registry doesn't work here: leave it out, and publish a run with fuyu-e2e export."
        )
    if settings["checkpoint"]["enable_version_counter"]:
        raise UserError(
            "checkpoint.enable_version_counter doesn't work here, since a run that goes on writes over the names that "
            "it had: leave it out."
        )


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuses a trainer that Lightning would take, but that doesn't work here.

    Raises:
        UserError: Names the setting.
    """
    clip = trainer.gradient_clip_val
    if clip is not None and (clip < 0 or isnan(clip)):
        raise UserError(f"trainer.gradient_clip_val is {clip}, but must be 0 (no clipping) or above.")
