"""Environment variables that libraries read once, as they are loaded."""

import os

SPIN_COUNT = "1000"
"""How often a waiting thread of GNU's OpenMP, torch's own, looks again before it sleeps.

A step has many short parallel regions. Threads that sleep at once (`OMP_WAIT_POLICY=PASSIVE`) cost a third of two
cores' speed at rest; threads that spin as long as OpenMP's default keep a busy core from the thread they wait for.
docs/speed.md has the figures.
"""


def set_defaults() -> None:
    """Sets what the user has not set; to be called before torch is imported, and inherited by child processes."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
