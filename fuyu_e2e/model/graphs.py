"""The limit on graphs of a decoder's compiled parts, and the warning when it is reached."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch._dynamo.utils import counters

GRAPHS = 64
"""The most graphs of one function, over all decoders of a process; torch's own limit is 8.

One graph serves all blocks of a kind. Further ones are compiled with and without gradients, for another dtype, and
once or twice for each size that turns out to vary: the documents of a row, the longest length, and the capacity and
number of a block that selects tokens. Decoding steps have one for each number of prompts and each power of two in
length."""


def many_graphs() -> AbstractContextManager[None]:
    """Returns a context for calls of compiled code; enter it once for many calls, since entering takes time."""
    # Without the second setting, a block that knows its number would be compiled for each number.
    return torch._dynamo.config.patch(recompile_limit=GRAPHS, allow_unspec_int_on_nn_module=True)


@contextmanager
def noticing_too_many() -> Iterator[None]:
    """Enters `many_graphs`, and warns if the limit was reached; rows of further kinds then run uncompiled."""
    before = _refused()
    with many_graphs():
        yield
    if _refused() > before:
        warnings.warn(
            f"A block was compiled for {GRAPHS} kinds of rows, and no more are kept: rows of other kinds run "
            "uncompiled from now on, which is slower. TORCH_LOGS=recompiles shows in what they differ; without "
            "model.compile, all run alike.",
            stacklevel=3,
        )


def _refused() -> int:
    """Returns how often in this process a function wasn't compiled because it had too many graphs."""
    return sum(count for reason, count in counters["unimplemented"].items() if "limit exceeded" in reason)
