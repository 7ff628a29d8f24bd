"""Prints what the tests and benchmarks of this folder need beside torch, as pyproject.toml asks for it."""

import re
import tomllib
from pathlib import Path

LEFT_OUT = {"torch"}
EXTRAS = ("plots", "transformers", "fp8")
FOR_TESTS = ("pytest", "hypothesis", "beartype")

project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
wanted = [*project["dependencies"], *(requirement for extra in EXTRAS for requirement in extras[extra])]
wanted += [requirement for requirement in extras["test"] if requirement.startswith(FOR_TESTS)]
print("\n".join(requirement for requirement in wanted if re.split(r"[<>=\[]", requirement)[0] not in LEFT_OUT))
