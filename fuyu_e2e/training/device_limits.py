"""What a device can do: its peak as its maker states it, and what large products and copies reach on it."""

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
"""Operations per second of cards by type, of dense products. Three are from NVIDIA's data sheets, halved where these
say "with sparsity": Lightning's table has them with it, rounded, or for a pair of cards, and may be mended."""


def named_peak(name: str, dtype: torch.dtype) -> float:
    """Operations per second of a card at its peak, dense, by its name in `CARDS`.

    Raises:
        UserError: No card, or more than one, has that name, or the card has no such numbers.
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
    """Operations per second of a device of this machine at its peak, dense; None where Lightning doesn't know it."""
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else ""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    kind = "tfloat32" if tf32 else dtype
    if "h200" in name:  # its driver's name has none of the endings that Lightning looks for
        return float(CARDS["h200 nvl1" if "nvl" in name else "h200 sxm1"][kind])
    if "h100 nvl" in name:
        return float(CARDS["h100 nvl"][kind])
    stated = get_available_flops(device, dtype)
    return None if stated is None else float(stated)


def peak_rate(device: str, dtype: torch.dtype) -> tuple[float, str]:
    """Operations per second that MFU is a share of, and where the figure is from.

    The maker's where Lightning knows it, else what the product of two large matrices reaches.
    """
    if device == "cuda" and (stated := known_peak(torch.device(device), dtype)):
        return stated, "data sheet"
    return matmul_rate(device, dtype), "measured"


def matmul_rate(device: str, dtype: torch.dtype, rounds: int = 5) -> float:
    """Operations per second of the product of two large square matrices: the best of some rounds."""
    side = 8_192 if device == "cuda" else 1_536
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _least_seconds(lambda: left @ right, device, rounds)


def copy_bandwidth(device: str, rounds: int = 9) -> float:
    """Bytes read and written in a second by a copy of a tensor much larger than any cache: the best of rounds."""
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
    return min(seconds)  # other work only ever takes away
