"""Environment variables that a rank's libraries read at import, as values; applied once, before torch is imported."""

import os
from collections.abc import Mapping

from comm.config import ClusterConfig
from train.heap import limit_heaps

HEAPS = "MALLOC_ARENA_MAX"


def rank_environment(cluster: ClusterConfig, inherited: Mapping[str, str]) -> dict[str, str]:
    """Variables to set for a process that will import torch.

    Threads follow the configuration; everything else yields to what the user has set.

    Args:
        cluster: the machines.
        inherited: variables that are already set.
    """
    wanted = {
        # Spinning threads of ranks that share cores cost several times the work itself.
        "OMP_WAIT_POLICY": "PASSIVE",
        # Unset, DeepSpeed looks for devices at import, and warns when it finds none.
        "DS_ACCELERATOR": cluster.device,
        # Asking the CUDA runtime for devices would spoil CUDA in processes forked later.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # Shared with the launcher, the store hands dead ranks' addresses to restarted ones (pytorch#135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # A heap for each thread leaves much memory unused: a rank's threads hand their tensors to each other.
        HEAPS: "1",
    }
    kept = {name: inherited.get(name, value) for name, value in wanted.items()}
    return {**kept, "OMP_NUM_THREADS": str(cluster.threads_per_rank)}


def apply_rank_environment(cluster: ClusterConfig) -> None:
    """Sets the variables of `rank_environment` in this process and those it starts."""
    os.environ.update(rank_environment(cluster, os.environ))
    # The C library has read its own when this process began.
    if os.environ[HEAPS].isdecimal():
        limit_heaps(int(os.environ[HEAPS]))
