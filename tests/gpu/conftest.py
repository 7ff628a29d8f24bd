"""Where the tests of this folder run, and a file of what came of them."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fuyu_e2e.bench.measure import Figures

REASON = 2_000
"""Letters that are kept of why a test failed."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="A JSON of what came of each test, written as they end.")


def pytest_configure(config: pytest.Config) -> None:
    if out := config.getoption("--outcomes", None):
        config.pluginmanager.register(Outcomes(out))


class Outcomes:
    """A plugin of pytest that writes how many tests passed, and why others were skipped or failed."""

    def __init__(self, out: Path) -> None:
        self._figures = Figures(out, {})
        self._found: dict[str, Any] = {"passed": 0, "skipped": {}, "failed": {}}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._found["failed"][report.nodeid] = report.longreprtext[-REASON:]
        elif report.skipped:
            # A skipped test's is where, and why.
            self._found["skipped"][report.nodeid] = report.longrepr[-1] if report.longrepr else ""
        elif report.when == "call":
            self._found["passed"] += 1
        self._figures.keep(**self._found)

    def pytest_sessionfinish(self) -> None:
        self._figures.end(**self._found)


@pytest.fixture(scope="session")
def device() -> str:
    """The GPU. `GPU_TESTS_ON=cpu`, as the reduced run of `all.sh` sets it, tries what a CPU can do of it instead."""
    wanted = os.environ.get("GPU_TESTS_ON", "cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return wanted


@pytest.fixture
def without_hook(request: pytest.FixtureRequest) -> None:
    """For tests that compile, for which the hook that checks types is in the way; `all.sh` leaves it out."""
    if request.config.getoption("--jaxtyping-packages", None):
        pytest.skip("compiles only without --jaxtyping-packages, as tests/gpu/all.sh runs it")


@pytest.fixture
def no_wait() -> Callable[[], AbstractContextManager[None]]:
    """Makes every operation that lets the host wait for the device an error; on a CPU it does nothing."""

    @contextmanager
    def no_wait() -> Iterator[None]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")

    return no_wait
