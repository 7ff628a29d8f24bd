"""How the program leaves: what its exit code tells whoever started it.

0    done
2    what was asked for can't be done: a setting or a file is wrong
3    too many steps in a row had to be skipped
4    the watch ended a run that stood still
5    another host of the run is lost
6    the time of this start is over and steps are left: saved, and can go on
130  SIGINT (Ctrl-C), 143 SIGTERM, 138 SIGUSR1: saved, and can go on
"""

import signal

WRONG_USE = 2
BAD_STEPS = 3
STUCK = 4
HOST_LOST = 5
TIME_OVER = 6
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""The signals that end a training behind a whole step; SIGUSR1 is what SLURM's `--signal=USR1@60` sends."""


def of_signal(number: int) -> int:
    """The code of a run that a signal ended, as shells give it."""
    return 128 + number
