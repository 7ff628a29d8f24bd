"""New decoders for benchmarks."""

import torch

from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder


def new_decoder(config: FuyuConfig, device: str) -> Decoder:
    """The same new weights whenever it is called, drawn on the device: a CPU takes half a minute for those of `3b`."""
    torch.manual_seed(0)
    with torch.device(device):
        return Decoder(config)
