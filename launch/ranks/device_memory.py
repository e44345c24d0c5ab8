"""Checks a run against the memory of this machine's GPUs, without torch or a CUDA context."""

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Literal

from launch.config.memory_rules import check_memory
from launch.config.rules import check_rules
from train.config import TrainConfig
from train.config.errors import ConfigError
from train.memory import fitted_config, predict_memory

_LIBRARIES = ("libnvidia-ml.so.1", "nvml.dll")
_GB = 1e9


class _Memory(ctypes.Structure):
    """Memory of a device as NVML returns it, in bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def device_memory_bytes(
    libraries: Sequence[str] = _LIBRARIES, kind: Literal["total", "free"] = "total"
) -> tuple[int, ...]:
    """Returns all or the free memory of every GPU; empty if NVIDIA's driver does not say it."""
    for name in libraries:
        with suppress(OSError, AttributeError):
            return tuple(getattr(memory, kind) for memory in _device_memories(ctypes.CDLL(name)))
    return ()


def _device_memories(nvml: ctypes.CDLL) -> list[_Memory]:
    if nvml.nvmlInit_v2() != 0:
        return []
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return []
        memories = [_device_memory(nvml, index) for index in range(count.value)]
        return [memory for memory in memories if memory.total]
    finally:
        nvml.nvmlShutdown()


def _device_memory(nvml: ctypes.CDLL, index: int) -> _Memory:
    device, memory = ctypes.c_void_p(), _Memory()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)) != 0:
        return _Memory()
    return memory if nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) == 0 else _Memory()


def check_device_memory(config: TrainConfig, num_local_ranks: int) -> None:
    """Rejects a run that cannot fit the GPUs of this machine, which its ranks share equally.

    Does nothing if `cluster.memory_bytes` says their memory, which `check_memory` checks on any machine. The largest
    GPU counts, because other ones may be hidden from the run. `plan.check=false` skips the check.
    """
    cluster = config.cluster
    if cluster.device != "cuda" or cluster.memory_bytes is not None or not config.plan.check:
        return
    devices = device_memory_bytes()
    if not devices:
        return
    room = max(devices) // -(-num_local_ranks // len(devices))
    worst = predict_memory(fitted_config(config)).worst
    if worst.total <= room:
        return
    check_memory(replace(config, cluster=replace(cluster, memory_bytes=room)), check_rules)
    raise ConfigError(
        f"memory: rank {worst.pipeline_rank} needs {worst.total / _GB:.1f} GB of {room / _GB:.1f} with this cut; "
        f"nearest: cluster.memory_bytes={room}, which chooses a cut that fits"
    )
