"""The number of processes and hosts of a run that torchrun or SLURM started."""

import os

from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment


def launched_processes() -> dict[str, int]:
    """Returns the trainer's `devices` and `num_nodes` according to the launcher of this process; empty without one.

    Lightning refuses any others, and under torchrun they change when a run continues with the remaining hosts.
    """
    if TorchElasticEnvironment.detect():
        counts = {"devices": "LOCAL_WORLD_SIZE", "num_nodes": "GROUP_WORLD_SIZE"}
    elif SLURMEnvironment.detect():
        counts = {"devices": "SLURM_NTASKS_PER_NODE", "num_nodes": "SLURM_NNODES"}
    else:
        return {}
    return {setting: int(os.environ[name]) for setting, name in counts.items() if name in os.environ}
