"""What the GPU script needs beside torch is fetched, installed where it is missing, and missed in a clear sentence."""

import importlib.util
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def requirements(repository: Path) -> ModuleType:
    path = repository / "tests" / "gpu" / "requirements.py"
    specification = importlib.util.spec_from_file_location("requirements", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def write_wheel(folder: Path, name: str) -> Path:
    """A wheel of a package with nothing in it."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    told = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{told}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{told}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{told}/RECORD", "")
    return path


def run_all_sh(repository: Path, python: Path, wheels: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(repository / "tests" / "gpu" / "all.sh"), *arguments],
        env=os.environ | {"PYTHON": str(python), "WHEELS": str(wheels)},
        capture_output=True,
        text=True,
    )


def test_what_an_image_lacks_is_a_part_of_what_is_needed(requirements: ModuleType) -> None:
    """The packages of the short list, with all that they need but an image has."""
    names = set(requirements.closure(requirements.wanted()))
    assert set(requirements.LACKING) <= names
    assert "torch" not in names
    assert {"lightning", "numpy", "pytest"} <= names
    by_image = set(requirements.closure(["lightning", "transformers", "numpy"]))
    further = set(requirements.closure(["jsonargparse[signatures]", *requirements.LACKING]))
    assert further - by_image - set(requirements.LACKING) == set()
    assert requirements.missing() == []


def test_only_what_is_missing_is_installed(repository: Path, tmp_path: Path) -> None:
    write_wheel(tmp_path, "numpy")
    write_wheel(tmp_path, "lacking_here")
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$1" in tests/gpu/run_all.py) ls "${PYTHONPATH##*:}"; echo "$@";; '
        f'*) exec {sys.executable} "$@";; esac\n'
    )
    python.chmod(0o755)
    done = run_all_sh(repository, python, tmp_path, "--seconds", "540")
    assert done.returncode == 0, done.stderr
    *installed, command = done.stdout.splitlines()
    assert sorted(installed) == ["lacking_here-1.0.dist-info", "lacking_here.py"]
    assert command.startswith("tests/gpu/run_all.py --started-at ")
    assert command.endswith(" --seconds 540")


def test_a_package_that_is_nowhere_is_named_with_what_fetches_it(repository: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    done = run_all_sh(repository, tmp_path / "bare" / "bin" / "python", tmp_path / "wheels")
    version = "{}.{}".format(*sys.version_info[:2])
    assert done.returncode == 2
    assert "Missing here, and not in" in done.stderr
    names = ("lightning", "webdataset", "typeshed-client", "beartype")
    assert [name for name in names if name not in done.stderr] == []
    assert f"bash tests/gpu/wheels.sh wheels {version}" in done.stderr
