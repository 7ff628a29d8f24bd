"""Block products in 8-bit floating point, by torchao: twice as fast as bfloat16 on GPUs that support them.

Micikevicius et al. 2022 (arXiv 2209.05433): weights and activations as e4m3, gradients as e5m2, each tensor scaled by
its largest value as it is cast. The stored weights don't change: optimizers, checkpoints and export are unaffected.
"""

from importlib.util import find_spec

import torch
from torch import nn

from fuyu_e2e.errors import UserError
from fuyu_e2e.model.decoder import Decoder

CAPABILITY = (8, 9)
"""Compute capability of the first NVIDIA GPUs with float8 products, Ada; Hopper follows."""
MULTIPLE = 16
"""Both sizes of a weight must be multiples of this."""


def has_float8(device: torch.device | None = None) -> bool:
    """Returns whether a device, by default the current one, supports float8 products and torchao is installed."""
    return (
        torch.cuda.is_available()
        and (device is None or device.type == "cuda")
        and torch.cuda.get_device_capability(device) >= CAPABILITY
        and find_spec("torchao") is not None
    )


def use_float8(decoder: Decoder, device: torch.device, *, emulated: bool = False) -> None:
    """Switches the linear layers of all blocks to float8; embedding, patch projection and head stay as they are.

    Args:
        decoder: Changed in place, before its blocks are compiled or sharded.
        device: The device that it will run on.
        emulated: Casts as the GPU would but multiplies in the wider type, on any device: for tests.

    Raises:
        UserError: torchao isn't installed, the device has no float8 products, or a layer's size doesn't fit them.
    """
    if not emulated and not has_float8(device):
        raise UserError(
            "model.fp8 needs torchao (pip install 'fuyu-e2e[fp8]') and a GPU with float8 products (NVIDIA Ada, Hopper "
            "or newer): leave it out here."
        )
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # takes seconds to import

    for name, module in decoder.blocks.named_modules():
        if _is_product(module, name) and any(size % MULTIPLE for size in module.weight.shape):
            raise UserError(
                f"model.fp8 needs weights whose sizes are multiples of {MULTIPLE}, but block {name} has "
                f"{' x '.join(map(str, module.weight.shape))}: change width, heads, head_size or feed_forward."
            )
    # Rows have any length, and a weight's gradient sums over tokens: that dimension needs padding.
    config = Float8LinearConfig(emulate=emulated, pad_inner_dim=True)
    convert_to_float8_training(decoder.blocks, module_filter_fn=_is_product, config=config)


def _is_product(module: nn.Module, name: str) -> bool:
    """Returns whether a module is a linear layer of attention or feed-forward; routing rules stay exact."""
    return isinstance(module, nn.Linear) and ".rule." not in name
