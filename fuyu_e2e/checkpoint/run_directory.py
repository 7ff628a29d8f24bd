"""What lies in a run's directory, `trainer.default_root_dir`, and which directory a saved recipe belongs to."""

from pathlib import Path

CHECKPOINTS = "checkpoints"
RECIPE = "config.yaml"
"""The recipe that a run was started with, all settings spelled out."""


def run_of(recipe: Path) -> Path | None:
    """Returns the run that a recipe was saved for: the directory that it lies in beside that run's checkpoints.

    What the recipe itself names is where the run was when it was saved; it may have been moved or copied since.

    Returns:
        None where the recipe is no run's own.
    """
    return recipe.parent if recipe.name == RECIPE and (recipe.parent / CHECKPOINTS).is_dir() else None


def shown(path: str | Path) -> str:
    """Returns a path as a person types it: from the working directory on, where it lies in there."""
    path = Path(path)
    here = Path.cwd().resolve()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
