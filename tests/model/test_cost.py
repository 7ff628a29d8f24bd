"""The counted cost against torch's own counter."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fuyu_e2e.model.attention.interface import Attend, Passing, RowAttention, reference_attention
from fuyu_e2e.model.attention.mask import CAUSAL, AttentionMask
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.cost import cost, decode_step_flops
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.image_layout import ImageSpan
from fuyu_e2e.model.routing.block import routed_blocks
from fuyu_e2e.model.routing.config import RoutingConfig
from fuyu_e2e.model.row import Row, TrainingProgress


class Definition(RowAttention):
    """Attention of one document by its definition: torch's counter doesn't know the CPU's kernel."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if len(q) < len(k):  # those that ask see all keys; the mask costs nothing
            k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
            weights = torch.einsum("chk,thk->hct", q, k).softmax(dim=-1)
            return torch.einsum("hct,thk->chk", weights, v)
        return reference_attention(q, k, v, (len(q),))

    def select(self, passing: Passing) -> Attend:
        return self

    def cross(self, passing: Passing) -> Attend:
        return self


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dialect"), [(4, 4, "qwen3"), (6, 2, "qwen3"), (4, 4, "fuyu")])
@pytest.mark.parametrize("length", [48, 200])
def test_training_flops_agree_with_torchs_counter(
    heads: int, kv_heads: int, dialect: str, tied: bool, length: int
) -> None:
    config = FuyuConfig(
        dialect=dialect,
        vocab_size=500,
        patch_size=8,
        layers=3,
        width=64,
        heads=heads,
        kv_heads=kv_heads,
        head_size=16,
        feed_forward=160,
        tie_embeddings=tied,
    )
    decoder = Decoder(config)
    tokens = torch.randint(0, 500, (length,))
    batch = PackedBatch(
        tokens=tokens,
        positions=torch.arange(length),
        patches=torch.zeros(30, 192, dtype=torch.uint8),
        patch_positions=torch.arange(30),
        target_positions=torch.arange(30, length - 1),
        targets=tokens[31:],
        document_lengths=(length,),
    )
    counted = cost(config, document_lengths=(length,), grids=[(1, 30)], targets=length - 31)

    row = decoder.row_of(batch.positions, [Definition()] * config.layers)

    def loss() -> torch.Tensor:
        return decoder.loss(batch, row)

    with FlopCounterMode(display=False) as forward:
        result = loss()
    with FlopCounterMode(display=False) as backward:
        result.backward()
    assert counted.forward_flops == pytest.approx(forward.get_total_flops(), rel=0.01)
    measured = forward.get_total_flops() + backward.get_total_flops()
    assert counted.training_flops == pytest.approx(measured, rel=0.01)
    assert counted.parameters == sum(weight.numel() for weight in decoder.parameters())
    assert counted.training_flops_per_token == pytest.approx(measured / length, rel=0.01)


@pytest.mark.parametrize("skipped", ["nothing", "keys"])
@pytest.mark.parametrize("rule", ["threshold", "topk"])
def test_routed_flops_agree_with_torchs_counter(rule: str, skipped: str) -> None:
    """One document, of which the definition of attention runs over the passing tokens alone."""
    routing = RoutingConfig(rule=rule, share=0.3, skipped=skipped, slack=0.0)
    config = FuyuConfig(
        vocab_size=500, patch_size=8, layers=5, width=64, heads=4, kv_heads=2, head_size=16, feed_forward=160,
        routing=routing,
    )  # fmt: skip
    decoder, length = Decoder(config), 320
    tokens = torch.randint(0, 500, (length,))
    batch = PackedBatch(
        tokens=tokens,
        positions=torch.arange(length),
        patches=torch.zeros(30, 192, dtype=torch.uint8),
        patch_positions=torch.arange(30),
        target_positions=torch.arange(30, length - 1),
        targets=tokens[31:],
        document_lengths=(length,),
        images=(ImageSpan(0, ((1, 30),), bytes(30)),),
    )

    decoder.eval()

    def read() -> Row:
        return decoder.row_of(batch.positions, [Definition()] * config.layers, decoder.info(batch))

    for _ in range(2):
        row = read()
        decoder.logits(batch, row)
        decoder.observe(row)
        decoder.end_step(TrainingProgress(), lambda counts: counts)
    row = read()

    def loss() -> torch.Tensor:
        return decoder.loss(batch, row)

    with FlopCounterMode(display=False) as forward:
        result = loss()
    with FlopCounterMode(display=False) as backward:
        result.backward()
    passing = [[int(routed.passed.sum())] for routed in routed_blocks(row)]
    assert all(0 < counts[0] < length for counts in passing)
    counted = cost(config, document_lengths=(length,), grids=[(1, 30)], targets=length - 31, passing=passing)
    assert counted.forward_flops == pytest.approx(forward.get_total_flops(), rel=0.01)
    if rule == "threshold":
        measured = forward.get_total_flops() + backward.get_total_flops()
        assert counted.training_flops == pytest.approx(measured, rel=0.01)
    assert counted.parameters == sum(weight.numel() for weight in decoder.parameters())


def test_the_shares_asked_for_are_what_counts_where_nothing_else_is_known() -> None:
    shape = {"vocab_size": 500, "patch_size": 8, "layers": 9, "width": 64, "heads": 4, "kv_heads": 2, "head_size": 16}
    dense = FuyuConfig(**shape, feed_forward=160)
    row = {"document_lengths": (100, 60), "grids": [(8, 10)], "targets": 10}
    for routing, shares in (
        (RoutingConfig(share=0.25), (0.25, 0.25, 0.25)),
        (RoutingConfig(share=(0.5, 0.25, 0.125)), (0.5, 0.25, 0.125)),
        (RoutingConfig(share=0.1, text_share=0.7), (0.4, 0.4, 0.4)),
        (RoutingConfig(rule="image_topk", share=0.5), (0.75, 0.75, 0.75)),
    ):
        config = replace(dense, routing=routing)
        asked = [[100 * share, 60 * share] for share in shares]
        assert cost(config, **row).training_flops == cost(config, **row, passing=asked).training_flops
        whole = cost(config, **row, done=0.0).training_flops
        assert whole == cost(dense, **row).training_flops > cost(config, **row).training_flops


def test_a_window_counts_what_it_shows_of_each_document() -> None:
    """By hand: a query meets so many keys in each head, once for its score and once for the sum of values."""
    shape = {"vocab_size": 500, "patch_size": 8, "layers": 3, "width": 64, "heads": 4, "kv_heads": 2, "head_size": 16}
    plain = FuyuConfig(**shape, feed_forward=160)
    windowed = replace(plain, masks=(AttentionMask(window=30, sinks=2), AttentionMask(window=70), CAUSAL))
    lengths = (100, 60, 7)
    row = {"document_lengths": lengths, "grids": [], "targets": 10}
    pair = 2 * 2 * 4 * 16
    attention = pair * ((100 * 32 + 60 * 32 + 7 * 7) + (100 * 70 + 60 * 60 + 7 * 7) + (100**2 + 60**2 + 7**2))
    others = cost(plain, **row).forward_flops - 3 * pair * (100**2 + 60**2 + 7**2)
    assert cost(windowed, **row).forward_flops == others + attention
    assert cost(windowed, **row).training_flops == 3 * (others + attention)
    assert cost(windowed, **row).parameters == cost(plain, **row).parameters

    keys = (101, 61, 8)
    step = pair * ((32 + 32 + 8) + (70 + 61 + 8) + (101 + 61 + 8))
    assert decode_step_flops(windowed, keys) == decode_step_flops(plain, keys) - 3 * pair * sum(keys) + step


@pytest.mark.parametrize("skipped", ["nothing", "keys"])
def test_of_a_window_the_tokens_that_pass_have_their_share(skipped: str) -> None:
    shape = {"vocab_size": 500, "patch_size": 8, "layers": 3, "width": 64, "heads": 4, "kv_heads": 2, "head_size": 16}
    routing = RoutingConfig(share=0.5, skipped=skipped, blocks=(1,))
    plain = FuyuConfig(**shape, feed_forward=160, routing=routing)
    windowed = replace(plain, masks=(CAUSAL, AttentionMask(window=30, sinks=2)))
    row = {"document_lengths": (100, 20), "grids": [], "targets": 10, "passing": [[40, 10]]}
    pair = 2 * 2 * 4 * 16
    all_keys, shown = (100, 20), (32, 20)
    if skipped == "nothing":
        all_keys, shown = (40, 10), (12.8, 10)
    fewer = pair * (40 * (all_keys[0] - shown[0]) + 10 * (all_keys[1] - shown[1]))
    assert cost(plain, **row).forward_flops - cost(windowed, **row).forward_flops == pytest.approx(fewer, abs=1)
