"""SIGKILL while checkpoints are written: how many can't be read, or hold two steps, beside Lightning's own writing.

    python tests/training/kill_while_saving.py [--kills 50] [--out FILE.json]

A process writes checkpoint after checkpoint, each step's tensors filled with its number, and removes the one before.
It is killed at random moments, and once at each phase of writing. In shards, two processes write together; both are
killed, or one a moment before the other. Then what a resuming run would take is read: of ours the newest that
verifies, of Lightning's `last.ckpt`, which it writes over. Temporary files go to another file system (/dev/shm), as on
machines with a /tmp of their own. Linux only.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from fuyu_e2e.checkpoint import atomic as whole
from fuyu_e2e.checkpoint.lightning_io import read_checkpoint
from fuyu_e2e.checkpoint.run_checkpoints import newest
from fuyu_e2e.training.checkpoint_io import ShardedCheckpointIO, WholeCheckpointIO

TENSORS, VALUES = 40, 100_000
"""16 MB a checkpoint."""
RANKS = 2
"""Processes that write in shards."""


def state(step: int) -> dict[str, Any]:
    return {
        "global_step": step,
        "state_dict": {str(n): torch.full((VALUES,), float(step)) for n in range(TENSORS)},
    }


def write_ours(folder: Path, step: int) -> None:
    WholeCheckpointIO().save_checkpoint(state(step), folder / f"step={step}.ckpt")
    WholeCheckpointIO().remove_checkpoint(folder / f"step={step - 1}.ckpt")


def write_shards(folder: Path, step: int) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    parts = [torch.full((VALUES // RANKS,), float(step)) for _ in range(TENSORS)]
    weights = {str(n): DTensor.from_local(part, mesh, [Shard(0)]) for n, part in enumerate(parts)}
    assert dist.group.WORLD is not None
    writer = ShardedCheckpointIO(dist.group.WORLD)
    writer.save_checkpoint({"global_step": step, "state_dict": weights}, folder / f"step={step}.ckpt")
    if dist.get_rank() == 0:
        writer.remove_checkpoint(folder / f"step={step - 1}.ckpt")


def write_stock(folder: Path, step: int) -> None:
    TorchCheckpointIO().save_checkpoint(state(step), folder / "last.ckpt")


def read_ours(folder: Path) -> dict[str, Any]:
    return read_checkpoint(newest(folder)[0])


def read_stock(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "last.ckpt", weights_only=True)  # noqa: TID251


CONTENDERS = {
    "ours": (write_ours, read_ours, 1),
    "ours in shards": (write_shards, read_ours, RANKS),
    "Lightning": (write_stock, read_stock, 1),
}
"""How each writes and reads, and in how many processes it writes."""


def judge(read: Callable[[Path], dict[str, Any]], folder: Path) -> str:
    """What a resuming run meets."""
    try:
        found = read(folder)
    except Exception as error:
        return f"unreadable: {type(error).__name__}"
    steps = {float(value) for tensor in found["state_dict"].values() for value in (tensor.min(), tensor.max())}
    return "whole" if steps == {float(found["global_step"])} else "mixed"


def run(write: Callable[[Path, int], None], folder: Path, steps: range, processes: int) -> list[int]:
    """Starts processes that write these steps, and gives their numbers once they have begun."""
    meeting = Path(tempfile.mkdtemp())
    children = []
    for rank in range(processes):
        if child := os.fork():
            children.append(child)
            continue
        if processes > 1:
            dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=processes)
        (meeting / f"{rank}").touch()
        for step in steps:
            write(folder, step)
        os._exit(0)
    while not all((meeting / f"{rank}").exists() for rank in range(processes)):
        time.sleep(0.01)
    shutil.rmtree(meeting, ignore_errors=True)
    return children


def random_kills(name: str, kills: int, rng: random.Random) -> dict[str, int]:
    write, read, processes = CONTENDERS[name]
    results: dict[str, int] = {}
    folder = Path(tempfile.mkdtemp(dir=Path.cwd()))
    for number in range(kills):
        if judge(read, folder) != "whole":  # at the beginning, and again after a loss
            shutil.rmtree(folder)
            folder.mkdir()
            for child in run(write, folder, range(1, 2), processes):
                os.waitpid(child, 0)
        children = run(write, folder, range(2 + number * 1000, 1_000_000), processes)
        time.sleep(rng.uniform(0.05, 0.6))
        rng.shuffle(children)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            time.sleep(rng.choice([0, 0.1]))
        result = judge(read, folder)
        results[result] = results.get(result, 0) + 1
    shutil.rmtree(folder)
    return results


PHASES = ("before writing", "half written", "files written", "manifest written", "renamed", "half removed")


def killed_at(phase: str, folder: Path) -> None:
    """Writes steps 1 and 2, and dies at a phase of the second."""
    write_ours(folder, 1)
    child = os.fork()
    if not child:
        die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        if phase == "before writing":
            torch.save = die
        elif phase == "half written":

            def half(checkpoint: Any, path: Path) -> None:
                path.write_bytes(b"x" * 1000)
                die()

            torch.save = half
        elif phase == "files written":
            whole._sha256 = die
        elif phase == "manifest written":
            Path.rename = die
        elif phase == "renamed":
            WholeCheckpointIO.remove_checkpoint = die
        elif phase == "half removed":
            shutil.rmtree = lambda path, **_: die() if Path(path).exists() else None
        write_ours(folder, 2)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"{phase}: it was not reached"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process would wait for its parent's threads for ever
    if Path("/dev/shm").is_dir():
        tempfile.tempdir = os.environ["TMPDIR"] = "/dev/shm"
    rng = random.Random(0)
    results: dict[str, Any] = {
        "kills": options.kills,
        "temporary files": tempfile.gettempdir(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }
    for name in CONTENDERS:
        results[name] = random_kills(name, options.kills, rng)
        print(f"{name}: {results[name]}")
    results["at each phase"] = {}
    for phase in PHASES:
        folder = Path(tempfile.mkdtemp(dir=Path.cwd()))
        killed_at(phase, folder)
        results["at each phase"][phase] = judge(read_ours, folder)
        shutil.rmtree(folder)
    print(f"ours, at each phase: {results['at each phase']}")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    ours = (results[name] for name in CONTENDERS if name.startswith("ours"))
    bad = sum(count for counts in ours for result, count in counts.items() if result != "whole")
    sys.exit(bad > 0 or any(result != "whole" for result in results["at each phase"].values()))


if __name__ == "__main__":
    main()
