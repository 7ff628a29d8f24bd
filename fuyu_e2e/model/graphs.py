"""How many graphs the compiled parts of a decoder may be made into, and what is said where there are more."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch._dynamo.utils import counters

GRAPHS = 64
"""Graphs of a function kept at most, of all decoders of a process, where torch's own limit is 8.

A block is compiled once for all blocks of its kind, but again with and without gradients, for another
type, and once or twice more as each of these turns out to vary: the documents of a row, the length of the longest, and
the capacity and number of a block that selects tokens. Of decoding steps, there is one for each number of prompts and
each length's power of two."""


def many_graphs() -> AbstractContextManager[None]:
    """A context in which what is compiled is called: entered once for many calls, since entering takes its time."""
    # Blocks that know their numbers would each be compiled for its own.
    return torch._dynamo.config.patch(recompile_limit=GRAPHS, allow_unspec_int_on_nn_module=True)


@contextmanager
def noticing_too_many() -> Iterator[None]:
    """The same, with a warning where something was too varied for it, and will run uncompiled from now on."""
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
    """How often in this process something wasn't compiled for being compiled too often."""
    return sum(count for reason, count in counters["unimplemented"].items() if "limit exceeded" in reason)
