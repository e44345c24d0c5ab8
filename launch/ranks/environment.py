"""Environment variables that a rank's libraries read at import, as values; applied once, before torch is imported."""

import ctypes
import os
from collections.abc import Mapping

from comm.config import ClusterConfig

HEAPS = "MALLOC_ARENA_MAX"
_M_ARENA_MAX = -8  # glibc, malloc.h


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
        # A heap for each thread leaves much of it unused: a rank's threads hand their tensors to each other.
        HEAPS: "1",
    }
    if cluster.backend == "gloo":
        # torch's own record of the last 2,000 operations, small blocks between tensors in one heap, breaks it up: a
        # rank grew as long as it ran. The watch has a log of its own.
        wanted["TORCH_FR_BUFFER_SIZE"] = "0"
    kept = {name: inherited.get(name, value) for name, value in wanted.items()}
    return {**kept, "OMP_NUM_THREADS": str(cluster.threads_per_rank)}


def apply_rank_environment(cluster: ClusterConfig) -> None:
    """Sets the variables of `rank_environment` in this process and those it starts."""
    os.environ.update(rank_environment(cluster, os.environ))
    # The C library has read its own when this process began.
    if os.environ[HEAPS].isdecimal():
        _limit_heaps(int(os.environ[HEAPS]))


def _limit_heaps(number: int) -> None:
    """Lets this process have so many heaps. Only glibc has more than one."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_ARENA_MAX, number)
