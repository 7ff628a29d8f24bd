"""New decoders for benchmarks."""

import torch

from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder


def new_decoder(config: FuyuConfig, device: str) -> Decoder:
    """Returns a decoder with new weights, equal in every call; drawn on the device, as a CPU takes 30 s for `3b`."""
    torch.manual_seed(0)
    with torch.device(device):
        return Decoder(config)
