"""`python -m fuyu_e2e.ROOM NAME [options]`: finds and runs a benchmark or a study."""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pkgutil import resolve_name

from fuyu_e2e.errors import WRONG_USE, UserError
from fuyu_e2e.training.settings.arguments import did_you_mean
from fuyu_e2e.training.settings.environment import set_defaults


def run(program: str, kind: str, commands: Mapping[str, str], moved: Collection[str] = ()) -> int:
    """Runs the command that the command line names, and returns the exit code.

    Args:
        program: The package that was started.
        kind: What its commands are called.
        commands: The function for each name, which takes the options; imported after the environment is set.
        moved: Names of commands that are studies now.
    """
    set_defaults()
    name, *args = sys.argv[1:] or [""]
    if name in ("--help", "-h"):
        print(f"usage: python -m {program} NAME [--help]\n\nNAME is a {kind}: {', '.join(commands)}.")
        return 0
    if name in moved:
        print(f"{program}: {name} is a study now: say python -m fuyu_e2e.studies {name}.", file=sys.stderr)
        return WRONG_USE
    if name not in commands:
        hint = did_you_mean(name, commands) or f"choose from {', '.join(commands)}."
        print(f"{program}: There is no {kind} {name!r}: {hint}", file=sys.stderr)
        return WRONG_USE
    command: Callable[[Sequence[str]], None] = resolve_name(commands[name])
    try:
        command(args)
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.exit_code
    return 0
