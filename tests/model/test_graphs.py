"""Compiled blocks stay compiled, whatever else a run does, and a run whose blocks don't says so.

In processes of their own: the checks of types that tests switch on can't be compiled.
"""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import inspect, json, sys, warnings
from collections import Counter
from functools import partial
import torch
from torch.nn.attention.varlen import varlen_attn
from fuyu_e2e.bench.documents import mixture
from fuyu_e2e.bench.generate import random_prompts
from fuyu_e2e.inference.generation import generate
from fuyu_e2e.model.attention import kernels as attention_kernels
from fuyu_e2e.model import decoder as decoders, graphs
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.routing.config import RoutingConfig
from fuyu_e2e.model.row import TrainingProgress
from fuyu_e2e.data.packing import pack_row

torch.set_num_threads(1)
warnings.filterwarnings("ignore", "(?!A block was compiled)")
order, skipped = sys.argv[1:3]
graphs.GRAPHS = int(sys.argv[3])

def forward(queries, *_):
    return queries.clone(), torch.zeros(queries.shape[1::-1]), torch.zeros(2, dtype=torch.uint64)

def backward(gradient, *inputs):
    return tuple(torch.zeros_like(tensor) for tensor in inputs[:3])

torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward)
torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward)
knows = frozenset(inspect.signature(varlen_attn).parameters)
kernel = partial(attention_kernels._torch_varlen, varlen_attn, knows, (-1, 0))
decoders.plan_attention = lambda lengths, device, *_, **__: attention_kernels.VarlenRow.of(lengths, device, kernel)
counted = Counter()

def counting(graph, _):
    counted["graphs"] += 1

    def run(*arguments):
        counted["runs"] += 1
        return graph(*arguments)

    return run

routing = None if skipped == "dense" else RoutingConfig(blocks=(1, 2, 4, 5), share=0.2, anneal=0.9, skipped=skipped)
config = FuyuConfig(vocab_size=512, patch_size=8, layers=7, width=64, heads=4, kv_heads=2, head_size=16,
                    feed_forward=128, routing=routing)
decoder = decoders.Decoder(config)
for block in decoder.blocks:
    block.compile(backend=counting)
rows = [pack_row(documents, 512) for sides in ((2, 4), (2, 12), (12, 18))
        for documents in mixture(config, rows=2, budget=512, sides=sides)]

def train():
    decoder.train()
    for step, row in enumerate(rows):
        decoder.progress = TrainingProgress(step, step / len(rows))  # the share is annealed, and with it the capacity
        with torch.autocast("cpu", torch.bfloat16):
            decoder.loss(row).backward()

@torch.no_grad()
def validate():
    decoder.eval()
    for row in rows:
        with torch.autocast("cpu", torch.bfloat16):
            decoder.loss(row)

def write():
    decoder.eval()
    generate(decoder, random_prompts(config, 4), max_new_tokens=12, eos_id=-1)

found = []
with warnings.catch_warnings(record=True) as said:
    for part in order.split(","):
        counted.clear()
        {"train": train, "validate": validate, "write": write}[part]()
        found.append({"part": part, "graphs": counted["graphs"], "runs": counted["runs"] / len(rows)})
print(json.dumps({"found": found, "said": [str(warning.message) for warning in said]}))
"""


def counts(order: str, skipped: str, graphs: int) -> tuple[list[dict], list[str]]:
    command = [sys.executable, "-c", PROGRAM, order, skipped, str(graphs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    return result["found"], result["said"]


@pytest.mark.parametrize("skipped", ["dense", "nothing", "keys"])
@pytest.mark.parametrize("order", ["train,write,validate,train,validate,write", "write,validate,write,train,validate"])
def test_compiled_blocks_stay_compiled_beside_generation(order: str, skipped: str) -> None:
    found, said = counts(order, skipped, 64)
    assert said == []
    for part in found:
        if part["part"] == "write":
            assert part["graphs"] == part["runs"] == 0
        else:
            assert part["runs"] >= 7  # blocks; a routed one in evaluation is in pieces
    assert sum(part["graphs"] for part in found if part["part"] == "train") <= (4 if skipped == "dense" else 10)
    again = [part["graphs"] for place, part in enumerate(found) if part["part"] in [p["part"] for p in found[:place]]]
    assert set(again) == {0}


def test_a_run_whose_blocks_are_not_all_compiled_says_so() -> None:
    found, said = counts("train,validate", "dense", 1)
    assert found[0]["runs"] < 7
    assert len(said) == 1, said
    assert "A block was compiled for 1 kinds of rows" in said[0]
    assert "TORCH_LOGS=recompiles" in said[0]
