"""`fuyu-e2e fit|validate|test|predict`: Lightning's commands, with a recipe."""

from collections.abc import Sequence

from fuyu_e2e.cli.starting import starting
from fuyu_e2e.errors import UserError
from fuyu_e2e.training.settings.setting_errors import reason


def lightning(args: Sequence[str]) -> int:
    """Runs a Lightning command; a run that a signal ended exits from within, with its own exit code.

    Raises:
        UserError: Lightning finds contradicting settings at its start.
    """
    with starting():
        from lightning.pytorch.utilities.exceptions import MisconfigurationException

        from fuyu_e2e.training.settings.recipe import FuyuCLI

    try:
        FuyuCLI(args)
    except MisconfigurationException as error:
        raise UserError(f"{reason(str(error))}.") from error
    return 0
