"""Sharded training: FSDP2, tensor parallelism, and both, by Lightning's ModelParallelStrategy.

    --trainer.strategy fsdp2            every weight sharded over all processes
    --trainer.strategy hsdp             sharded over the processes of a host, with a replica on each host
    --trainer.strategy tensor_parallel  products split over the processes of a host, FSDP2 over the hosts
    --trainer.strategy ddp              Lightning's own: a replica in each process

`fuyu_e2e.model.parallel` plans what is split and how. Other combinations name the class:

    trainer:
      strategy:
        class_path: fuyu_e2e.training.strategies.Sharded
        init_args: {tensor_parallel: 2, replicas: 4}
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from fuyu_e2e.checkpoint.atomic import is_sharded
from fuyu_e2e.checkpoint.lightning_io import read_checkpoint
from fuyu_e2e.checkpoint.metadata import ModelMetadata
from fuyu_e2e.checkpoint.sharded_files import OPTIMIZER, WEIGHTS, ShardedFiles
from fuyu_e2e.errors import UserError
from fuyu_e2e.model.parallel import MESH, copy_part
from fuyu_e2e.training.checkpoint_io import BackgroundCheckpointIO, ShardedCheckpointIO, resolve
from fuyu_e2e.training.gradients import weights_of
from fuyu_e2e.training.settings.arguments import did_you_mean

REFUSED = ("fsdp", "deepspeed", "ddp_spawn", "ddp_fork", "ddp_notebook")
"""Prefixes of strategies that hide the weights from our optimizer, clipping and checkpoints, or whose processes leave
checkpoints and exit codes to one that doesn't train."""


def check_strategy(named: Any) -> None:
    """Refuses a recipe's `trainer.strategy` if it is unknown or doesn't work here.

    Raises:
        UserError: The strategy is refused; names those that work.
    """
    by_name = isinstance(named, str | None)
    name = str(named if by_name else named.get("class_path", "")).rpartition(".")[2].lower()
    method = "popen" if by_name else named.get("init_args", {}).get("start_method", "popen")
    if (name.startswith(REFUSED) and name != "fsdp2") or method != "popen":
        how = "" if method == "popen" else f" with start_method {method}"
        raise UserError(f"trainer.strategy {name}{how} doesn't work here: say ddp, fsdp2, hsdp or tensor_parallel.")
    known = {"auto", *StrategyRegistry.available_strategies()}
    if isinstance(named, str) and "." not in named and named not in known:
        hint = did_you_mean(named, known) or "say ddp, fsdp2, hsdp or tensor_parallel."
        raise UserError(f"trainer.strategy is {named}, which is unknown: {hint}")


class Sharded(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy, with replicas, and with checkpoints that any number of processes can resume.

    Args:
        tensor_parallel: Processes of neighbouring ranks that share the work on the same rows. `host` groups those of
            a host.
        replicas: Whole copies of the weights, which exchange only gradients. `hosts` makes one for each host.
        process_group_backend: As in ModelParallelStrategy.
        timeout: As in ModelParallelStrategy.

    Raises:
        UserError: The number of processes is not a multiple of `tensor_parallel` times `replicas`.
    """

    def __init__(
        self,
        tensor_parallel: int | Literal["host"] = 1,
        replicas: int | Literal["hosts"] = 1,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self._tensor_parallel = tensor_parallel
        self._replicas = replicas

    @property
    def tensor_parallel_size(self) -> int:
        """The number of processes that read the same rows."""
        return self.num_processes if self._tensor_parallel == "host" else self._tensor_parallel

    def setup_environment(self) -> None:
        """Joins the other processes and creates the device mesh."""
        self._setup_distributed()
        tensor = self.tensor_parallel_size
        replicas = self.num_nodes if self._replicas == "hosts" else self._replicas
        if tensor < 1 or replicas < 1 or self.world_size % (tensor * replicas):
            raise UserError(
                f"{self.world_size} processes can't be {replicas} replicas of tensor_parallel {tensor} groups each: "
                "choose numbers whose product divides the number of processes."
            )
        shape = (replicas, self.world_size // (tensor * replicas), tensor)
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=MESH)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def setup(self, trainer: pl.Trainer) -> None:
        """Sets up checkpoints that all processes write together, each its own parts."""
        super().setup(trainer)
        # A separate group, since it works in parallel to the training's collectives, and on CPU tensors.
        self.checkpoint_io = BackgroundCheckpointIO(ShardedCheckpointIO(dist.new_group(backend="gloo")))

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which rows this process reads; the processes of a tensor-parallel group read the same."""
        replica, part, _ = self.device_mesh.get_coordinate() or (0, 0, 0)
        replicas, parts, _ = self.device_mesh.shape
        return {"num_replicas": replicas * parts, "rank": replica * parts + part}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the optimizer's state and settings, with weights by name instead of number."""
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        names = self._names()
        return {
            "state": {names[weight]: dict(kept) for weight, kept in optimizer.state.items()},
            "param_groups": [
                group | {"params": [names[weight] for weight in group["params"]]} for group in optimizer.param_groups
            ],
        }

    def _names(self) -> dict[Tensor, str]:
        assert self.lightning_module is not None
        return {weight: name for name, weight in self.lightning_module.named_parameters()}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint, to which every process contributes its parts."""
        self.checkpoint_io.save_checkpoint(checkpoint, self.broadcast(filepath), storage_options=storage_options)

    def teardown(self) -> None:
        """Waits until all queued checkpoints are written, as other strategies do; Lightning's own doesn't."""
        super().teardown()
        self.checkpoint_io.teardown()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads this process's parts of weights and optimizer from a checkpoint of any strategy; returns the rest.

        Raises:
            UserError: It is not a checkpoint of this model, is damaged, or lacks a readable optimizer state.
        """
        self.checkpoint_io.teardown()  # waits for queued writes
        path = resolve(Path(self.broadcast(checkpoint_path)))
        if is_sharded(path):
            shards = ShardedFiles(path)
            rest = shards.read_rest()
            self._check(rest, path)
            self._fill_from_shards(shards, rest)
        else:
            rest = read_checkpoint(path, checked=True)
            self._check(rest, path)
            self._fill_from_whole(rest)
        assert self.lightning_module is not None
        return rest | {"state_dict": self.lightning_module.state_dict()}

    def _check(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Refuses another model's checkpoint before its weights are loaded."""
        metadata: ModelMetadata = self.lightning_module.metadata  # type: ignore[union-attr, assignment]
        metadata.check_same(ModelMetadata.of(checkpoint, str(path)), str(path))

    def _fill_from_shards(self, shards: ShardedFiles, rest: dict[str, Any]) -> None:
        assert self.lightning_module is not None
        shards.read_into({f"{WEIGHTS}{name}": tensor for name, tensor in self.lightning_module.state_dict().items()})
        for optimizer in self.optimizers:
            shards.optimizer_groups(rest)  # raises if the state can't be read; its settings are not used
            wanted, names = {}, self._names()
            for weight in weights_of(optimizer):
                prefix = f"{OPTIMIZER}{names[weight]}."
                for entry, stored in shards.tensors.items():
                    if entry.startswith(prefix):
                        kept = _like(weight, stored.size, stored.properties.dtype)
                        optimizer.state[weight][entry.removeprefix(prefix)] = wanted[entry] = kept
            shards.read_into(wanted)

    def _fill_from_whole(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.lightning_module is not None
        for name, tensor in self.lightning_module.state_dict().items():
            copy_part(checkpoint["state_dict"][name], tensor)
        for optimizer, stored in zip(self.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            weights = weights_of(optimizer)
            for number, kept in stored["state"].items():
                for name, whole in kept.items():
                    own = _like(weights[number], whole.shape, whole.dtype)
                    copy_part(whole, own)
                    optimizer.state[weights[number]][name] = own


def _like(weight: Tensor, size: torch.Size, dtype: torch.dtype | None) -> Tensor:
    """Returns an empty tensor for optimizer state: distributed as the weight, or a scalar on the host."""
    return torch.empty_like(weight, dtype=dtype) if size == weight.shape else torch.empty(size, dtype=dtype)


StrategyRegistry.register("fsdp2", Sharded)
StrategyRegistry.register("hsdp", Sharded, replicas="hosts")
StrategyRegistry.register("tensor_parallel", Sharded, tensor_parallel="host")
