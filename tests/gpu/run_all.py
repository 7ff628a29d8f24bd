"""Runs every GPU test and benchmark, what teaches most first, and writes one JSON; `all.sh` starts this."""

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

STARTED_AT = time.time()

import torch  # noqa: E402 (its seconds count too)

from fuyu_e2e.bench.measure import write_json  # noqa: E402

PACKAGES = ("torch", "lightning", "transformers", "webdataset", "numpy", "triton", "flash-attn", "torchao")
TAIL = 4_000
"""Letters of a step's output that are kept."""
PATIENCE = 2
"""A step is ended after so many times the seconds it is taken to need."""
RESERVE = 5
"""Seconds that are left for ending a step and writing what it found."""


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    arguments: tuple[str, ...]
    """For Python; `{out}` is where its result goes, which is read also where the step is cut off."""
    seconds: int
    """What it is taken to need, on an H200."""


def bench(name: str, seconds: int, *options: str, called: str = "") -> Step:
    return Step(called or name, ("-m", "fuyu_e2e.bench", name, *options, "--out", "{out}"), seconds)


def script(name: str, seconds: int, *options: str) -> Step:
    return Step(name, (f"tests/gpu/{name}.py", *options, "--out", "{out}"), seconds)


UNHOOKED = "addopts=--strict-markers --import-mode=importlib"
"""The project's settings but for the hook that checks types, which can't be compiled."""
MARKED = ("tests/gpu", "tests/model/attention/test_kernels.py")
TESTS = ("-m", "pytest", "-p", "no:cacheprovider", "-o", UNHOOKED, "-m", "gpu", *MARKED, "--show-capture=no",
         "--outcomes", "{out}")  # fmt: skip
PLAIN = ("transformers, sdpa", "transformers, sdpa, by length", "ours", "ours, compiled")
COMPILED = ("transformers, sdpa, compiled", "transformers, sdpa, by length, compiled", "ours, compiled, fp8")
TRAINED = ("--rounds", "3", "--contenders")
FULL = (
    Step("tests", TESTS, 150),
    script("steps", 170),
    script("waits", 60),
    script("graphs", 100),
    bench("train", 120, "--sizes", "125m", *TRAINED, *PLAIN, called="train-125m"),
    bench("train", 140, "--sizes", "1b", *TRAINED, *PLAIN, called="train-1b"),
    bench("generate", 90, "--sizes", "125m", "--rounds", "2", called="generate-125m"),
    bench("generate", 100, "--sizes", "1b", "--rounds", "2", called="generate-1b"),
    bench("mod", 60, "--rounds", "3", "--modes", "eager"),
    bench("limit", 120, "--rounds", "2"),
    script("optimizers", 40, "--sizes", "125m", "1b"),
    bench("train", 150, "--sizes", "3b", *TRAINED, *PLAIN, called="train-3b"),
    bench("train", 180, "--sizes", "125m", *TRAINED, *COMPILED, called="train-125m-compiled"),
    bench("scale", 110, "--parts", "rows", called="scale-rows"),
    bench("scale", 80, "--parts", "images", called="scale-images"),
    bench("scale", 80, "--parts", "widths", called="scale-widths"),
    bench("scale", 60, "--parts", "processes", "--processes", "1", called="scale-processes"),
)
"""What is right, then what waits and what is recompiled, then how fast it is: four calls of ten minutes."""
REDUCED = (
    Step("tests", TESTS, 150),
    script("steps", 150),
    script("waits", 90),
    script("graphs", 60),
    bench("train", 90, "--rounds", "1", "--budget", "512", "--contenders", "transformers, sdpa", "ours"),
    bench("generate", 90, "--sizes", "quickstart", "--batches", "1", "--new-tokens", "4", "--rounds", "1"),
    bench("mod", 30, "--widths", "64", "--lengths", "128", "--document", "64", "--rounds", "1", "--modes", "eager"),
    bench("limit", 90, "--sizes", "small", "--decoders", "quickstart", "--eager", "--rounds", "1", "--steps", "8"),
    script("optimizers", 30, "--sizes", "1m"),
    bench("scale", 90, "--rows", "1024", "2048", "--sides", "4", "--widths", "128", "--processes", "1",
          "--rounds", "1", "--steps", "12"),
)  # fmt: skip
"""Shows that everything runs, and measures nothing."""


def run(step: Step, folder: Path, environment: dict[str, str], seconds: float) -> dict[str, Any]:
    """Runs a step for so many seconds at most; its failure is a part of the result.

    It has `cut_off` where the step would have had more time by itself.
    """
    out = folder / f"{step.name}.json"
    command = [sys.executable, *(argument.replace("{out}", str(out)) for argument in step.arguments)]
    limit = min(seconds, PATIENCE * step.seconds)
    cut_off = False
    started_at = time.perf_counter()
    # Into a file, and in a session of its own, so that nothing it started outlives it.
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | str = process.wait(limit)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as why:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            interrupted = isinstance(why, KeyboardInterrupt)
            code = "interrupted" if interrupted else f"ended after {round(limit)} s"
            cut_off = interrupted or limit < PATIENCE * step.seconds
        output.seek(0)
        told = output.read()
    result: dict[str, Any] = {
        "command": shlex.join(argument.replace("{out}", "OUT") for argument in step.arguments),
        "date": date.today().isoformat(),
        "exit_code": code,
        "seconds": round(time.perf_counter() - started_at, 1),
    }
    if cut_off:
        result["cut_off"] = True
    if out.exists():
        result["result"] = json.loads(out.read_text())
    if code != 0:
        result["output"] = told[-TAIL:]
    return result


def replaced(before: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a step that ran again: what it had measured before too, unless it has come to its end now."""
    if before is None or found["exit_code"] == 0:
        return found
    earlier = [*before.get("earlier", []), *([before["result"]] if "result" in before else [])]
    return found | {"earlier": earlier} if earlier else found


def finished(found: dict[str, Any] | None) -> bool:
    """Whether a step is not to be run again: one that failed by itself would do so again."""
    return found is not None and not found.get("cut_off", False)


def unmet(found: dict[str, Any]) -> Iterator[str]:
    """What a step measured that isn't as it should be."""
    for check in found.get("result", {}).get("checks", []):
        if check["holds"] is False:
            yield f"{check['what']} is {check['measured']}, not {check['expected']}"


def versions() -> dict[str, str]:
    """Of what takes part, where it is there."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def go_on(out: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The report in a file, or a new one; one that was made elsewhere goes to another name."""
    new = about | {"seconds": 0.0, "steps": {}}
    if not out.exists():
        return new
    try:
        found = json.loads(out.read_text())
        differing = [name for name in about if found.get(name) != about[name]]
    except (ValueError, AttributeError):
        differing = ["all, since it is no report"]
    if not differing:
        return found
    kept = next(
        path for number in range(1, sys.maxsize) if not (path := out.with_stem(f"{out.stem}-{number}")).exists()
    )
    out.rename(kept)
    print(f"{out} differs from now in: {', '.join(differing)}. It is kept as {kept}; this run begins a new one.")
    return new


def again(options: argparse.Namespace, left: Sequence[str]) -> str:
    """The command that goes on with what is left."""
    parts = ["bash", "tests/gpu/all.sh", *(["--reduced"] if options.reduced else [])]
    parts += ["--only", *left] if options.only else []
    parts += ["--seconds", str(options.seconds)] if options.seconds is not None else []
    return shlex.join([*parts, "--out", str(options.out)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/gpu/all.sh", description=__doc__)
    parser.add_argument("--reduced", action="store_true", help="Small sizes on a CPU; so it is without a GPU.")
    parser.add_argument("--only", nargs="+", metavar="STEP", default=[], help="Steps to run, also again.")
    parser.add_argument("--seconds", type=float, help="In which this call ends, to be gone on with by another.")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="Where it goes on from, too.")
    parser.add_argument("--started-at", type=float, default=STARTED_AT, help=argparse.SUPPRESS)
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    reduced = options.reduced or not gpu
    if options.seconds is not None and options.seconds <= RESERVE:
        parser.error(f"--seconds is {options.seconds:g}, but must be above {RESERVE}.")
    steps = {step.name: step for step in (REDUCED if reduced else FULL)}
    if unknown := [name for name in options.only if name not in steps]:
        parser.error(f"There is no step {', '.join(unknown)}: choose from {', '.join(steps)}.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    environment = dict(os.environ)
    if reduced:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "GPU_TESTS_ON": "cpu"}
    about: dict[str, Any] = {
        "reduced": reduced,
        "device": torch.cuda.get_device_name()
        if gpu and not reduced
        else f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
    }
    try:
        report = go_on(options.out, about)
        report["why_reduced"] = "asked for" if options.reduced else None if gpu else "no GPU here"
        write_json(options.out, report)  # a place that can't be written costs no step's minutes
    except OSError as error:
        parser.error(f"--out {options.out} can't be written: {error}.")
    done = report["steps"]
    left = options.only or [name for name in steps if not finished(done.get(name))]
    ends_at = options.started_at + options.seconds - RESERVE if options.seconds is not None else float("inf")
    ran: list[str] = []
    with TemporaryDirectory() as folder:
        for step in [steps[name] for name in left]:
            seconds = ends_at - time.time()
            # The first runs in any case, or a step that takes longer than a call would never begin.
            if seconds <= 0 or (ran and seconds < step.seconds):
                continue
            before = time.time()
            done[step.name] = found = replaced(done.get(step.name), run(step, Path(folder), environment, seconds))
            ran.append(step.name)
            report["seconds"] = round(report["seconds"] + time.time() - before, 1)
            report["steps"] = {name: done[name] for name in steps if name in done}
            report["left"] = [name for name in steps if not finished(done.get(name))]
            write_json(options.out, report)  # what is done is kept, whatever comes
            print(f"{step.name}: exit code {found['exit_code']}, {found['seconds']} s", *unmet(found), sep="\n  ")
            sys.stdout.flush()
            if found["exit_code"] == "interrupted":
                break
    left = [name for name in left if name not in ran or not finished(done[name])]
    wrong = [name for name, found in done.items() if finished(found) and (found["exit_code"] != 0 or [*unmet(found)])]
    print(
        f"{options.out}: {'reduced, ' * reduced}{sum(map(finished, done.values()))} of {len(steps)} steps; failed, or "
        f"not as expected: {', '.join(wrong) or 'none'}"
    )
    if left:
        print(f"left: {', '.join(left)}. Go on with:\n  {again(options, left)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
