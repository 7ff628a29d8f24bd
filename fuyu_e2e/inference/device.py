"""The device that a command computes on, and the dtype of its products."""

import torch

from fuyu_e2e.errors import UserError

AUTO = "auto"
"""The first CUDA device if there is one, else the CPU."""


def find_device(named: str) -> torch.device:
    """Returns the device of a name such as `auto`, `cpu` or `cuda:1`.

    Raises:
        UserError: This machine doesn't have it.
    """
    if named == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(named)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
        raise UserError(
            f"--device {named} can't be used on this machine, which has {there}: name one of these, or leave it out."
        ) from error
    return device


def product_type(device: torch.device) -> torch.dtype:
    """Returns the dtype of a command's products on a device: bfloat16 on GPUs that support it, float32 elsewhere."""
    if device.type != "cuda":
        return torch.float32
    with torch.cuda.device(device):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """Returns a context in which a device computes products in its `product_type`; it converts each weight once."""
    dtype = product_type(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
