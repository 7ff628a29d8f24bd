"""What the tests and benchmarks of this folder need beside torch, as pyproject.toml asks for it.

requirements.py pinned [--all]   name==version of what wheels.sh fetches, as it is installed here
requirements.py wheels FOLDER    the wheels there whose package isn't installed here
requirements.py missing          the names of packages that are needed and aren't installed here
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

LACKING = ("webdataset", "braceexpand", "jsonargparse", "typeshed-client", "docstring-parser", "beartype", "torchao")
"""What an image for CUDA with torch, Lightning, transformers and their companions lacks."""
EXTRAS = ("plots", "transformers", "fp8")
FOR_TESTS = ("pytest", "hypothesis", "beartype")
DISPENSABLE = ("matplotlib", "torchvision", "torchao", "pytest-xdist")
"""Without these a picture, a contender or a case is left out."""


def name_of(requirement: str) -> str:
    """The package of a requirement or of a wheel's file name, as registries write it."""
    return re.split(r"[^\w.-]", requirement.strip())[0].lower().replace("_", "-")


def wanted() -> list[str]:
    """Requirements, in pyproject.toml's words; not torch, which the machine has."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    found = [*project["dependencies"], *(requirement for extra in EXTRAS for requirement in extras[extra])]
    found += [requirement for requirement in extras["test"] if requirement.startswith(FOR_TESTS)]
    return [requirement for requirement in found if name_of(requirement) != "torch"]


def installed(name: str) -> bool:
    """Whether the package is there."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def closure(requirements: list[str]) -> Iterator[str]:
    """Names of what is installed of the requirements, and of what they need in turn; but for what only torch needs."""
    seen = {"torch"}
    left = list(requirements)
    while left:
        requirement = left.pop(0)
        name = name_of(requirement)
        if name in seen or not installed(name):  # what isn't here is for another platform or Python
            continue
        seen.add(name)
        yield name
        extras = re.search(r"\[([\w,-]+)\]", requirement)
        for further in distribution(name).requires or []:
            extra = re.search(r"extra == ['\"]([\w-]+)['\"]", further)
            if extra is None or (extras and extra[1] in extras[1].split(",")):
                left.append(further.partition(";")[0])


def wheels(folder: Path) -> list[Path]:
    """Those of a folder whose package isn't installed."""
    return [wheel for wheel in sorted(folder.glob("*.whl")) if not installed(name_of(wheel.name.partition("-")[0]))]


def missing() -> list[str]:
    """Packages that are needed and aren't installed."""
    needed = [*map(name_of, wanted()), *LACKING]
    return [name for name in dict.fromkeys(needed) if name not in DISPENSABLE and not installed(name)]


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "pinned":
        names = list(closure(wanted())) if arguments == ["--all"] else LACKING
        print("\n".join(f"{name}=={distribution(name).version}" for name in names))
    elif what == "wheels":
        print("\n".join(map(str, wheels(Path(arguments[0])))))
    else:
        print(" ".join(missing()))
