"""Performance limits of a device: the maker's stated peak, and measured rates of large products and copies."""

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops

from fuyu_e2e.data.lightning_internals import CUDA_FLOPS
from fuyu_e2e.errors import UserError

_H200_NVL = {torch.float32: 60e12, "tfloat32": 417.5e12, torch.bfloat16: 835.5e12, torch.float16: 835.5e12}
CARDS: dict[str, Any] = CUDA_FLOPS | {
    "h200 sxm1": {torch.float32: 67e12, "tfloat32": 494.5e12, torch.bfloat16: 989.5e12, torch.float16: 989.5e12},
    "h200 nvl1": _H200_NVL,
    "h100 nvl": _H200_NVL,
}
"""Dense operations per second of cards, by dtype. Three entries are from NVIDIA's data sheets, halved where these say
"with sparsity": Lightning's table counts sparsity, rounds, or gives pairs of cards, and may be corrected one day."""


def named_peak(name: str, dtype: torch.dtype) -> float:
    """Returns the dense peak of a card in operations per second, by its name in `CARDS`.

    Raises:
        UserError: No card or several have that name, or the card has no figure for the dtype.
    """
    asked = name.lower().replace("-", " ").replace("_", " ")
    found = [card for card in CARDS if card == asked] or [card for card in CARDS if asked in card]
    if len(found) != 1:
        problem = f"could be {', '.join(found)}" if found else f"is unknown; the cards are {', '.join(CARDS)}"
        raise UserError(f"--device {name} {problem}.")
    rates = CARDS[found[0]]
    if dtype not in rates:
        raise UserError(f"--device {name} does no {str(dtype).removeprefix('torch.')}: choose trainer.precision.")
    return float(rates[dtype])


def known_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns the dense peak of a device of this machine in operations per second; None if Lightning doesn't know
    it."""
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else ""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    kind = "tfloat32" if tf32 else dtype
    if "h200" in name:  # the driver's name lacks the endings that Lightning looks for
        return float(CARDS["h200 nvl1" if "nvl" in name else "h200 sxm1"][kind])
    if "h100 nvl" in name:
        return float(CARDS["h100 nvl"][kind])
    stated = get_available_flops(device, dtype)
    return None if stated is None else float(stated)


def peak_rate(device: str, dtype: torch.dtype) -> tuple[float, str]:
    """Returns the operations per second that MFU is a fraction of, and the source of the figure.

    Takes the maker's figure if Lightning knows it, and otherwise measures the product of two large matrices.
    """
    if device == "cuda" and (stated := known_peak(torch.device(device), dtype)):
        return stated, "data sheet"
    return matmul_rate(device, dtype), "measured"


def matmul_rate(device: str, dtype: torch.dtype, rounds: int = 5) -> float:
    """Returns the operations per second of a product of two large square matrices, the best of `rounds` runs."""
    side = 8_192 if device == "cuda" else 1_536
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _least_seconds(lambda: left @ right, device, rounds)


def copy_bandwidth(device: str, rounds: int = 9) -> float:
    """Returns the bytes per second that a copy of a large tensor reads and writes, the best of `rounds` runs."""
    source = torch.ones(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _least_seconds(lambda: target.copy_(source), device, rounds)


def _least_seconds(run: Callable[[], Any], device: str, rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        started_at = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started_at)
    return min(seconds)  # other load only ever slows a run down
