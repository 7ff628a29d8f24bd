"""How a decoder is laid over many devices: what tensor parallelism splits, and what FSDP2 shards around it.

Tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053, section 3) splits each block between its two products:

    q, k, v, gate, up   by their outputs: each device has some of the heads and of the feed-forward's values
    o, down             by their inputs: their outputs are summed over the devices
    norms of q and k    whole on each device, applied to its heads; their gradients are summed
    other norms, rules that select tokens, biases of o and down
                        whole on each device, and given the same states there

Embedding and output projection are split by the vocabulary, the connector as it says (Fuyu's by its outputs); what
stands behind it is whole on each device.

FSDP2 (torch's `fully_shard`) then spreads every weight over the devices that see other data, and gathers a block's
when it is its turn. What blocks count in training (`Block.counts`) is in buffers, which stay whole and of their
device.
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
"""The dimensions of the mesh: whole copies, the shards of a copy, and the parts of each product."""


def shard(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Lays the weights of `decoder`, which are the same on all devices, over a mesh of the dimensions `MESH`.

    Raises:
        UserError: Heads can't be shared out evenly.
    """
    if mesh[TENSOR].size() > 1:
        _split(decoder, mesh[TENSOR])
    data = mesh[REPLICAS, SHARDS] if mesh[REPLICAS].size() > 1 else mesh[SHARDS]
    for block in decoder.blocks:
        fully_shard(block, mesh=data)
    fully_shard(decoder, mesh=data)
    register_fsdp_forward_method(decoder, "loss_and_z")


@torch.no_grad()
def copy_part(whole: Tensor, tensor: Tensor) -> None:
    """Gives `tensor`, whole or laid over devices, the values of `whole`, which all of them have."""
    if isinstance(tensor, DTensor):
        whole = distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(whole)


def gather_weights(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers as wholes, one at a time, by their names; all devices go through them together."""
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
        decoder.lm_head.weight = decoder.embed_tokens.weight  # splitting each parted them


def _check_heads(config: FuyuConfig, parts: int) -> None:
    for name in ("heads", "kv_heads"):
        if (heads := getattr(config, name)) % parts:
            raise UserError(
                f"The decoder has {heads} {name}, which {parts} tensor parallel devices can't share out evenly: "
                "choose a number of devices that divides it."
            )
