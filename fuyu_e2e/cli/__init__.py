"""The command line: one file a command, whose code is imported when it is called."""

from fuyu_e2e.cli.main import main

__all__ = ["main"]
