"""What the backward pass recomputes, counted: kernels for GPUs are replaced by ones that any machine has."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from fuyu_e2e.model.recomputation import _policy

PROGRAM = """
import inspect, json, sys
from collections import Counter
from functools import partial
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from fuyu_e2e.bench.documents import mixture
from fuyu_e2e.model.attention import kernels as attention_kernels
from fuyu_e2e.model import decoder as decoders
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.routing.config import RoutingConfig
from fuyu_e2e.data.packing import pack_row

torch.set_num_threads(1)
kernel_name, compiled = sys.argv[1], sys.argv[2] == "compiled"
counted = Counter()

def attended(queries, keys, values):
    counted["attention"] += 1
    return queries * keys.mean() + values.mean()  # of no meaning, with a gradient

if kernel_name == "varlen":
    def forward(queries, keys, values, *_):
        return attended(queries, keys, values), torch.zeros(queries.shape[1::-1]), torch.zeros(2, dtype=torch.uint64)

    def backward(gradient, queries, keys, values, *_):
        return gradient.clone(), torch.zeros_like(keys), torch.zeros_like(values)

    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward)
    knows = frozenset(inspect.signature(varlen_attn).parameters)
    kernel = partial(attention_kernels._torch_varlen, varlen_attn, knows, (-1, 0))
else:
    @torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())
    def flash(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return attended(queries, keys, values)

    flash.register_fake(lambda queries, keys, values: torch.empty_like(queries))
    flash.register_autograd(lambda context, gradient: (gradient, gradient[:, :2], gradient[:, :2]))
    kernel = lambda queries, keys, values, *_: flash(queries, keys, values)

decoders.plan_attention = lambda lengths, device, *_, **__: attention_kernels.VarlenRow.of(lengths, device, kernel)

class Products(TorchDispatchMode):
    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        counted["products"] += operation.name().startswith("aten::mm")
        return operation(*args, **(kwargs or {}))

def opaque(graph, _):
    def run(arguments):
        with _disable_current_modes(), Products():
            return graph(*arguments)

    run._boxed_call = True  # takes its arguments as one list
    return run

one_kernel = aot_autograd(fw_compiler=opaque, bw_compiler=opaque)  # as inductor's are, seen from outside

config = FuyuConfig(vocab_size=512, patch_size=8, layers=3, width=64, heads=4, kv_heads=2, head_size=16,
                    feed_forward=128, routing=RoutingConfig(blocks=(1,), share=0.5))
row = pack_row(mixture(config, rows=1, budget=512, sides=(2, 12))[0], 512)
found = {}
for kind in ("none", "selective", "full"):
    torch.manual_seed(0)
    decoder = decoders.Decoder(config).train()
    for block in decoder.blocks:
        torch.nn.init.normal_(block.attention.o_proj.weight, std=0.1)
        torch.nn.init.normal_(block.mlp.down_proj.weight, std=0.1)
        if compiled:
            block.compile(backend=one_kernel)
    decoder.recompute(kind)
    loss = decoder.loss(row)
    counted.clear()
    with Products():
        loss.backward()
    sizes = [weight.grad.double().norm().item() for weight in decoder.parameters()]
    found[kind] = {"loss": loss.item(), "gradient": sizes, **counted}
    found[kind].setdefault("attention", 0)
print(json.dumps(found))
"""


@pytest.mark.parametrize("compiled", ["eager", "compiled"])
@pytest.mark.parametrize("kernel", ["varlen", "flash"])
def test_selective_keeps_products_and_attention(kernel: str, compiled: str) -> None:
    """In a process of its own: the checks of types that tests switch on can't be compiled."""
    command = [sys.executable, "-c", PROGRAM, kernel, compiled]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    assert found["none"]["attention"] == found["selective"]["attention"] == 0
    assert found["full"]["attention"] == 3
    assert found["none"]["products"] == found["selective"]["products"]
    assert found["full"]["products"] >= found["none"]["products"] + 3 * 6  # of a block's seven, its last needn't be
    for kind in ("selective", "full"):
        assert found[kind]["loss"] == found["none"]["loss"]
        assert found[kind]["gradient"] == pytest.approx(found["none"]["gradient"], rel=1e-4)


def test_selective_keeps_flex_attention() -> None:
    """Which on a CPU has no backward pass."""
    assert _policy(None, torch.ops.higher_order.flex_attention).name == "MUST_SAVE"
    assert _policy(None, torch.ops.aten.silu.default).name == "PREFER_RECOMPUTE"
