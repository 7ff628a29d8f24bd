"""The layout of a run's directory, `trainer.default_root_dir`, and the directory that a saved recipe belongs to."""

from pathlib import Path

CHECKPOINTS = "checkpoints"
RECIPE = "config.yaml"
"""The recipe that a run was started with, with all settings."""


def run_of(recipe: Path) -> Path | None:
    """Returns the run that a recipe was saved for: its folder, if that has the run's checkpoints.

    The directory named in the recipe is where the run was when it was saved; it may have been moved or copied since.

    Returns:
        None if the recipe doesn't belong to a run.
    """
    return recipe.parent if recipe.name == RECIPE and (recipe.parent / CHECKPOINTS).is_dir() else None


def shown(path: str | Path) -> str:
    """Returns a path as a person would type it: relative to the working directory, if it lies in there."""
    path = Path(path)
    here = Path.cwd().resolve()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
