"""Runs every GPU test and benchmark one after the other, and writes one JSON; `all.sh` starts this."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

PACKAGES = ("torch", "lightning", "transformers", "webdataset", "numpy", "triton", "flash-attn")
TAIL = 4_000
"""Letters of a step's output that are kept."""


@dataclass(frozen=True)
class Step:
    """One command, and the seconds after which it is ended."""

    name: str
    arguments: tuple[str, ...]
    """For Python; `{out}` is where its result goes."""
    seconds: int


def bench(name: str, seconds: int, *options: str, called: str = "") -> Step:
    return Step(called or name, ("-m", "fuyu_e2e.bench", name, *options, "--out", "{out}"), seconds)


UNHOOKED = "addopts=--strict-markers --import-mode=importlib"
"""The project's settings but for the hook that checks types, which can't be compiled."""
MARKED = ("tests/gpu", "tests/model/test_attention_kernels.py")
TESTS = ("-m", "pytest", "-p", "no:cacheprovider", "-o", UNHOOKED, "-m", "gpu", *MARKED, "--show-capture=no",
         "--junitxml", "{out}")  # fmt: skip
FULL = (
    Step("tests", TESTS, 180),
    bench("limit", 150),
    *(bench("train", 220, "--rounds", "3", "--sizes", size, called=f"train {size}") for size in ("125m", "1b", "3b")),
    bench("scale", 180),
    bench("generate", 200, "--sizes", "125m", "1b", "--rounds", "2"),
    bench("mod", 90, "--rounds", "3", "--modes", "eager"),
)
"""Together 24 minutes at the very most."""
REDUCED = (
    Step("tests", TESTS, 300),
    bench("limit", 300, "--sizes", "small", "--decoders", "quickstart", "--eager", "--rounds", "1", "--steps", "8"),
    bench("train", 300, "--rounds", "1", "--budget", "512", "--contenders", "transformers, sdpa", "ours"),
    bench("scale", 300, "--rows", "1024", "2048", "--sides", "4", "--widths", "128", "--processes", "1",
          "--rounds", "1", "--steps", "12"),
    bench("generate", 300, "--sizes", "quickstart", "--batches", "1", "--new-tokens", "4", "--rounds", "1"),
    bench("mod", 120, "--widths", "64", "--lengths", "128", "--document", "64", "--rounds", "1", "--modes", "eager"),
)  # fmt: skip
"""Shows that everything runs, and measures nothing."""


def run(step: Step, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Runs a step; its failure is a part of the result."""
    out = folder / f"{step.name.replace(' ', '-')}.json"
    command = [sys.executable, *(argument.format(out=out) for argument in step.arguments)]
    started_at = time.perf_counter()
    # Into a file, and in a session of its own, so that nothing it started outlives it.
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | str = process.wait(step.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            code = f"ended after {step.seconds} s"
        output.seek(0)
        told = output.read()
    result: dict[str, Any] = {
        "command": " ".join(argument.format(out="OUT") for argument in step.arguments),
        "exit_code": code,
        "seconds": round(time.perf_counter() - started_at, 1),
    }
    if out.exists():
        result["result"] = tests_of(out) if step.name == "tests" else json.loads(out.read_text())
    if code != 0:
        result["output"] = told[-TAIL:]
    return result


def tests_of(report: Path) -> dict[str, Any]:
    """How many tests ran, and which failed, of pytest's JUnit report."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - skipped - len(failed), "skipped": skipped, "failed": failed}


def versions() -> dict[str, str]:
    """Of what takes part, where it is there."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reduced", action="store_true", help="Small sizes on a CPU; so it is without a GPU.")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    reduced = options.reduced or not gpu
    environment = dict(os.environ)
    if reduced:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "GPU_TESTS_ON": "cpu"}
    report: dict[str, Any] = {
        "reduced": reduced,
        "why_reduced": "asked for" if options.reduced else None if gpu else "no GPU here",
        "device": torch.cuda.get_device_name()
        if gpu and not reduced
        else f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
        "date": date.today().isoformat(),
        "steps": {},
    }
    started_at = time.perf_counter()
    with TemporaryDirectory() as folder:
        for step in REDUCED if reduced else FULL:
            report["steps"][step.name] = found = run(step, Path(folder), environment)
            report["seconds"] = round(time.perf_counter() - started_at, 1)
            options.out.write_text(json.dumps(report, indent=1) + "\n")  # what is done is kept, whatever comes
            print(f"{step.name}: exit code {found['exit_code']}, {found['seconds']} s", flush=True)
    failed = [name for name, found in report["steps"].items() if found["exit_code"] != 0]
    print(f"{options.out}: {'reduced, ' * reduced}{len(report['steps'])} steps, failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
