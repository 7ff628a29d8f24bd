"""The device that a command computes on."""

import torch

from fuyu_e2e.errors import UserError

AUTO = "auto"
"""CUDA's first device where there is one, else the CPU."""


def find_device(named: str) -> torch.device:
    """The device of a name, as `auto`, `cpu` or `cuda:1`.

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
