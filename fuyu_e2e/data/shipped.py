"""Paths of the files that come with the project, in `data/` and `recipes/`."""

from pathlib import Path

from fuyu_e2e.errors import UserError


def shipped(name: str) -> Path:
    """Returns the path of a shipped file, such as `recipes/quickstart.yaml`, in a clone or an installed wheel.

    Raises:
        UserError: It is in neither place.
    """
    package = Path(__file__).parents[1]
    for root in (package.parent, package / "_shipped"):
        if (root / name).exists():
            return root / name
    raise UserError(f"{name} is missing from {package.parent}: install fuyu-e2e again.")
