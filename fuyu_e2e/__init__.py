"""Train a multimodal decoder with no vision encoder, end to end: one sequence of raw patches and text.

from pathlib import Path
import fuyu_e2e

model, processor = fuyu_e2e.load("runs/quickstart")
prompt = processor(Path("a.png"), "Read the digits.")
[tokens] = fuyu_e2e.generate(model, [prompt], max_new_tokens=16, eos_id=processor.eos_id)
print(processor.decode(tokens))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fuyu_e2e.version import __version__

if TYPE_CHECKING:
    from fuyu_e2e.inference.api import Processor, Sampling, generate, load

__all__ = ["Processor", "Sampling", "__version__", "generate", "load"]


def __getattr__(name: str) -> Any:
    """Imports the Python API, and torch with it, on first use of one of its names."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module("fuyu_e2e.inference.api"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
