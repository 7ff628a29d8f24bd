"""Norms and scaling are torch's own on whole tensors, and work where torch's crash: on shards of several meshes."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fuyu_e2e.training.gradients import scale_gradients, squared_norm_part


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.zeros(shape)) for shape in ((4, 6), (6,), (3, 2), (5,))]
    for weight in made[:3]:
        weight.grad = torch.randn(weight.shape, generator=generator)
    return made


def gradient_norm(weights: list[nn.Parameter], processes: int = 1) -> torch.Tensor:
    return squared_norm_part(weights, processes).sqrt().float()


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_norm_is_torchs_bit_for_bit() -> None:
    """A run's weights must not depend on which of the two took it."""
    assert torch.equal(gradient_norm(weights()), nn.utils.clip_grad_norm_(weights(), 1.0))
    assert gradient_norm([nn.Parameter(torch.zeros(3))]) == 0


def test_parts_of_copies_add_up_to_the_whole() -> None:
    torch.testing.assert_close(4 * squared_norm_part(weights(), 4), squared_norm_part(weights(), 1))


def test_shards_on_several_meshes_count_as_whole_tensors(process_group: None) -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    sharded = weights()
    for weight, on in zip(sharded[:2], (mesh["data"], mesh["tensor"]), strict=True):
        gradient = weight.grad
        assert gradient is not None
        weight.data = distribute_tensor(weight.data, on, [Shard(0)])
        weight.grad = distribute_tensor(gradient, on, [Shard(0)])
    norm = gradient_norm(sharded)
    torch.testing.assert_close(norm, gradient_norm(weights()))
    scale_gradients(sharded, 1 / norm)
    torch.testing.assert_close(gradient_norm(sharded), torch.tensor(1.0))
    assert isinstance(sharded[0].grad, DTensor)
