"""Parity with transformers' own Fuyu: an independent implementation of the same function."""

import pytest
import torch

from fuyu_e2e.batch import PackedBatch
from fuyu_e2e.errors import UserError
from fuyu_e2e.export.transformers import transformers_config, transformers_state_dict
from fuyu_e2e.model.config import FuyuConfig, RoutingConfig
from fuyu_e2e.model.decoder import Decoder

transformers = pytest.importorskip("transformers", reason="needs the extra `export`")

PATCH, NEWLINE, BOS, EOS = 300, 301, 1, 2
SHAPES = {
    "every head its own key": {"heads": 3, "kv_heads": 3},
    "grouped": {"heads": 6, "kv_heads": 2},
    "one key for all, tied": {"heads": 4, "kv_heads": 1, "tie_embeddings": True},
    "long wavelengths": {"heads": 2, "kv_heads": 1, "rope_theta": 1e6, "norm_eps": 1e-5},
}


def random_decoder(seed: int, **shape: object) -> Decoder:
    torch.manual_seed(seed)
    decoder = Decoder(
        FuyuConfig(vocab_size=310, patch_size=4, layers=3, width=48, head_size=16, feed_forward=80, **shape)
    )
    with torch.no_grad():
        for weight in decoder.parameters():  # a new model's blocks add nothing, which would compare nothing
            weight.add_(torch.randn_like(weight) * 0.3)
    return decoder.eval()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 3), (1, 9), (5, 1), (0, 0)])
def test_logits_equal_stock_fuyu_with_a_qwen3_text_model(shape: dict, rows: int, cols: int) -> None:
    decoder = random_decoder(rows * 10 + cols, **shape)
    stock = stock_fuyu(decoder)
    tokens = torch.tensor(([PATCH] * cols + [NEWLINE]) * rows + [BOS, *torch.randint(3, 300, (12,)).tolist()])
    patches = torch.randint(0, 256, (rows * cols, 48), dtype=torch.uint8)
    batch = PackedBatch(
        tokens=tokens,
        positions=torch.arange(len(tokens)),
        patches=patches,
        patch_positions=torch.nonzero(tokens == PATCH)[:, 0],
        target_positions=torch.arange(0),
        targets=torch.arange(0),
        document_lengths=(len(tokens),),
    )
    pixels = {"pixel_values": (patches[None].float() / 255 - 0.5) / 0.5} if rows else {}
    with torch.no_grad():
        ours, theirs = decoder(batch), stock(input_ids=tokens[None], **pixels).logits[0]
    assert ours.std() > 0.5, "the models say nothing, so the comparison means nothing"
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_routed_decoder_is_not_exported_as_a_dense_one() -> None:
    decoder = random_decoder(0, heads=2, kv_heads=1, routing=RoutingConfig(share=0.5))
    with pytest.raises(UserError, match="routed blocks can't be exported"):
        transformers_config(decoder.config, patch_id=PATCH, bos_id=BOS, eos_id=EOS)


def stock_fuyu(decoder: Decoder) -> torch.nn.Module:
    settings = transformers_config(decoder.config, patch_id=PATCH, bos_id=BOS, eos_id=EOS)
    text = transformers.Qwen3Config(**settings.pop("text_config"))
    stock = transformers.FuyuForCausalLM(transformers.FuyuConfig(text_config=text, **settings)).eval()
    missing, unexpected = stock.load_state_dict(transformers_state_dict(decoder), strict=False)
    assert not unexpected
    assert not [name for name in missing if "rotary" not in name]
    return stock
