"""What we use of Lightning without its promise is there in the installed version, and named in one file alone."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch

import fuyu_e2e
from fuyu_e2e.data.lightning_internals import INHERITED
from fuyu_e2e.training.device_limits import CARDS

PACKAGE = Path(fuyu_e2e.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("lightning_internals.py", "__main__.py"))
PRIVATE = re.compile(r"\b(?:trainer|fit_loop|epoch_loop|loop|fetcher|connector|_signal_connector)\._[a-z]\w*")


def used_of(cls: type) -> set[str]:
    """Private names of a class's source: what it defines, and what it reads of itself or of its parents."""
    source = inspect.getsource(cls)
    return {*re.findall(r"(?:self|super\(\))\.(_[a-z]\w*)", source), *re.findall(r"def (_[a-z]\w*)", source)}


def has(cls: type, name: str) -> bool:
    """Whether a class of Lightning's knows a name of itself: in its body or on its instances."""
    parents = [parent for parent in cls.__mro__ if parent.__module__.startswith("lightning.")]
    return any(name in vars(parent) or re.search(rf"self\.{name}\b", inspect.getsource(parent)) for parent in parents)


@pytest.mark.parametrize("parent", INHERITED)
def test_what_subclasses_use_is_there(parent: str) -> None:
    cls = resolve_name(parent)
    assert [name for name in INHERITED[parent] if not has(cls, name)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_names_what_is_private(path: Path) -> None:
    source = path.read_text()
    assert PRIVATE.findall(source) == []
    if "lightning" not in source:
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
            assert [name.name for name in node.names if name.name.startswith("_")] == []
    module = importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
    listed = {resolve_name(parent): names for parent, names in INHERITED.items()}
    for cls in vars(module).values():
        if isinstance(cls, type) and cls.__module__ == module.__name__:
            known = {name for parent, names in listed.items() if issubclass(cls, parent) for name in names}
            assert {name for name in used_of(cls) - known if has(cls, name)} == set()


@pytest.mark.parametrize(
    ("card", "bfloat16", "float32"),
    [("h200 sxm1", 989.5e12, 67e12), ("h200 nvl1", 835.5e12, 60e12), ("h100 nvl", 835.5e12, 60e12)],
)
def test_peaks_that_lightning_states_wrongly_are_those_of_the_data_sheets(
    card: str, bfloat16: float, float32: float
) -> None:
    assert (CARDS[card][torch.bfloat16], CARDS[card][torch.float32]) == (bfloat16, float32)
