"""Products of blocks in 8-bit floating point, by torchao: twice as fast as in bfloat16 on the GPUs that have them.

Micikevicius et al. 2022 (arXiv 2209.05433): weights and activations as e4m3, gradients as e5m2, each tensor scaled by
its own largest value as it is cast. Weights stay as they are, under the same names: optimizers, checkpoints and export
see nothing of it.
"""

from importlib.util import find_spec

import torch
from torch import nn

from fuyu_e2e.errors import UserError
from fuyu_e2e.model.decoder import Decoder

CAPABILITY = (8, 9)
"""Of the first NVIDIA GPUs with such products: Ada, then Hopper."""
MULTIPLE = 16
"""What both sizes of a weight have to be a multiple of."""


def has_float8(device: torch.device | None = None) -> bool:
    """Whether a device, by default the current one, has float8 products and torchao is installed to ask for them."""
    return (
        torch.cuda.is_available()
        and (device is None or device.type == "cuda")
        and torch.cuda.get_device_capability(device) >= CAPABILITY
        and find_spec("torchao") is not None
    )


def use_float8(decoder: Decoder, device: torch.device, *, emulated: bool = False) -> None:
    """Has the linear layers of all blocks multiply in float8; embedding, patch projection and head stay as they are.

    Args:
        decoder: Changed in place, before its blocks are compiled or sharded.
        device: Where it will run.
        emulated: Casts as the GPU would, but multiplies in the wider type, on any device: for tests.

    Raises:
        UserError: torchao isn't installed, the device has no such products, or a layer's size doesn't fit them.
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
    # Rows of any length: in the gradient of a weight, tokens are what is summed over.
    config = Float8LinearConfig(emulate=emulated, pad_inner_dim=True)
    convert_to_float8_training(decoder.blocks, module_filter_fn=_is_product, config=config)


def _is_product(module: nn.Module, name: str) -> bool:
    """Whether a module is a linear layer of attention or feed-forward; rules that select tokens stay exact."""
    return isinstance(module, nn.Linear) and ".rule." not in name
