"""The profiler of a run that is not profiled."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch.profilers import PassThroughProfiler

_NOTHING = nullcontext()


class NoProfiler(PassThroughProfiler):
    """Measures nothing, and takes no time for it.

    Lightning enters its profiler around each hook of each callback, over a hundred times a step; its own that measures
    nothing makes a generator each time.
    """

    def profile(self, action_name: str) -> AbstractContextManager[Any]:  # type: ignore[override]
        """Does nothing on entering and leaving."""
        return _NOTHING
