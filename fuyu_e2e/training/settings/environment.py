"""Environment variables that libraries read when they are loaded."""

import os

SPIN_COUNT = "1000"
"""How often a waiting thread of torch's OpenMP (GNU's) checks for work before it sleeps.

A step has many short parallel regions. Threads that sleep at once (`OMP_WAIT_POLICY=PASSIVE`) cost a third of the
speed of two idle cores; threads that spin as long as OpenMP's default keep a busy core from the thread they wait for.
docs/speed.md has the figures.
"""


def set_defaults() -> None:
    """Sets what the user has not set; call it before torch is imported. Child processes inherit it."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
