"""How often the host waits for the device in a step of the real trainer, and on which lines.

On a GPU torch tells of each operation that lets the host wait, and copies from memory that isn't pinned, which wait
without being told of, are counted beside. On a CPU the numbers that the host reads from tensors are counted instead.
"""

import os
import traceback
import warnings
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from fuyu_e2e.bench.limit import prepare, quickstart_run
from fuyu_e2e.bench.measure import Figures, environment

STEPS = 30
FIRST = 8
"""Steps before those that are counted: kernels are chosen, and the optimizer's state is made."""
LINES = 12
"""Lines that are shown, of those that wait most often."""
CASES = {
    "a step": (),
    "a step of 4 micro-batches": ("--trainer.accumulate_grad_batches=4",),
    "a step under fsdp2": ("--trainer.strategy=fsdp2",),
}
READ = torch.ops.aten._local_scalar_dense.default
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class Waits(TorchDispatchMode):
    """Counts waits by line, while it is told to."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.counting = False
        self.waits: Counter[str] = Counter()
        self.pageable: Counter[str] = Counter()
        """Copies to the device from memory that isn't pinned."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if self.counting and operation in COPIES and result.is_cuda:
            source = args[1] if operation is COPIES[0] else args[0]
            if source.device.type == "cpu" and not source.is_pinned():
                self.pageable[_line()] += 1
        if self.counting and operation is READ and self.device == "cpu":
            self.waits[_line()] += 1
        return result

    @contextmanager
    def warned(self) -> Iterator[None]:
        """Counts torch's warnings of a wait."""
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            show = warnings.showwarning

            def count(message: Warning | str, *args: Any, **kwargs: Any) -> None:
                if "synchroniz" not in str(message):
                    show(message, *args, **kwargs)
                elif self.counting:
                    self.waits[_line()] += 1

            warnings.showwarning = count  # which catch_warnings puts back
            yield

    def begin(self) -> None:
        self.counting = True
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")

    def end(self) -> None:
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        self.counting = False


def _line() -> str:
    """The innermost lines of ours and of Lightning that are running."""
    frames = [f for f in traceback.extract_stack() if "/fuyu_e2e/" in f.filename or "/lightning/" in f.filename]
    inner = frames[:-4:-1]
    return " < ".join(f"{os.path.relpath(f.filename).rpartition('site-packages/')[2]}:{f.lineno}" for f in inner)


class Counting(Callback):
    """Counts from one step on to the last."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == FIRST and not self.waits.counting:
            self.waits.begin()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == STEPS - 1:
            self.waits.end()


def count(folder: Path, device: str, further: tuple[str, ...]) -> Waits:
    """What waits in the steps of a run."""
    waits = Waits(device)
    run = quickstart_run(folder, device, STEPS, further)
    run.trainer.callbacks.append(Counting(waits))
    with waits.warned(), waits:
        run.trainer.fit(run.model, datamodule=run.datamodule)
    return waits


def control(device: str) -> int:
    """How many waits are seen where there is one."""
    waits = Waits(device)
    value = torch.ones((), device=device)
    with waits.warned(), waits:
        waits.begin()
        float(value)
        waits.end()
    return waits.waits.total()


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counted = STEPS - 1 - FIRST
    figures = Figures(options.out, environment(device) | {"steps": counted})
    seen = control(device)
    checks: list[dict[str, Any]] = [
        {"what": "waits seen where there is one", "measured": seen, "expected": "at least 1", "holds": seen >= 1}
    ]
    lines: dict[str, Any] = {}
    with TemporaryDirectory() as name:
        prepare(Path(name))
        for case, further in CASES.items():
            waits = count(Path(name), device, (*further, f"--trainer.default_root_dir={name}/{len(lines)}"))
            for what, found, most in (("waits", waits.waits, 1), ("pageable copies", waits.pageable, 0)):
                measured = found.total() / counted
                checks.append(
                    {
                        "what": f"{what} of {case}",
                        "measured": round(measured, 2),
                        "expected": f"at most {most}",
                        # A CPU's tensors are the host's: reading some, as the optimizer does, is no wait.
                        "holds": measured <= most if device == "cuda" else None,
                    }
                )
                lines[f"{what} of {case}"] = dict(found.most_common(LINES))
            figures.keep(checks=checks, lines=lines)
    figures.end()


if __name__ == "__main__":
    main()
