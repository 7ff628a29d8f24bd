"""The profiler of a run without profiling."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch.profilers import PassThroughProfiler

_NOTHING = nullcontext()


class NoProfiler(PassThroughProfiler):
    """Measures nothing, at no cost.

    Lightning enters its profiler around each hook of each callback, over a hundred times a step, and its own empty
    profiler creates a generator each time.
    """

    def profile(self, action_name: str) -> AbstractContextManager[Any]:  # type: ignore[override]
        """Returns a context that does nothing."""
        return _NOTHING
