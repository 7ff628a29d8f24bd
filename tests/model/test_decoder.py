"""Laws of the decoder on packed rows."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.data.document import Document
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.routing.config import RoutingConfig

seeds = st.lists(st.integers(0, 10_000), min_size=1, max_size=9)
RandomDocument = Callable[[int], Document]


@given(seeds=seeds, padding=st.integers(0, 40))
def test_packed_logits_equal_those_of_each_document_alone(
    seeds: list[int], padding: int, decoder: Decoder, builder: SequenceBuilder, random_document: RandomDocument
) -> None:
    sequences = [builder.build(random_document(seed)) for seed in seeds]
    with torch.no_grad():
        packed = decoder.logits(pack_row(sequences, sum(map(len, sequences)) + padding))
        alone = torch.cat([decoder.logits(pack_row([sequence])) for sequence in sequences])
    assert alone.std() > 0.5
    torch.testing.assert_close(packed[: len(alone)], alone, atol=1e-5, rtol=1e-5)


@given(seeds=seeds, data=st.data())
def test_changing_a_token_changes_no_earlier_logits_and_no_other_documents(
    seeds: list[int],
    data: st.DataObject,
    decoder: Decoder,
    builder: SequenceBuilder,
    random_document: RandomDocument,
) -> None:
    batch = pack_row([builder.build(random_document(seed)) for seed in seeds])
    changed_at = data.draw(st.integers(0, len(batch.tokens) - 1))
    tokens = batch.tokens.clone()
    tokens[changed_at] = (tokens[changed_at] + 1) % decoder.config.vocab_size
    patches = batch.patches.clone()
    patches[batch.patch_positions == changed_at] = 255 - patches[batch.patch_positions == changed_at]
    changed = replace(batch, tokens=tokens, patches=patches)
    with torch.no_grad():
        difference = (decoder.logits(batch) - decoder.logits(changed)).abs().amax(dim=-1)
    ends = torch.tensor(batch.document_lengths).cumsum(0)
    end = int(ends[torch.searchsorted(ends, changed_at, right=True)])
    assert (difference[:changed_at] == 0).all()
    assert (difference[end:] == 0).all()
    assert difference[changed_at] > 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("width", "vocab_size"), [(48, 320), (256, 4096), (1024, 32768)])
def test_an_untrained_model_guesses_uniformly(width: int, vocab_size: int, tied: bool) -> None:
    torch.manual_seed(1)
    config = FuyuConfig(
        vocab_size=vocab_size,
        patch_size=4,
        layers=2,
        width=width,
        heads=2,
        kv_heads=1,
        head_size=16,
        feed_forward=64,
        tie_embeddings=tied,
    )
    tokens = torch.randint(0, vocab_size, (512,))
    batch = PackedBatch(
        tokens=tokens,
        positions=torch.arange(512),
        patches=torch.empty(0, 48, dtype=torch.uint8),
        patch_positions=torch.arange(0),
        target_positions=torch.arange(511),
        targets=tokens[1:],
        document_lengths=(512,),
    )
    with torch.no_grad():
        loss = Decoder(config).loss(batch) / 511
    assert abs(loss.item() / math.log(vocab_size) - 1) < 0.01


def test_loss_is_the_cross_entropy_of_the_logits_however_many_chunks(
    decoder: Decoder, builder: SequenceBuilder, random_document: RandomDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = pack_row([builder.build(random_document(seed)) for seed in range(20)], 4096)
    logits = decoder.logits(batch)[batch.target_positions]
    expected = torch.nn.functional.cross_entropy(logits.double(), batch.targets, reduction="sum").float()
    (expected_gradient,) = torch.autograd.grad(expected, decoder.embed_tokens.weight)
    for chunk in (1, 7, 10_000):
        monkeypatch.setattr("fuyu_e2e.model.decoder.LOSS_CHUNK", chunk)
        loss = decoder.loss(batch)
        (gradient,) = torch.autograd.grad(loss, decoder.embed_tokens.weight)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [7, 10_000])
def test_z_loss_is_the_squared_logarithm_of_the_softmaxs_normaliser(
    decoder: Decoder,
    builder: SequenceBuilder,
    random_document: RandomDocument,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
) -> None:
    batch = pack_row([builder.build(random_document(seed)) for seed in range(20)], 4096)
    expected = decoder.logits(batch)[batch.target_positions].double().exp().sum(dim=-1).log().square().sum().float()
    (expected_gradient,) = torch.autograd.grad(expected, decoder.embed_tokens.weight)
    monkeypatch.setattr("fuyu_e2e.model.decoder.LOSS_CHUNK", chunk)
    loss, z_loss = decoder.loss_and_z(batch, with_z=True)
    torch.testing.assert_close(z_loss, expected)
    torch.testing.assert_close(loss, decoder.loss(batch))
    (gradient,) = torch.autograd.grad(z_loss, decoder.embed_tokens.weight)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-3, rtol=1e-3)
    assert decoder.loss_and_z(batch, with_z=False)[1] == 0


def test_loss_has_no_more_than_a_chunk_of_logits_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuyu_e2e.model.decoder.LOSS_CHUNK", 64)
    config = FuyuConfig(
        vocab_size=5_000, patch_size=4, layers=1, width=16, heads=1, kv_heads=1, head_size=16, feed_forward=16
    )
    decoder, tokens = Decoder(config), torch.randint(0, 5_000, (1_001,))
    batch = PackedBatch(
        tokens=tokens,
        positions=torch.arange(1_001),
        patches=torch.empty(0, 48, dtype=torch.uint8),
        patch_positions=torch.arange(0),
        target_positions=torch.arange(1_000),
        targets=tokens[1:],
        document_lengths=(1_001,),
    )
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (5_000,):
                largest = max(largest, result.numel() // 5_000)
            return result

    with Watch():
        decoder.loss(batch).backward()
    assert 0 < largest <= 64


def test_a_batch_without_images_gives_the_patch_projection_a_gradient(
    decoder: Decoder, builder: SequenceBuilder, random_document: RandomDocument
) -> None:
    batch = pack_row([builder.build(random_document(0))])
    assert batch.patches.shape[0] == 0
    weight, bias = decoder.patch_projection.weight, decoder.patch_projection.bias
    gradients = torch.autograd.grad(decoder.loss(batch), [weight, bias])
    assert all((gradient == 0).all() for gradient in gradients)


def test_every_weight_of_a_new_model_can_learn(
    config: FuyuConfig, builder: SequenceBuilder, random_document: RandomDocument
) -> None:
    """Output projections start at zero, so it takes two steps until the last gradient arrives."""
    decoder = Decoder(config)
    batch = pack_row([builder.build(random_document(seed)) for seed in range(10)])
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        decoder.loss(batch).backward()
        optimizer.step()
    assert not [name for name, weight in decoder.named_parameters() if not weight.grad.abs().sum() > 0]


@pytest.mark.parametrize("precision", ["mixed", "true"])
@pytest.mark.parametrize("dialect", [{}, {"dialect": "fuyu", "kv_heads": 4}], ids=["qwen3", "fuyu"])
@pytest.mark.parametrize("routing", [None, RoutingConfig(blocks=(1,), skipped="keys")], ids=["dense", "routed"])
def test_norms_and_attention_in_bfloat16_take_one_type(
    routing: RoutingConfig | None,
    dialect: dict,
    precision: str,
    config: FuyuConfig,
    builder: SequenceBuilder,
    random_document: RandomDocument,
) -> None:
    """A GPU has one kernel for a norm only where its input has the type of its weight, and one type in attention."""
    torch.manual_seed(0)
    decoder = Decoder(replace(config, routing=routing, **dialect))
    decoder = decoder.bfloat16() if precision == "true" else decoder
    norms: list[bool] = []
    types: list[set[torch.dtype]] = []
    for module in decoder.modules():
        if isinstance(module, torch.nn.RMSNorm | torch.nn.LayerNorm):
            module.register_forward_pre_hook(lambda norm, given: norms.append(given[0].dtype == norm.weight.dtype))
    attend = torch.nn.functional.scaled_dot_product_attention

    def look(*inputs: torch.Tensor, **settings: Any) -> torch.Tensor:
        types.append({tensor.dtype for tensor in inputs})
        return attend(*inputs, **settings)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"):
        patch.setattr("torch.nn.functional.scaled_dot_product_attention", look)
        decoder.loss(pack_row([builder.build(random_document(seed)) for seed in range(9)]))
    assert len(norms) == 4 * config.layers + 1
    assert all(norms)
    assert types
    assert all(found == {torch.bfloat16} for found in types)
