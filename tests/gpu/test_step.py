"""What only a GPU can show of a training step: bfloat16, kernels of attention, and a host that never waits."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fuyu_e2e.bench.documents import mixture
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.inference.cache import KeyValueCache
from fuyu_e2e.inference.generation import decode_step, generate, prefill
from fuyu_e2e.model.attention import grouped as attention_plans
from fuyu_e2e.model.attention.grouped import GroupedRow
from fuyu_e2e.model.attention.interface import reference_attention
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.float8 import has_float8, use_float8
from fuyu_e2e.training.optimizers import OptimizerConfig, build_optimizer

NoWait = Callable[[], AbstractContextManager[None]]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]
CONFIG = FuyuConfig(
    vocab_size=512, patch_size=8, layers=3, width=128, heads=4, kv_heads=2, head_size=32, feed_forward=256
)
LENGTHS = (7, 64, 130, 1, 300, 64)


@pytest.fixture
def speaking(device: str) -> Decoder:
    """A decoder whose blocks say something, unlike a new one's."""
    torch.manual_seed(0)
    decoder = Decoder(CONFIG)
    with torch.no_grad():
        for block in decoder.blocks:
            for projection in (block.attention.o_proj, block.mlp.down_proj):
                torch.nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
    return decoder.to(device)


@pytest.fixture
def row(device: str) -> PackedBatch:
    [documents] = mixture(CONFIG, rows=1, budget=1_024, sides=(3, 12))
    return pack_row(documents, 1_024).to(device)


def gradients(decoder: Decoder, row: PackedBatch, device: str, bf16: bool) -> tuple[float, Tensor]:
    """The mean loss of a step, and all gradients in one vector."""
    decoder = copy.deepcopy(decoder)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        loss = decoder.loss(row) / len(row.targets)
    loss.backward()
    parts = [weight.grad.flatten() for weight in decoder.parameters() if weight.grad is not None]
    return float(loss.detach()), torch.cat(parts)


def test_a_step_in_bfloat16_is_that_in_float32(speaking: Decoder, row: PackedBatch, device: str) -> None:
    """bfloat16 has 8 bits of precision: 0.4 % a rounding. A wrong mask or position is off by far more."""
    loss, gradient = gradients(speaking, row, device, bf16=False)
    rounded_loss, rounded = gradients(speaking, row, device, bf16=True)
    assert rounded_loss == pytest.approx(loss, rel=0.01)
    assert torch.cosine_similarity(gradient, rounded, dim=0) > 0.99
    assert rounded.norm() == pytest.approx(gradient.norm().item(), rel=0.05)


def test_a_step_is_that_of_the_cpu(speaking: Decoder, row: PackedBatch, device: str) -> None:
    loss, gradient = gradients(speaking, row, device, bf16=False)
    expected_loss, expected = gradients(speaking.cpu(), row.to("cpu"), "cpu", bf16=False)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-2, atol=1e-4)


BACKENDS = {
    "math": (SDPBackend.MATH, torch.float32, 1e-4),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, torch.float32, 2e-3),
    "flash": (SDPBackend.FLASH_ATTENTION, torch.bfloat16, 2e-2),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_every_kernel_of_attention_gives_the_reference(
    backend: str, kv_heads: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, dtype, tolerance = BACKENDS[backend]
    if device == "cpu" and backend not in ("math", "flash"):
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    total = sum(LENGTHS)
    q = torch.randn(total, 4, 64, device=device, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(total, kv_heads, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    plan = GroupedRow.of(LENGTHS, torch.device(device))
    try:
        monkeypatch.setattr(attention_plans, "KERNELS", [kernel])
        with sdpa_kernel(kernel):  # for the CPU, where none is named
            found = plan(q, k, v)
            grads = torch.autograd.grad(found.float().square().sum(), (q, k, v))
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        pytest.skip(f"{backend} doesn't serve {kv_heads} of 4 heads here")
    expected = reference_attention(q.float(), k.float(), v.float(), LENGTHS)
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=4 * tolerance, atol=8 * tolerance)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_host_never_waits_for_a_training_step(
    compiled: bool,
    name: Literal["adamw", "muon"],
    speaking: Decoder,
    row: PackedBatch,
    device: str,
    request: pytest.FixtureRequest,
    no_wait: NoWait,
) -> None:
    """Forward, backward and the update of the trainer's own optimizer."""
    if device == "cpu":
        pytest.skip("needs a CUDA device")
    if compiled:
        request.getfixturevalue("without_hook")
    optimizer = build_optimizer(speaking, OptimizerConfig(name=name))
    if compiled:
        for block in speaking.blocks:
            block.compile()

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = speaking.loss(row) / len(row.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):  # compiles, and makes the optimizer's state
        step()
    with no_wait():
        step()


@pytest.mark.usefixtures("without_hook")
def test_a_compiled_step_is_the_eager_one(speaking: Decoder, row: PackedBatch, device: str) -> None:
    compiled = copy.deepcopy(speaking)
    for block in compiled.blocks:
        block.compile()
    losses = []
    for decoder in (speaking, compiled):
        loss = decoder.loss(row)
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for mine, theirs in zip(compiled.parameters(), speaking.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_step_in_float8_is_nearly_that_in_bfloat16(
    compiled: bool, speaking: Decoder, row: PackedBatch, device: str
) -> None:
    if not has_float8():
        pytest.skip("needs torchao and a GPU with float8 products")
    loss, gradient = gradients(speaking, row, device, bf16=True)
    use_float8(speaking, torch.device(device))
    if compiled:
        for block in speaking.blocks:
            block.compile()
    rounded_loss, rounded = gradients(speaking, row, device, bf16=True)
    assert rounded_loss == pytest.approx(loss, rel=0.03)
    assert torch.cosine_similarity(gradient, rounded, dim=0) > 0.97


def test_the_host_never_waits_for_a_decoding_step(speaking: Decoder, device: str, no_wait: NoWait) -> None:
    if device == "cpu":
        pytest.skip("needs a CUDA device")
    speaking.eval()
    prompts = pack_row(mixture(CONFIG, rows=1, budget=256, sides=(3, 6))[0]).to(device)
    cache = KeyValueCache(speaking, len(prompts.document_lengths), 300)
    tokens = torch.full((len(prompts.document_lengths),), 20, device=device)
    with torch.no_grad():
        prefill(speaking, prompts, cache)
        decode_step(speaking, tokens, cache)
        with no_wait():
            decode_step(speaking, tokens, cache)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_generation_writes_what_the_cpu_writes(
    compiled: bool, speaking: Decoder, device: str, request: pytest.FixtureRequest
) -> None:
    if compiled and device == "cpu":
        pytest.skip("tests/inference compiles on a CPU")
    if compiled:
        request.getfixturevalue("without_hook")
    with torch.no_grad():
        torch.nn.init.normal_(speaking.lm_head.weight, std=0.5)
    speaking.eval()
    prompts = mixture(CONFIG, rows=1, budget=256, sides=(3, 6))[0]
    write: Callable[..., list[list[int]]] = generate
    found = write(speaking, prompts, max_new_tokens=12, eos_id=-1, compiled=compiled)
    expected = write(speaking.cpu(), prompts, max_new_tokens=12, eos_id=-1)
    same = sum(mine == theirs for ours, cpus in zip(found, expected, strict=True)
               for mine, theirs in zip(ours, cpus, strict=True))  # fmt: skip
    assert same >= 0.9 * 12 * len(prompts), "rounding may part a text now and then, not most of them"
