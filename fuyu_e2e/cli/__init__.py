"""The command line: one file for each command, whose dependencies are imported when it runs."""

from fuyu_e2e.cli.main import main

__all__ = ["main"]
