"""Weights in oneDNN's layout, for the few rows of a decoding step on a CPU.

A step multiplies a handful of rows with every weight, so its time is the time to read the weights. torch's float32
product reads them at half the speed of oneDNN's with its own layout (`docs/generation.md`). The cost is a second copy
of the weights, so they are packed only if the step is compiled.
"""

import copy
from itertools import count
from weakref import finalize

import torch
from torch import Tensor, nn

from fuyu_e2e.model.decoder import Decoder

SMALLEST = 2**18
"""Fewest values of a weight that is packed: for smaller ones, leaving a compiled step takes longer than the
product."""

_packed: dict[int, Tensor] = {}
"""Packed weights by number: a graph can hold a number, but not a tensor with a foreign layout."""
_numbers = count()


@torch.library.custom_op("fuyu_e2e::packed_linear", mutates_args=())
def _packed_linear(x: Tensor, bias: Tensor | None, number: int, features: int) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, _packed[number], bias, "none", [], "")


@_packed_linear.register_fake
def _(x: Tensor, bias: Tensor | None, number: int, features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], features))


class PackedLinear(nn.Module):
    """A linear layer that multiplies with a packed copy of another layer's weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.number = next(_numbers)
        self.features = linear.out_features
        finalize(self, _packed.pop, self.number, None)

    def pack(self, rows: int) -> None:
        """Copies the current weight for products with `rows` rows."""
        _packed[self.number] = torch.ops.mkldnn._reorder_linear_weight(self.linear.weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        return _packed_linear(x, self.linear.bias, self.number, self.features)


class PackedDecoder:
    """A decoder with packed copies of its large weights, which follows the weights of the original decoder."""

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
        """Returns whether this machine can pack the decoder's weights."""
        weight = decoder.embed_tokens.weight
        return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()

    def follow(self, decoder: Decoder, rows: int) -> None:
        """Packs the weights again if they have changed, or if the number of rows has."""
        now = (rows, [(weight.data_ptr(), weight._version) for weight in decoder.parameters()])
        if now != self._packed_from:
            for module in self.decoder.modules():
                if isinstance(module, PackedLinear):
                    module.pack(rows)
            self._packed_from = now
