"""Weights laid out as oneDNN likes them, for the few rows of a decoding step on a CPU.

A step multiplies a handful of rows with every weight, so it takes as long as the weights take to be read. torch's own
product in float32 reads them at half the speed that oneDNN does from its own layout (`docs/generation.md`). The price
is a second copy of the weights, so they are packed only where a step is compiled.
"""

import copy
from itertools import count
from weakref import finalize

import torch
from torch import Tensor, nn

from fuyu_e2e.model.decoder import Decoder

SMALLEST = 2**18
"""Values of a weight that is packed at least: calling out of a compiled step takes longer than a smaller one."""

_packed: dict[int, Tensor] = {}
"""Packed weights by number: a graph can be given a number, but not a tensor of a foreign layout."""
_numbers = count()


@torch.library.custom_op("fuyu_e2e::packed_linear", mutates_args=())
def _packed_linear(x: Tensor, bias: Tensor | None, number: int, features: int) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, _packed[number], bias, "none", [], "")


@_packed_linear.register_fake
def _(x: Tensor, bias: Tensor | None, number: int, features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], features))


class PackedLinear(nn.Module):
    """A linear layer that multiplies with a packed copy of another one's weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.number = next(_numbers)
        self.features = linear.out_features
        finalize(self, _packed.pop, self.number, None)

    def pack(self, rows: int) -> None:
        """Copies the weight as it is now, for products with so many rows."""
        _packed[self.number] = torch.ops.mkldnn._reorder_linear_weight(self.linear.weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        return _packed_linear(x, self.linear.bias, self.number, self.features)


class PackedDecoder:
    """A decoder whose large weights are packed, and which follows the weights of the decoder it was made from."""

    def __init__(self, decoder: Decoder) -> None:
        shared = [*decoder.parameters(), *decoder.buffers()]
        self.decoder: Decoder = copy.deepcopy(decoder, {id(tensor): tensor for tensor in shared})
        for module in [*self.decoder.modules()]:
            for name, child in module.named_children():
                if isinstance(child, nn.Linear) and child.weight.numel() >= SMALLEST:
                    setattr(module, name, PackedLinear(child))
        self._packed_from: object = None

    @staticmethod
    def serves(decoder: Decoder) -> bool:
        """Returns whether this machine packs the decoder's weights."""
        weight = decoder.embed_tokens.weight
        return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()

    def follow(self, decoder: Decoder, rows: int) -> None:
        """Packs the weights anew if they changed since, or are to be multiplied with another number of rows."""
        now = (rows, [(weight.data_ptr(), weight._version) for weight in decoder.parameters()])
        if now != self._packed_from:
            for module in self.decoder.modules():
                if isinstance(module, PackedLinear):
                    module.pack(rows)
            self._packed_from = now
