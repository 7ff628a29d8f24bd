"""Saves the recipe of a run with all its settings."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback

from fuyu_e2e.distributed import from_first
from fuyu_e2e.errors import UserError


class SaveRecipe(SaveConfigCallback):
    """Writes the whole recipe, defaults included, as `config.yaml` into the directory of a training run.

    Waits until training starts: a checkpoint or a setting may still be refused, and the recipe of the run to be
    resumed must not have changed then.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Does nothing; Lightning would write the recipe here."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the recipe on the first process, over the one from before a resume.

        Raises:
            UserError: The directory can't be written; raised on all processes, so that none waits for another.
        """
        from_first(lambda: self.save_config(trainer, pl_module, "fit"), UserError)

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Writes the recipe atomically, by a rename: the directory has either the old or the new one, complete.

        Raises:
            UserError: The directory can't be written.
        """
        root = Path(trainer.default_root_dir)
        recipe = self.config.clone()
        recipe.pop("ckpt_path", None)  # of this start, not of the run
        unfinished = root / f".unfinished-{self.config_filename}"
        try:
            root.mkdir(parents=True, exist_ok=True)
            unfinished.touch()  # the system says better than jsonargparse why it can't be written
            self.parser.save(recipe, unfinished, skip_none=False, overwrite=True)
            unfinished.replace(root / self.config_filename)
        except (PermissionError, NotADirectoryError, FileNotFoundError, FileExistsError) as error:
            raise UserError(
                f"trainer.default_root_dir {root} can't be written ({error.strerror}): name another directory."
            ) from error
