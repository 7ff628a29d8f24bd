"""Where the tests of this folder run."""

import os

import pytest
import torch


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
