"""Errors that a user or the data can cause, and the exit codes of the command line.

Exit codes:

0    done
1    `shards verify` found a difference
2    the request can't be carried out: a setting or a file is wrong
3    too many steps in a row had to be skipped
4    the watchdog ended a run that made no progress
5    another host of the run was lost
6    the time of this start is over and steps are left: saved, and can be resumed
130  SIGINT (Ctrl-C), 143 SIGTERM, 138 SIGUSR1: saved, and can be resumed
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FAULTY = 1
WRONG_USE = 2
BAD_STEPS = 3
STUCK = 4
HOST_LOST = 5
TIME_OVER = 6
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""The signals that end a training after a complete step; SLURM's `--signal=USR1@60` sends SIGUSR1."""


def of_signal(number: int) -> int:
    """Returns the exit code of a run that a signal ended, by the shells' convention: 128 + number."""
    return 128 + number


class UserError(ValueError):
    """The run can't continue as requested: a setting or a file is wrong.

    The message is one sentence that names the file or setting and the remedy. The command line prints it without a
    traceback and exits with `exit_code`.
    """

    exit_code = WRONG_USE


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError in the block, which writes `path`, into a sentence for the user.

    Raises:
        UserError: The file can't be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}): name another file.") from error


class UnusableSampleError(Exception):
    """One sample can't be used; the run skips it, counts it by `reason` and continues.

    Attributes:
        reason: A short fixed slug such as `image-truncated`, the key under which it is counted. Never contains any
            part of the sample, so that the number of distinct reasons stays small.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
