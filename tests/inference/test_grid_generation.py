"""Under positions by row and column, cached generation is the uncached forward, token for token."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuyu_e2e.data.document import Document, Image, Text
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.inference import generation
from fuyu_e2e.inference.cache import KeyValueCache
from fuyu_e2e.inference.generation import decode_step, generate, prefill
from fuyu_e2e.model.attention.mask import CAUSAL, AttentionMask
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.image_layout import Grid
from fuyu_e2e.model.images.linear import LinearConfig
from fuyu_e2e.model.routing.config import RoutingConfig

from .test_generation import uncached

KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "windows": {"masks": (AttentionMask(window=5, sinks=1), CAUSAL)},
    "routed": {"routing": RoutingConfig(share=0.4, skipped="keys", blocks=(1,))},
}


@dataclass(frozen=True)
class UnbrokenConfig(LinearConfig):
    """No newlines: an image ends with its last patch."""

    def tokens(self, grids: tuple[Grid, ...]) -> np.ndarray:
        return np.zeros(sum(rows * cols for rows, cols in grids), bool)


@pytest.fixture(scope="module")
def readers(decoder: Decoder) -> dict[str, Decoder]:
    """The same weights in decoders of several kinds."""
    made = {}
    for name, kind in KINDS.items():
        torch.manual_seed(0)
        made[name] = Decoder(replace(decoder.config, rotary="2d", **kind)).eval()
        with torch.no_grad():
            for weight in made[name].parameters():
                weight.add_(torch.randn_like(weight) * 0.2)
    return made


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@given(seeds=st.lists(st.integers(0, 1_000), min_size=1, max_size=5), piece=st.sampled_from([2_048, 7, 30]))
@settings(max_examples=settings.default.max_examples // 3)
def test_cached_greedy_generation_is_the_uncached_forward(
    kind: str,
    seeds: list[int],
    piece: int,
    readers: dict[str, Decoder],
    builder: SequenceBuilder,
    random_document: Callable[[int], Document],
) -> None:
    """Of prompts together, also read in pieces that go through images."""
    prompts = [builder.prompt(random_document(seed).prompt) for seed in seeds]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(generation.PREFILL_TOKENS, "cpu", piece)
        together = generate(readers[kind], prompts, max_new_tokens=6, eos_id=-1)
    assert together == [uncached(readers[kind], prompt, 6, -1) for prompt in prompts]


@torch.no_grad()
@pytest.mark.parametrize("connector", [LinearConfig(), UnbrokenConfig()])
def test_a_prompt_may_end_with_an_image(
    decoder: Decoder, builder: SequenceBuilder, make_png: Callable[..., bytes], connector: LinearConfig
) -> None:
    """The next token comes after its longer side, whatever its last token is."""
    reader = Decoder(replace(decoder.config, rotary="2d", connector=connector))
    reader.load_state_dict(decoder.state_dict())
    ours = replace(builder, layout=connector)
    shapes = [(4, 60), (60, 4), (20, 20), (4, 4)]
    prompts = [
        ours.prompt(Document("key", (Text("4072", loss=True), Image(make_png(*shape, seed=2))))) for shape in shapes
    ]
    assert all(prompt.images[0].stop == len(prompt) for prompt in prompts)
    cache = KeyValueCache(reader.eval(), len(prompts), 100)
    prefill(reader, pack_row(prompts), cache)
    tokens = np.arange(3, 3 + len(prompts))
    found = reader.lm_head(decode_step(reader, torch.from_numpy(tokens), cache))
    for logits, prompt, token in zip(found, prompts, tokens, strict=True):
        longer = replace(prompt, tokens=np.append(prompt.tokens, token), loss=np.append(prompt.loss, True))
        torch.testing.assert_close(logits, reader.logits(pack_row([longer]))[-1], atol=1e-5, rtol=1e-5)
