"""How many processes and hosts a run has, where torchrun or SLURM started its processes."""

import os

from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment


def launched_processes() -> dict[str, int]:
    """Returns the trainer's `devices` and `num_nodes`, as the launcher that started this process counts them; else
    none.

    Lightning refuses any others, and under torchrun they change when a run goes on with the hosts that are left.
    """
    if TorchElasticEnvironment.detect():
        counts = {"devices": "LOCAL_WORLD_SIZE", "num_nodes": "GROUP_WORLD_SIZE"}
    elif SLURMEnvironment.detect():
        counts = {"devices": "SLURM_NTASKS_PER_NODE", "num_nodes": "SLURM_NNODES"}
    else:
        return {}
    return {setting: int(os.environ[name]) for setting, name in counts.items() if name in os.environ}
