"""Environment variables for a rank's libraries, which must be set before torch is imported."""

import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from comm.config import ClusterConfig, ParallelismConfig
from comm.watchdog.membership import STORE_FILE_VARIABLE
from train.config.errors import ConfigError

HEAPS = "MALLOC_ARENA_MAX"
# Bytes from which an allocation gets its own pages, and free bytes at the heap's end from which pages are returned.
OWN_PAGES = "MALLOC_MMAP_THRESHOLD_"
RETURNED = "MALLOC_TRIM_THRESHOLD_"
_OPTIONS = {HEAPS: -8, OWN_PAGES: -3, RETURNED: -1}  # glibc, malloc.h


def rank_environment(cluster: ClusterConfig, inherited: Mapping[str, str]) -> dict[str, str]:
    """Returns variables for a process that will import torch. Those that the user has set are kept."""
    wanted = {
        # Spinning threads cost several times the work itself if ranks share cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        # If this is unset, DeepSpeed searches for devices at import and warns if it finds none.
        "DS_ACCELERATOR": cluster.device,
        # Querying devices through the CUDA runtime would break CUDA in processes that are forked later.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # A store shared with the launcher returns addresses of dead ranks to restarted ranks (pytorch#135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # One heap: with a heap per thread, memory stays unused, because threads free tensors that others allocated.
        HEAPS: "1",
    }
    if cluster.device == "cpu":
        # glibc would return the pages of each pass's tensors, and the next pass would fault them in again: 10,000 page
        # faults and 15 % of the CPU time in a step of `arithmetic_sft`. 32 MiB is where glibc's own adaptation ends.
        wanted |= {OWN_PAGES: str(32 * 2**20), RETURNED: str(128 * 2**20)}
    if cluster.backend == "gloo":
        # torch's flight recorder allocates small blocks between tensors, which fragments the heap, so that a rank's
        # memory grows without bound. The watchdog keeps its own log of collectives.
        wanted["TORCH_FR_BUFFER_SIZE"] = "0"
    kept = {name: inherited.get(name, value) for name, value in wanted.items()}
    return {**kept, "OMP_NUM_THREADS": str(cluster.threads_per_rank)}


def local_rank_environment(store_file: Path) -> dict[str, str]:
    """Returns the variables of a rank whose job runs on this machine alone, over the loopback interface."""
    interface = "lo0" if sys.platform == "darwin" else "lo"
    return {
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
        STORE_FILE_VARIABLE: str(store_file),
    }


def apply_rank_environment(cluster: ClusterConfig) -> None:
    """Sets the variables of `rank_environment` in this process and its future child processes."""
    os.environ.update(rank_environment(cluster, os.environ))
    # glibc read its variables when this process started, so they must also be set by calls.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    for name, option in _OPTIONS.items():
        if mallopt is not None and os.environ.get(name, "").isdecimal():
            mallopt(option, int(os.environ[name]))


def is_torchrun(environment: Mapping[str, str]) -> bool:
    """Returns whether torchrun or another elastic launcher started this process as a rank."""
    return "RANK" in environment and "TORCHELASTIC_RUN_ID" in environment


def check_world_size(parallelism: ParallelismConfig, environment: Mapping[str, str]) -> None:
    """Rejects a number of ranks other than the one that torchrun started."""
    world = parallelism.world_size
    started = int(environment["WORLD_SIZE"])
    if world != started:
        raise ConfigError(
            f"parallelism: {parallelism.axes('=')} makes {world} ranks, but torchrun started "
            f"WORLD_SIZE={started}; start {world} ranks, or change parallelism"
        )


def is_other_rank(environment: Mapping[str, str]) -> bool:
    """Returns whether this is a torchrun rank other than rank 0, which prints for all ranks."""
    return is_torchrun(environment) and environment["RANK"] != "0"
