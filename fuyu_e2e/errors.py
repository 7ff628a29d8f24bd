"""The two ways in which something can be wrong for a user: the whole run, or one sample of its data."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fuyu_e2e.exit_codes import WRONG_USE


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
