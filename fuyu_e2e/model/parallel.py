"""The layout of a decoder over many devices: what tensor parallelism splits, and what FSDP2 shards around it.

Tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053, section 3) splits each block between its two products:

    q, k, v, gate, up   by output: each device has some of the heads and of the feed-forward's values
    o, down             by input: their outputs are summed over the devices
    norms of q and k    whole on each device, applied to its heads; their gradients are summed
    other norms, routing rules, biases of o and down
                        whole on each device, where they read the same states

    Embedding and output projection are split by the vocabulary, the connector as it says (Fuyu's by output); whatever
    follows it is whole on each device.

    FSDP2 (torch's `fully_shard`) then spreads every weight over the devices that see different data, and gathers the
    weights of one block at a time. The counts of blocks (`Block.counts`) are buffers, which stay whole and local.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from fuyu_e2e.errors import UserError
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder

REPLICAS, SHARDS, TENSOR = MESH = ("replicas", "shards", "tensor")
"""The dimensions of the mesh: whole replicas, the shards of a replica, and the parts of each product."""


def shard(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Lays the weights of `decoder`, equal on all devices, over a mesh with the dimensions `MESH`.

    Raises:
        UserError: The heads can't be split evenly.
    """
    if mesh[TENSOR].size() > 1:
        _split(decoder, mesh[TENSOR])
    data = mesh[REPLICAS, SHARDS] if mesh[REPLICAS].size() > 1 else mesh[SHARDS]
    for block in decoder.blocks:
        fully_shard(block, mesh=data)
    fully_shard(decoder, mesh=data)
    for name in ("loss_and_z", "score_tokens"):
        register_fsdp_forward_method(decoder, name)


@torch.no_grad()
def copy_part(whole: Tensor, tensor: Tensor) -> None:
    """Copies `whole`, which all devices have, into `tensor`, which may be distributed over them."""
    if isinstance(tensor, DTensor):
        whole = distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(whole)


def gather_weights(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Yields weights and buffers whole, one at a time, by name; a collective that all devices must go through."""
    for name, tensor in decoder.state_dict().items():
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _split(decoder: Decoder, mesh: DeviceMesh) -> None:
    _check_heads(decoder.config, mesh.size())
    plan: dict[str, ParallelStyle] = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for name, style in decoder.patch_projection.sharding().items():
        plan[f"patch_projection.{name}".rstrip(".")] = style
    for layer, block in enumerate(decoder.each_block()):
        plan |= {f"blocks.{layer}.{name}": style for name, style in block.sharding().items()}
    parallelize_module(decoder, mesh, plan)
    if decoder.config.tie_embeddings:
        decoder.lm_head.weight = decoder.embed_tokens.weight  # splitting them broke the tie


def _check_heads(config: FuyuConfig, parts: int) -> None:
    for name in ("heads", "kv_heads"):
        if (heads := getattr(config, name)) % parts:
            raise UserError(
                f"The decoder has {heads} {name}, which {parts} tensor parallel devices can't share out evenly: "
                "choose a number of devices that divides it."
            )
