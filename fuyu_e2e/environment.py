"""Environment variables that libraries read once, as they are loaded."""

import os

DEFAULTS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Lets OpenMP's waiting threads sleep instead of spin, which starves them and others where cores are shared."""


def set_defaults() -> None:
    """Sets what the user has not set; to be called before torch is imported, and inherited by child processes."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
