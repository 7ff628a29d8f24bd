"""Estimated memory is what a training step holds."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fuyu_e2e.bench.own_process import peak_memory
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.memory import Memory, memory
from fuyu_e2e.model.routing.config import RoutingConfig

SMALL = FuyuConfig(
    vocab_size=512, patch_size=8, layers=3, width=64, heads=4, kv_heads=2, head_size=16, feed_forward=160
)
DIALECTS = {"qwen3": SMALL, "fuyu": replace(SMALL, dialect="fuyu", kv_heads=4)}


def row(config: FuyuConfig, tokens: int, document: int = 128) -> PackedBatch:
    """Documents of one length, half image, a quarter supervised."""
    places = torch.arange(tokens).view(-1, document)
    supervised = places[:, -document // 4 :].flatten()[:-1]
    patches = places[:, : document // 2].flatten()
    return PackedBatch(
        tokens=torch.zeros(tokens, dtype=torch.int64),
        positions=places.remainder(document).flatten(),
        patches=torch.zeros(len(patches), config.patch_values, dtype=torch.uint8),
        patch_positions=patches,
        target_positions=supervised,
        targets=torch.zeros(len(supervised), dtype=torch.int64),
        document_lengths=(document,) * (tokens // document),
    )


def estimated(config: FuyuConfig, batch: PackedBatch, **settings: Any) -> Memory:
    return memory(config, tokens=len(batch.tokens), patches=len(batch.patches), targets=len(batch.targets), **settings)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_activations_are_what_the_forward_pass_saves(dialect: str, precision: str) -> None:
    config, batch = DIALECTS[dialect], row(SMALL, 1_024)
    decoder = Decoder(config)
    weights = {weight.untyped_storage().data_ptr() for weight in decoder.parameters()}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"),
    ):
        decoder.loss(batch)
    log_softmax = len(batch.targets) * config.vocab_size * 4
    expected = estimated(config, batch, precision=precision).activations
    assert sum(saved.values()) - log_softmax == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_gradients_and_state_are_what_the_optimizer_holds(optimizer: str) -> None:
    parts = estimated(SMALL, row(SMALL, 256), optimizer=optimizer)
    decoder = Decoder(SMALL)
    values = sum(weight.numel() for weight in decoder.parameters())
    matrices = sum(weight.numel() for weight in decoder.blocks.parameters() if weight.ndim == 2)
    assert parts.weights == parts.gradients == 4 * values
    assert parts.optimizer_state == 4 * (2 * values - (matrices if optimizer == "muon" else 0))
    assert estimated(SMALL, row(SMALL, 256), processes=2).gradients == 8 * values
    assert estimated(SMALL, row(SMALL, 256), precision="bf16-true").weights == 2 * values


def test_a_routed_block_counts_whole_while_its_share_is_annealed() -> None:
    batch = row(SMALL, 256)
    dense = estimated(SMALL, batch).activations
    kept, annealed = (
        estimated(replace(SMALL, routing=RoutingConfig(share=0.25, slack=0.0, anneal=anneal)), batch).activations
        for anneal in (0.0, 0.1)
    )
    assert dense == annealed
    assert kept < 0.8 * dense


def train(config: FuyuConfig, tokens: int) -> None:
    """Some steps as Lightning makes them: gradients of the last one are dropped after the forward pass."""
    decoder, batch = Decoder(config), row(config, tokens)
    optimizer = torch.optim.AdamW(decoder.parameters())
    for _ in range(2):
        loss = decoder.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_step_takes_the_memory_that_was_estimated() -> None:
    """Weights with what belongs to them, activations and logits each have a good part in it."""
    config = FuyuConfig(
        vocab_size=16_384,
        patch_size=16,
        layers=4,
        width=256,
        heads=4,
        kv_heads=4,
        head_size=64,
        feed_forward=768,
    )
    parts = estimated(config, row(config, 2_048))
    assert peak_memory(train, config, 2_048) == pytest.approx(parts.total, rel=0.15)
