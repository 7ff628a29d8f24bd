"""A compiled decoding step says what the step says, and is compiled no oftener than promised."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from fuyu_e2e.data.document import Document, Text
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.errors import UserError
from fuyu_e2e.inference.compiled import compiled_cache
from fuyu_e2e.inference.generation import generate
from fuyu_e2e.model.decoder import Decoder

PROGRAM = """
import sys
from dataclasses import dataclass
import numpy as np, torch
from torch._dynamo.utils import counters
from fuyu_e2e.inference import compiled, packed
from fuyu_e2e.model.image_layout import ImageSpan
from fuyu_e2e.inference.generation import generate
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.attention.mask import CAUSAL, AttentionMask
from fuyu_e2e.data.sequence import TokenSequence

@dataclass(frozen=True, kw_only=True)
class EvenDistance(AttentionMask):
    def sees(self, query, key, same_image):
        return super().sees(query, key, same_image) & ((query - key) % 2 == 0)

masks = {
    "causal": (CAUSAL,),
    "by depth": (AttentionMask(window=5), EvenDistance(window=20, sinks=2, images="bidirectional")),
    "rows and columns": (CAUSAL, AttentionMask(window=5)),
}[sys.argv[1]]
rotary = "2d" if sys.argv[1] == "rows and columns" else "1d"

torch.set_num_threads(1)
compiled.SMALLEST = 16
packed.SMALLEST = 300  # so that some weights are packed, and some not
decoder = Decoder(FuyuConfig(vocab_size=50, patch_size=4, layers=2, width=16, heads=4, kv_heads=2, head_size=8,
                             feed_forward=24, masks=masks, rotary=rotary))
with torch.no_grad():
    for weight in decoder.parameters():
        weight.add_(torch.randn_like(weight) * 0.3)
decoder.eval()

def prompts(*lengths):
    rng = np.random.default_rng(lengths)
    images = [(ImageSpan.of_grid(1, 2, 3),) if rotary == "2d" and n > 9 else () for n in lengths]
    patches = [rng.integers(0, 256, (6 * len(spans), 48), np.uint8) for spans in images]
    return [TokenSequence(key="", tokens=rng.integers(0, 50, n), loss=np.zeros(n, bool), patches=own, images=spans)
            for n, own, spans in zip(lengths, patches, images)]

def same(*lengths):
    asked = {"max_new_tokens": 16, "eos_id": -1}
    expected = generate(decoder, prompts(*lengths), **asked)
    assert generate(decoder, prompts(*lengths), **asked, compiled=True) == expected
    assert len({tuple(row) for row in expected}) == len(lengths), "all say the same, which compares little"
    return counters["stats"]["unique_graphs"]

print(same(14, 3), same(9, 13), same(15, 11))
with torch.no_grad():
    decoder.lm_head.weight.mul_(-1)
print(same(14, 3))
"""


@pytest.mark.parametrize("masks", ["causal", "by depth", "rows and columns"])
def test_a_compiled_step_writes_the_same_and_is_compiled_once_for_each_size(masks: str) -> None:
    """In a process of its own: the checks of shapes that tests switch on can't be compiled.

    14 to 30 tokens lie in rooms of 16 and 32 places; other prompts and other weights of the same shapes add no graph.
    """
    done = subprocess.run([sys.executable, "-c", PROGRAM, masks], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "2", "2", "2"]


def test_a_routed_decoder_is_not_compiled(routed_decoder: Callable[..., Decoder], builder: SequenceBuilder) -> None:
    prompt = builder.prompt(Document("key", (Text("What is it?", loss=False),)))
    with pytest.raises(UserError, match="compiled=False"):
        generate(routed_decoder(share=0.4), [prompt], max_new_tokens=1, eos_id=-1, compiled=True)


def test_under_autocast_the_cache_of_the_last_call_is_taken_again(decoder: Decoder) -> None:
    """Else a CUDA graph would be recorded again in each call."""
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled_cache(decoder, 2, 100) is compiled_cache(decoder, 2, 100)
    assert compiled_cache(decoder, 2, 100).dense[0].keys.dtype == torch.float32
