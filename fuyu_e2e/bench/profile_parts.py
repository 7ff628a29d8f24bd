"""Splits the time of a training step by part of the model, with torch's profiler.

An operation belongs to the part whose module ran it; in the backward pass, to the part of the forward operation with
the same autograd number.

- attention: attention modules themselves: rotary positions, grouping by length, softmax(QK)V
- projections: the linear layers of blocks and of patches
- loss: everything after the last norm: selecting supervised positions, logits, cross-entropy
- optimizer: clipping, update, zeroing gradients
- data: waiting for the next row
- rest: norms, activations, residuals, embeddings, planning the row's attention, accumulating gradients
- idle: time of the step without any operation: Python between operations; on a GPU, the GPU waiting
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.blocks.block import Block
from fuyu_e2e.model.decoder import Decoder

PARTS = ("attention", "projections", "loss", "optimizer", "data", "rest")
PREFIX = "part: "
WHOLE = ("data", "optimizer")
"""Parts whose Python time counts, too."""
BACKWARD = 1
"""The profiler's scope of operations in the backward pass."""


class _Ranges:
    """Opens and closes a part's range when a module starts and ends."""

    def __init__(self) -> None:
        self.open: list[record_function] = []

    def enter(self, part: str) -> None:
        self.open.append(record_function(PREFIX + part))
        self.open[-1].__enter__()

    def leave(self) -> None:
        self.open.pop().__exit__(None, None, None)

    def watch(self, module: nn.Module, part: str) -> list[Any]:
        """Registers hooks that assign everything in a module to a part, and returns them."""
        return [
            module.register_forward_pre_hook(lambda *_: self.enter(part)),
            module.register_forward_hook(lambda *_: self.leave()),
        ]


def profile_parts(
    decoder: Decoder,
    rows: Iterator[PackedBatch],
    update: Callable[[], None],
    steps: int,
    device: str,
) -> dict[str, float]:
    """Trains for some steps; returns the milliseconds of a step by part, and `idle`.

    Args:
        decoder: Must not be compiled, or its modules couldn't be distinguished.
        rows: At least two more than `steps`.
        update: Applies the gradients and drops them.
        steps: Number of measured steps.
        device: The decoder's device.

    Returns:
        Milliseconds for each of `PARTS` and `idle`; they add up to the step's time.
    """
    ranges = _Ranges()
    hooks = [hook for module, part in _modules(decoder) for hook in ranges.watch(module, part)]
    hooks.append(decoder.norm.register_forward_hook(lambda *_: ranges.enter("loss")))

    def step() -> None:
        with record_function(PREFIX + "data"):
            batch = next(rows).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"), record_function(PREFIX + "rest"):
            loss = decoder.loss(batch)
            ranges.leave()
        (loss / batch.targets.numel()).backward()
        with record_function(PREFIX + "optimizer"):
            update()

    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.remove)
        step()
        step()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        with profile(activities=activities) as profiler:
            started_at = time.perf_counter()
            for _ in range(steps):
                step()
            if device == "cuda":
                torch.cuda.synchronize()
            wall = time.perf_counter() - started_at
    milliseconds = {part: micro / 1e3 / steps for part, micro in _sum_up(profiler.events(), device).items()}
    return milliseconds | {"idle": max(0.0, wall * 1e3 / steps - sum(milliseconds.values()))}


def _modules(decoder: Decoder) -> Iterator[tuple[nn.Module, str]]:
    yield decoder.patch_projection, "projections"
    for block in decoder.blocks:
        assert isinstance(block, Block)
        for module in block.modules():
            if isinstance(module, nn.Linear):
                yield module, "projections"
            elif module is block.attention:
                yield module, "attention"
            elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
                yield module, "rest"


def _sum_up(events: Any, device: str) -> dict[str, float]:
    """Returns the microseconds of each part, over all events."""
    sums = dict.fromkeys(PARTS, 0.0)
    for event, part in _by_part(events):
        if device == "cuda":
            sums[part] += event.self_device_time_total
        elif not event.name.startswith(PREFIX) or part in WHOLE:
            sums[part] += event.self_cpu_time_total
    return sums


def _by_part(events: Any) -> Iterator[tuple[Any, str]]:
    """Yields the host's events, each with its part."""
    host = sorted(
        (event for event in events if event.device_type == torch.autograd.DeviceType.CPU),
        key=lambda event: event.time_range.start,
    )
    forward: dict[int, str] = {}
    for event in host:
        part = _range_of(event)
        if part is not None and event.scope != BACKWARD and event.sequence_nr >= 0:
            forward[event.sequence_nr] = part  # the last operation with a number is the one with a gradient
    for event in host:
        part = _range_of(event)
        yield event, forward.get(_backward_number(event), "rest") if part is None else part


def _range_of(event: Any) -> str | None:
    """Returns the innermost part around an event; in the backward pass None, except for recomputed operations."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        event = event.cpu_parent
    return None


def _backward_number(event: Any) -> int:
    """Returns the number that a backward operation shares with its forward operation; -1 if there is none."""
    while event is not None:
        if event.scope == BACKWARD:
            return event.sequence_nr
        event = event.cpu_parent
    return -1
