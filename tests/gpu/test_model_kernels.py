"""What only a GPU can show of attention and compiled blocks: kernels against the definition, and graphs counted."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fuyu_e2e.bench.documents import mixture
from fuyu_e2e.bench.generate import random_prompts
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.errors import UserError
from fuyu_e2e.inference.generation import generate
from fuyu_e2e.model.attention.grouped import MaskedAttention
from fuyu_e2e.model.attention.interface import Places, RowAttention, reference_attention
from fuyu_e2e.model.attention.kernels import AttentionBackend, plan_attention
from fuyu_e2e.model.attention.mask import CAUSAL, AttentionMask
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.recomputation import ActivationCheckpointing
from fuyu_e2e.model.routing.block import gather_passing
from fuyu_e2e.model.routing.config import RoutingConfig
from fuyu_e2e.model.row import TrainingProgress

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]
LENGTHS = (7, 64, 130, 1, 300, 64, 9)
BACKENDS = ["documents", "varlen", "flash", "flex"]
HEADS = [(4, 4), (4, 2), (6, 1)]
IMAGES = ((10, 40), (75, 115), (210, 260))
MASKS = [
    CAUSAL,
    AttentionMask(window=50),
    AttentionMask(window=50, sinks=3),
    AttentionMask(window=50, images="bidirectional"),
]


def planned(backend: AttentionBackend, device: str, mask: AttentionMask) -> RowAttention:
    """That backend's attention of `LENGTHS` and `IMAGES` in bfloat16; skips what this machine has not."""
    if device == "cpu" and backend != "documents":
        pytest.skip("needs a CUDA device")
    try:
        return plan_attention(
            LENGTHS, torch.device(device), torch.bfloat16, backend, head_size=64, mask=mask, images=IMAGES
        )
    except UserError as error:
        if "flash_attn" not in str(error):
            raise
        pytest.skip("needs the flash_attn package")


def draw(heads: tuple[int, int], device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), count, 64) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator).to(device).bfloat16().requires_grad_() for shape in shapes]


def assert_same(found: Tensor, expected: Tensor, inputs: list[Tensor], wide: list[Tensor]) -> None:
    """Forward and backward; bfloat16 rounds by 2^-9, sums of a few hundred gradients by more."""
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad((found.float() * direction).sum(), inputs)
    wanted = torch.autograd.grad((expected * direction).sum(), wide)
    torch.testing.assert_close(found.float(), expected, atol=3e-2, rtol=3e-2)
    for gradient, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.float(), right, atol=1e-1, rtol=5e-2)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_the_reference(
    backend: AttentionBackend, mask: AttentionMask, heads: tuple[int, int], device: str
) -> None:
    plan, inputs = planned(backend, device, mask), draw(heads, device)
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = reference_attention(*wide, LENGTHS, mask=mask, images=IMAGES)
    assert_same(plan(*inputs), expected, inputs, wide)


@pytest.mark.parametrize("skipped", ["nothing", "keys"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_the_reference_of_passing_tokens(
    backend: AttentionBackend, mask: AttentionMask, heads: tuple[int, int], skipped: str, device: str
) -> None:
    """Those that pass a routed block, among themselves or asking all; the last only fill its capacity."""
    plan, inputs = planned(backend, device, mask), draw(heads, device)
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    passes = (torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(1)) < 0.4).to(device)
    passing = gather_passing(passes, int(passes.sum()) + 5)
    queries, keys, values = inputs
    if skipped == "nothing":
        # Not the reference of `known` keys: the rest's outputs are no numbers, and so would be all gradients.
        own = Places.of(LENGTHS, IMAGES).on(passes.device).take(passes)
        expected = MaskedAttention.of(mask, own, own)(*(tensor[passes] for tensor in wide))
        found = plan.select(passing)(*(tensor[passing.index] for tensor in inputs))
    else:
        expected = reference_attention(*wide, LENGTHS, mask=mask, images=IMAGES)[passes]
        found = plan.cross(passing)(queries[passing.index], keys, values)
    assert_same(found[passing.valid], expected, inputs, wide)


def decoder_and_rows(routing: RoutingConfig | None, device: str) -> tuple[Decoder, list[PackedBatch]]:
    config = FuyuConfig(
        vocab_size=512,
        patch_size=8,
        layers=6,
        width=128,
        heads=4,
        kv_heads=2,
        head_size=32,
        feed_forward=256,
        routing=routing,
    )
    torch.manual_seed(0)
    decoder = Decoder(config)
    for block in decoder.blocks:
        torch.nn.init.normal_(block.attention.o_proj.weight, std=0.05)
    rows = [
        pack_row(documents, 1_024).to(device)
        for sides in ((2, 4), (2, 12), (12, 20))
        for documents in mixture(config, rows=2, budget=1_024, sides=sides)
    ]
    return decoder.to(device), rows


@contextmanager
def in_bfloat16(device: str, training: bool) -> Iterator[None]:
    with torch.autocast(device, torch.bfloat16), torch.set_grad_enabled(training):
        yield


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("skipped", ["dense", "nothing", "keys"])
def test_rows_generation_and_validation_add_no_graphs(skipped: str, backend: AttentionBackend, device: str) -> None:
    """The first pass over rows and a validation make them all."""
    planned(backend, device)
    routing = None if skipped == "dense" else RoutingConfig(blocks=(1, 3, 4), share=0.3, skipped=skipped, anneal=0.9)
    torch._dynamo.reset()
    decoder, rows = decoder_and_rows(routing, device)
    decoder.attention = backend
    for block in decoder.blocks:
        block.compile(backend="aot_eager")

    def graphs_of(training: bool) -> int:
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        decoder.train(training)
        for step, row in enumerate(rows):
            decoder.progress = TrainingProgress(step, step / len(rows))
            with in_bfloat16(device, training):
                loss = decoder.loss(row)
            if training:
                loss.backward()
        return torch._dynamo.utils.counters["stats"]["unique_graphs"] - before

    made = [graphs_of(True), graphs_of(False)]
    assert all(made)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    decoder.eval()
    generate(decoder, random_prompts(decoder.config, 3), max_new_tokens=12, eos_id=-1)
    if backend != "flex":  # whose own graphs for what passes are of all sizes
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
        assert [graphs_of(True), graphs_of(False)] == [0, 0]


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", ["varlen", "flash"])
def test_selective_recomputation_keeps_attention(backend: AttentionBackend, compiled: bool, device: str) -> None:
    """Counted by the kernels that a step runs: attention's forward once a block, or twice where all is recomputed."""
    planned(backend, device)
    torch._dynamo.reset()
    decoder, rows = decoder_and_rows(None, device)
    decoder.attention = backend
    if compiled:
        for block in decoder.blocks:
            block.compile()

    def forward_kernels(kind: ActivationCheckpointing) -> int:
        decoder.recompute(kind)
        decoder.train()

        def step() -> None:
            with in_bfloat16(device, True):
                loss = decoder.loss(rows[0])
            loss.backward()

        step()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            step()
            torch.cuda.synchronize()
        names: Counter[str] = Counter()
        events: list[Any] = list(profiled.events())
        for event in events:
            if event.device_type.name == "CUDA":
                names[event.name] += 1
        return sum(count for name, count in names.items() if "flash" in name.lower() and "fwd" in name.lower())

    assert {kind: forward_kernels(kind) for kind in ("none", "selective", "full")} == {
        "none": 6,
        "selective": 6,
        "full": 12,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_attention_goes_through_all_scores(dtype: torch.dtype, device: str) -> None:
    """Of grouped queries, by documents and under a mask: each by a kernel, none by torch's composite of products."""
    if device == "cpu":
        pytest.skip("needs a CUDA device")
    inputs = [tensor.detach().to(dtype) for tensor in draw((4, 2), device)]
    plan = plan_attention(LENGTHS, torch.device(device), dtype, "documents", head_size=64)
    passing = gather_passing(torch.ones(sum(LENGTHS), dtype=torch.bool, device=device), sum(LENGTHS))
    cross = plan.cross(passing)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        plan(*inputs)
        cross(*inputs)
    names = {event.name for event in profiled.events()}
    assert not [name for name in names if "_scaled_dot_product_attention_math" in name or "cudnn" in name.lower()]
    assert [name for name in names if "efficient_attention" in name or "flash_attention" in name]
