"""What `import fuyu_e2e` offers to programs, imported when it is first used."""

from pathlib import Path

import torch

from fuyu_e2e.checkpoint.loading import load_model
from fuyu_e2e.data.processor import Processor
from fuyu_e2e.inference.generation import Sampling, generate
from fuyu_e2e.model.decoder import Decoder

__all__ = ["Processor", "Sampling", "generate", "load"]


def load(path: str | Path, device: torch.device | str = "cpu") -> tuple[Decoder, Processor]:
    """Returns a trained model and what makes its prompts.

    Args:
        path: A checkpoint, one file or sharded; a run's directory, for its newest checkpoint; or an exported folder.
        device: Where the model goes.

    Raises:
        UserError: There is nothing, it can't be read, or it holds code, which is never run.
    """
    model = load_model(path, device)
    return model.decoder, Processor(model.builder)
