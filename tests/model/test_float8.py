"""Products in 8-bit floating point, emulated on a CPU: what they round, and what they leave as it is."""

import copy

import pytest
import torch

from fuyu_e2e.bench.documents import mixture
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.errors import UserError
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.float8 import use_float8
from fuyu_e2e.model.routing.config import RoutingConfig

SIZES = {"vocab_size": 300, "patch_size": 8, "layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "head_size": 16}
CPU = torch.device("cpu")


@pytest.fixture(params=["dense", "routed"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    torch.manual_seed(0)
    routing = RoutingConfig(share=0.5, blocks=(1,)) if request.param == "routed" else None
    decoder = Decoder(FuyuConfig(**SIZES, feed_forward=128, routing=routing))
    with torch.no_grad():
        for block in decoder.blocks:
            for projection in (block.attention.o_proj, block.mlp.down_proj):
                torch.nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
    return decoder


def row(decoder: Decoder) -> PackedBatch:
    [documents] = mixture(decoder.config, rows=1, budget=301, sides=(2, 6))
    return pack_row(documents, 301)


def gradients(decoder: Decoder) -> tuple[float, torch.Tensor]:
    batch = row(decoder)
    loss = decoder.loss(batch) / len(batch.targets)
    loss.backward()
    return float(loss.detach()), torch.cat(
        [weight.grad.flatten() for weight in decoder.blocks.parameters() if weight.grad is not None]
    )


def test_a_step_is_nearly_that_in_float32(decoder: Decoder) -> None:
    """e4m3 has 3 bits after the first: a value is rounded by up to 6 %, a sum of many by much less."""
    rounded = copy.deepcopy(decoder)
    use_float8(rounded, CPU, emulated=True)
    loss, gradient = gradients(decoder)
    rounded_loss, rounded_gradient = gradients(rounded)
    assert rounded_loss != loss
    assert rounded_loss == pytest.approx(loss, rel=0.02)
    assert torch.cosine_similarity(gradient, rounded_gradient, dim=0) > 0.98


def test_weights_keep_their_names_and_values(decoder: Decoder) -> None:
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    use_float8(decoder, CPU, emulated=True)
    after = decoder.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_routing_rules_head_and_patches_stay_exact(decoder: Decoder) -> None:
    use_float8(decoder, CPU, emulated=True)
    changed = {name for name, module in decoder.named_modules() if type(module).__name__ == "Float8Linear"}
    parts = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
    parts += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert changed == {f"blocks.{layer}.{part}" for layer in range(2) for part in parts}


def test_a_device_without_such_products_is_refused(decoder: Decoder) -> None:
    with pytest.raises(UserError, match="a GPU with float8 products"):
        use_float8(decoder, CPU)


def test_sizes_that_do_not_fit_are_refused() -> None:
    decoder = Decoder(FuyuConfig(**SIZES, feed_forward=120))
    with pytest.raises(UserError, match=r"multiples of 16, but block 0\.mlp\.gate_proj has 120 x 64"):
        use_float8(decoder, CPU, emulated=True)
