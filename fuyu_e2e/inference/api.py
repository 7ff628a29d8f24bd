"""The Python API that `import fuyu_e2e` offers, imported on first use."""

from pathlib import Path

import torch

from fuyu_e2e.checkpoint.loading import load_model
from fuyu_e2e.data.processor import Processor
from fuyu_e2e.inference.generation import Sampling, generate
from fuyu_e2e.model.decoder import Decoder

__all__ = ["Processor", "Sampling", "generate", "load"]


def load(path: str | Path, device: torch.device | str = "cpu") -> tuple[Decoder, Processor]:
    """Returns a trained model and the processor that makes its prompts.

    Args:
        path: A checkpoint, one file or sharded; a run's directory, for its newest checkpoint; or an exported folder.
        device: The device of the model.

    Raises:
        UserError: There is nothing at the path, it can't be read, or it contains code, which is never run.
    """
    model = load_model(path, device)
    return model.decoder, Processor(model.builder)
