"""What can be wrong for a user, the whole run or one sample of its data, and the exit code that says so.

Exit codes:

0    done
2    what was asked for can't be done: a setting or a file is wrong
3    too many steps in a row had to be skipped
4    the watch ended a run that stood still
5    another host of the run is lost
6    the time of this start is over and steps are left: saved, and can go on
130  SIGINT (Ctrl-C), 143 SIGTERM, 138 SIGUSR1: saved, and can go on
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRONG_USE = 2
BAD_STEPS = 3
STUCK = 4
HOST_LOST = 5
TIME_OVER = 6
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""The signals that end a training behind a whole step; SIGUSR1 is what SLURM's `--signal=USR1@60` sends."""


def of_signal(number: int) -> int:
    """Returns the code of a run that a signal ended, as shells give it."""
    return 128 + number


class UserError(ValueError):
    """The run can't go on as it was asked for: a setting or a file is wrong.

    The message is one sentence that names the file or setting and the remedy. The command line prints it
    without a traceback and leaves with `exit_code`.
    """

    exit_code = WRONG_USE


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around code that writes a file.

    Raises:
        UserError: It can't be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}): name another file.") from error


class UnusableSampleError(Exception):
    """One sample can't be used; the run skips it, counts it by `reason` and goes on.

    Attributes:
        reason: A short fixed slug such as `image-truncated`, the key under which it is counted. Never holds
            anything of the sample itself, so that the number of distinct reasons stays small.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
