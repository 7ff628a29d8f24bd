"""`fuyu-e2e fit|validate|test|predict`: Lightning's commands, with a recipe."""

from collections.abc import Sequence

from fuyu_e2e.cli.starting import starting
from fuyu_e2e.errors import UserError
from fuyu_e2e.training.settings.setting_errors import reason


def lightning(args: Sequence[str]) -> int:
    """Runs Lightning's command; a run that a signal ended leaves from within, with an exit code of its own.

    Raises:
        UserError: Lightning finds settings that don't go together as it begins.
    """
    with starting():
        from lightning.pytorch.utilities.exceptions import MisconfigurationException

        from fuyu_e2e.training.settings.recipe import FuyuCLI

    try:
        FuyuCLI(args)
    except MisconfigurationException as error:
        raise UserError(f"{reason(str(error))}.") from error
    return 0
