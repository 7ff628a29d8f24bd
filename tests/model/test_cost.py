"""The counted cost against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fuyu_e2e.batch import PackedBatch
from fuyu_e2e.model.attention import reference_attention
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.cost import cost
from fuyu_e2e.model.decoder import Decoder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("length", [48, 200])
def test_training_flops_agree_with_torchs_counter(heads: int, kv_heads: int, tied: bool, length: int) -> None:
    config = FuyuConfig(
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
    counted = cost(config, document_lengths=(length,), patches=30, targets=length - 31)

    # torch's counter doesn't know the CPU's attention kernel, so the definition runs in its place.
    def attend(layer: int, *qkv: torch.Tensor) -> torch.Tensor:
        return reference_attention(*qkv, (length,))

    def loss() -> torch.Tensor:
        x = decoder.embed(batch.tokens, batch.patches, batch.patch_positions)
        hidden = decoder.hidden(x, batch.positions, attend)[batch.target_positions]
        return decoder._chunk_loss(hidden, batch.targets)

    with FlopCounterMode(display=False) as forward:
        result = loss()
    with FlopCounterMode(display=False) as backward:
        result.backward()
    assert counted.forward_flops == pytest.approx(forward.get_total_flops(), rel=0.01)
    measured = forward.get_total_flops() + backward.get_total_flops()
    assert counted.training_flops == pytest.approx(measured, rel=0.01)
    assert counted.parameters == sum(weight.numel() for weight in decoder.parameters())
    assert counted.training_flops_per_token == pytest.approx(measured / length, rel=0.01)
