"""What only a GPU can show of a run's state: updates, checkpoints, first weights, and the type that commands use."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_map

from fuyu_e2e.bench.documents import mixture
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.inference.cache import KeyValueCache
from fuyu_e2e.inference.device import autocast, product_type
from fuyu_e2e.inference.generation import prefill
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.training.checkpoint_io import BackgroundCheckpointIO, WholeCheckpointIO
from fuyu_e2e.training.module import FuyuModule
from fuyu_e2e.training.optimizers import MUON_BYTES, MuonAdamW, orthogonalize

NoWait = Callable[[], AbstractContextManager[None]]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]
CONFIG = FuyuConfig(
    vocab_size=512, patch_size=8, layers=3, width=128, heads=4, kv_heads=2, head_size=32, feed_forward=256
)
GROUPS: dict[str, dict[str, Any]] = {
    "adamw": {"kind": "adamw", "lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8},
    "muon": {"kind": "muon", "lr": 0.02, "momentum": 0.95, "weight_decay": 0.1},
}


def optimizer_of(kind: str, device: str, count: int = 4, shape: tuple[int, int] = (96, 64)) -> MuonAdamW:
    """An optimizer of matrices that are the same on every device."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for _ in range(count)]
    return MuonAdamW([{"params": weights, **GROUPS[kind]}])


def step(optimizer: MuonAdamW, number: int) -> None:
    """An update by gradients that are the same on every device."""
    generator = torch.Generator().manual_seed(number)
    for weight in optimizer.param_groups[0]["params"]:
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.device)
    optimizer.step()


@pytest.mark.parametrize("first", ["cpu", "gpu"])
@pytest.mark.parametrize("kind", GROUPS)
def test_updates_go_on_from_another_device(kind: str, first: str, device: str) -> None:
    """AdamW to 1e-5; Muon to the rounding of bfloat16, in which a GPU orthogonalizes: 0.4 % of an update of 0.02."""
    places = ("cpu", device) if first == "cpu" else (device, "cpu")
    alone, begun, going_on = (optimizer_of(kind, place) for place in ("cpu", *places))
    for number in range(6):
        step(alone, number)
        if number == 3:
            state = tree_map(lambda kept: kept.cpu() if isinstance(kept, Tensor) else kept, begun.state_dict())
            going_on.load_state_dict(state)
            for new, old in zip(going_on.param_groups[0]["params"], begun.param_groups[0]["params"], strict=True):
                new.data.copy_(old)
        step(begun if number < 3 else going_on, number)
    for found, expected in zip(going_on.param_groups[0]["params"], alone.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-5 if kind == "adamw" else 5e-3)
    kept = going_on.state[going_on.param_groups[0]["params"][0]]
    assert {tensor.device.type for tensor in kept.values()} == {torch.device(places[1]).type}


@pytest.mark.parametrize("kind", GROUPS)
def test_the_host_never_waits_for_an_update(kind: str, device: str, no_wait: NoWait) -> None:
    if device == "cpu":
        pytest.skip("needs a CUDA device")
    optimizer = optimizer_of(kind, device)
    step(optimizer, 0)  # makes the state
    with no_wait():
        optimizer.step()


@pytest.mark.parametrize("kind", GROUPS)
def test_a_bad_step_changes_no_bit_and_nobody_waits_to_hear_of_it(kind: str, device: str, no_wait: NoWait) -> None:
    optimizer = optimizer_of(kind, device)
    step(optimizer, 0)
    kept = [*optimizer.param_groups[0]["params"], *(t for state in optimizer.state.values() for t in state.values())]
    before = [tensor.detach().clone() for tensor in kept]
    optimizer.param_groups[0]["params"][1].grad[3, 2] = torch.nan
    optimizer.found_inf = torch.ones((), device=device)
    with no_wait():
        optimizer.step()
    assert all(map(torch.equal, kept, before))


def test_muon_takes_three_times_its_slice_of_memory(device: str) -> None:
    """768 MiB beside 4 GiB of matrices; cuBLAS may take 64 MiB more."""
    if device == "cpu":
        pytest.skip("needs a CUDA device")
    optimizer = optimizer_of("muon", device, count=64, shape=(4_096, 4_096))
    step(optimizer, 0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before <= 3 * MUON_BYTES + 2**26


def test_orthogonalized_matrices_are_those_of_float32(device: str) -> None:
    """Each of five iterations rounds to 2^-9 of a value; a product left out, or one too many, is off by far more."""
    torch.manual_seed(0)
    matrices = torch.randn(3, 256, 512)
    found, expected = orthogonalize(matrices.to(device)).float().cpu(), orthogonalize(matrices)
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999


class Held(WholeCheckpointIO):
    """Keeps what it is given to write."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.checkpoint = checkpoint


def test_what_waits_to_be_written_takes_no_memory_of_the_gpu(device: str, tmp_path: Path, no_wait: NoWait) -> None:
    """And is the state of the moment, though the next update is queued at once."""
    weight, writer = torch.ones(2**26, device=device), BackgroundCheckpointIO(Held())
    writer.save_checkpoint({"weight": weight}, tmp_path)  # makes room in pinned memory
    writer.teardown()
    if device == "cpu":
        writer.save_checkpoint({"weight": weight}, tmp_path)
        weight.zero_()
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with no_wait():
            writer.save_checkpoint({"weight": weight}, tmp_path)
            weight.zero_()
        assert torch.cuda.max_memory_allocated() == before
    writer.teardown()
    saved = writer.checkpoint_io.checkpoint["weight"]
    assert saved.device.type == "cpu"
    assert saved.is_pinned() == (device != "cpu")
    assert bool((saved == 1).all())


def test_a_part_of_a_sharded_weight_waits_in_the_memory_of_the_host(device: str, tmp_path: Path) -> None:
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole, writer = torch.randn(6, 4), BackgroundCheckpointIO(Held())
        weight = distribute_tensor(whole.to(device), init_device_mesh(device, (1,)), [Shard(0)])
        writer.save_checkpoint({"weight": weight}, tmp_path)
        writer.teardown()
        saved = writer.checkpoint_io.checkpoint["weight"]
        assert isinstance(saved, DTensor)
        assert (saved.to_local().device.type, saved.placements) == ("cpu", weight.placements)
        assert torch.equal(saved.to_local(), whole)
    finally:
        dist.destroy_process_group()


def test_a_seed_draws_the_weights_of_the_cpu(device: str) -> None:
    torch.manual_seed(0)
    expected = Decoder(CONFIG).state_dict()
    torch.manual_seed(0)
    module = FuyuModule(CONFIG)
    with SingleDeviceStrategy(torch.device(device)).tensor_init_context():
        module.configure_model()
    torch.testing.assert_close(module.decoder.state_dict(), expected, rtol=0, atol=0)


def test_commands_compute_in_bfloat16_where_there_is_that(device: str) -> None:
    """The states that prompts end in are those of float32 to 8 bits, and keys and values take half the memory."""
    place = torch.device(device)
    torch.manual_seed(0)
    decoder = Decoder(CONFIG).eval()
    with torch.no_grad():  # a new decoder's blocks say nothing
        for weight in decoder.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    decoder.to(device)
    prompts = pack_row(mixture(CONFIG, rows=1, budget=256, sides=(3, 6))[0]).to(device)
    states, caches = [], []
    with torch.no_grad():
        for enabled in (False, True):
            with autocast(place) if enabled else torch.autocast(device, enabled=False):
                count = len(prompts.document_lengths)
                cache = KeyValueCache(decoder, count, 300)
                states.append(prefill(decoder, prompts, cache).float())
                caches.append(cache)
    assert caches[1].dense[0].keys.dtype == product_type(place)
    assert caches[0].bytes == caches[1].bytes * (1 if device == "cpu" else 2)
    assert torch.cosine_similarity(*states, dim=-1).min() > 0.99
