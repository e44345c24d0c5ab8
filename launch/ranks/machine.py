"""Checks whether a machine can run ranks, and sets the environment of their libraries.

Imports no torch at its top. The cheap checks come first and do not initialize CUDA. Before the ranks of a Slurm job
start, each node runs `python -m launch.ranks.machine`.
"""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401


import ctypes
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from base.refusal import ConfigError
from comm.config import LINK_CTAS, ClusterConfig, ParallelismConfig
from comm.dispatch.deepep.package import DeepEPError, check_available
from comm.watchdog.membership import STORE_FILE_VARIABLE
from kernels.attention import ATTENTION, AUTO, DETERMINISTIC
from launch.config.memory import check_memory
from launch.config.rules import check_rules
from score.reward import check_reward, host_parts
from train.config import TrackConfig, TrainConfig
from train.files.run_end import words_of
from train.predict.fit import fitted_config
from train.predict.memory import predict_memory
from train.records.trackers import split_address

_DRIVERS = ("libcuda.so.1", "nvcuda.dll")
_NO_GPU = "nearest valid: cluster=laptop, or config_only=true to check the configuration alone"


class MachineError(ConfigError):
    """This machine cannot run the ranks of a valid configuration. Each node reports its own error."""


def has_driver(libraries: Sequence[str] = _DRIVERS) -> bool:
    """Returns whether NVIDIA's driver is installed."""
    for library in libraries:
        with suppress(OSError):
            ctypes.CDLL(library)
            return True
    return False


def torch_has_cuda() -> bool:
    """Returns whether the installed torch was built with CUDA, from its version file."""
    spec = find_spec("torch")
    places = spec.submodule_search_locations if spec is not None else None
    for folder in places or ():
        text = (Path(folder) / "version.py").read_text(encoding="utf-8")
        return re.search(r"^cuda\b[^=]*=\s*['\"]", text, re.MULTILINE) is not None
    return False


def check_driver(device: str, key: str, advice: str = _NO_GPU) -> None:
    """Rejects the device cuda without a driver, or with a torch without CUDA, in milliseconds."""
    if device != "cuda":
        return
    if not has_driver():
        raise MachineError(f"{key}: cuda needs a GPU and NVIDIA's driver, this machine has none, is cuda; {advice}")
    if not torch_has_cuda():
        raise MachineError(
            f"{key}: cuda needs a torch that was built with CUDA, torch {version('torch')} was not, is cuda; {advice}"
        )


def check_gpus(config: TrainConfig, num_local_ranks: int) -> None:
    """Rejects a machine with too few visible GPUs for its ranks, or a torch without NCCL. Imports torch."""
    cluster = config.cluster
    if cluster.device != "cuda":
        return
    import torch

    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    num_gpus = torch.cuda.device_count()
    visibility = "this machine has" if seen is None else f"CUDA_VISIBLE_DEVICES={seen} shows"
    if num_gpus == 0:
        raise MachineError(f"cluster.device: cuda needs a GPU, {visibility} none, is cuda; {_NO_GPU}")
    if cluster.backend != "nccl":
        return
    if num_local_ranks > num_gpus:
        raise MachineError(
            f"cluster.backend: nccl needs a GPU for each of the {num_local_ranks} ranks of this machine "
            f"(parallelism.{config.parallelism.axes('=')} in all), "
            f"{visibility} {num_gpus}, is nccl; nearest valid: {num_gpus} ranks, cluster=one_gpu, "
            "or torchrun on several machines"
        )
    if not torch.distributed.is_nccl_available():
        raise MachineError(
            f"cluster.backend: nccl must be part of torch, torch {torch.__version__} on {sys.platform} has none, "
            f"is nccl; nearest valid: cluster.backend=gloo"
        )


CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
MODULE_LOADING = "CUDA_MODULE_LOADING"
EAGER = "EAGER"
_SPINS = "because a receive that waits for its peer occupies the device and CUDA would wait for it"
_FEW_SMS = (
    f"[0-{LINK_CTAS}]",
    f"at most {LINK_CTAS}, the SMs of a pipeline link, because it replaces the limits that the groups configure",
    "unset it; cluster.communication_sms limits dispatch and combine",
)
# Values that are safe on NCCL (docs/nccl.md), the rule, and the nearest valid value. Each of the last five sets the SMs
# of every communicator. NCCL's other limits can only lower what the groups configure.
_SAFE_VALUES = {
    CONNECTIONS: (
        "[1-9][0-9]+|[2-9]",
        "above 1 with schedule.pairing=overlapped, because kernels of a queue run in turn and a receive would block "
        "the message that it waits for",
        "32, or unset it",
    ),
    MODULE_LOADING: (EAGER, f"{EAGER}, {_SPINS} at the first launch of a kernel", f"{EAGER}, or unset it"),
    "CUDA_LAUNCH_BLOCKING": ("0", f"0, {_SPINS} at each launch", "unset it"),
    "NCCL_LAUNCH_ORDER_IMPLICIT": (
        "0",
        "0, because three threads of a rank launch collectives, in an order that differs between ranks",
        "unset it",
    ),
    "NCCL_MIN_CTAS": _FEW_SMS,
    "NCCL_MAX_CTAS": _FEW_SMS,
    "NCCL_MIN_NCHANNELS": _FEW_SMS,
    "NCCL_MIN_P2P_NCHANNELS": _FEW_SMS,
    "NCCL_MIN_NRINGS": _FEW_SMS,
}


def check_environment(config: TrainConfig, environment: Mapping[str, str]) -> None:
    """Rejects variables with which ranks on NCCL can wait for each other. Needs no GPU."""
    if config.cluster.backend != "nccl" or config.parallelism.world_size == 1:
        return
    for name, (safe, rule, nearest) in _SAFE_VALUES.items():
        is_free = name == CONNECTIONS and config.schedule.pairing == "sequential"
        value = environment.get(name, "").strip()
        if value and not is_free and not re.fullmatch(safe, value):
            raise MachineError(f"{name}: must be {rule}, is {value}; nearest valid: {nearest}")


def check_packages(config: TrainConfig) -> None:
    """Rejects a kernel or dispatcher without its package, and a tracker without a login."""
    if not is_other_rank(os.environ):
        _check_trackers(config.track)
    if config.dispatch.kind == "deepep":
        try:
            check_available()
        except DeepEPError as error:
            raise MachineError(str(error)) from error
    name = config.attention
    device = config.cluster.device
    if name == DETERMINISTIC:
        if not any(kernel.is_installed and kernel.is_deterministic(device) for _, kernel in ATTENTION.items()):
            raise MachineError(
                f"attention: {name} needs a package of FlashAttention (docs/memory.md), none is installed, is {name}; "
                "nearest valid: attention=auto"
            )
    elif name != AUTO and not ATTENTION.get(name).is_installed:
        raise MachineError(
            f"attention: {name} needs the package {ATTENTION.get(name).package}, which is not installed, is {name}; "
            "nearest valid: attention=auto"
        )


def _check_trackers(config: TrackConfig) -> None:
    """Rejects a tracker without its package, login or place, and an end that cannot be called."""
    if config.wandb == "online":
        _check_wandb_login()
    if config.tensorboard and find_spec("tensorboard") is None:
        raise MachineError(
            "track.tensorboard: needs the package tensorboard, which is not installed, is true; nearest valid: "
            "pip install '.[tensorboard]', or track=none"
        )
    if config.prometheus is not None:
        _check_prometheus(config.prometheus)
    if config.on_end is not None:
        words_of(config.on_end)


def _check_prometheus(place: str) -> None:
    if find_spec("prometheus_client") is None:
        raise MachineError(
            f"track.prometheus: needs the package prometheus-client, which is not installed, is {place}; nearest "
            "valid: pip install '.[serve]', or track.prometheus=null"
        )
    address = split_address(place)
    path = Path(place).expanduser()
    if address is None and (path.suffix != ".prom" or not path.parent.is_dir()):
        raise MachineError(
            f"track.prometheus: must be HOST:PORT, or a file NAME.prom of a folder that exists, is {place}; nearest "
            "valid: 127.0.0.1:9400"
        )
    if address is not None:
        try:
            socket.create_server(address).close()
        except OSError as error:
            raise MachineError(
                f"track.prometheus: must be an address and a free port of this machine, is {place}: {error}; nearest "
                "valid: another port"
            ) from error


def _check_wandb_login() -> None:
    import wandb

    with suppress(TypeError):  # older releases, which always ask
        if not wandb.login(prompt=False, verify=False):
            raise MachineError(
                "track.wandb: online needs a login, there is none; nearest valid: wandb login, WANDB_API_KEY in the "
                "environment, or track=wandb_offline"
            )


def check_scorers(config: TrainConfig) -> None:
    """Rejects a reward that this machine cannot compute, except for parts of models on the ranks."""
    parts = None if config.reward is None else host_parts(config.reward)
    if parts is not None:
        check_reward(parts)


_LIBRARIES = ("libnvidia-ml.so.1", "nvml.dll")
_GB = 1e9


class _Memory(ctypes.Structure):
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
        memories = []
        for index in range(count.value):
            device = ctypes.c_void_p()
            memory = _Memory()
            is_found = nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)) == 0
            if is_found and nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) == 0 and memory.total:
                memories.append(memory)
        return memories
    finally:
        nvml.nvmlShutdown()


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


_PYTHON_BYTES = 500_000_000
_REACH_SECONDS = 60.0
_RETRY_SECONDS = 0.2


def check_node(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """Prints what is wrong with this node on stderr, one line for each problem.

    Arguments are `gpus=N`, `ranks=N`, `rank_bytes=N` (predicted need of a rank), `folder=PATH`, `master=HOST:PORT`.
    """
    values = dict(argument.split("=", 1) for argument in arguments)
    node = environment.get("SLURMD_NODENAME", socket.gethostname())
    index = int(environment["SLURM_NODEID"])
    ranks = int(values["ranks"])
    num_gpus = int(values["gpus"])
    rank_bytes = int(values["rank_bytes"])
    problems = [
        *gpu_problems(num_gpus, -(-ranks // max(num_gpus, 1)) * rank_bytes, environment),
        *host_problems(ranks * (_PYTHON_BYTES + (0 if num_gpus else rank_bytes))),
        *folder_problems(Path(values["folder"]), node),
        *reach_problems(values["master"], node, index, int(environment["SLURM_JOB_NUM_NODES"])),
    ]
    for problem in problems:
        print(f"error: node {node}: {problem}", file=sys.stderr, flush=True)
    return int(bool(problems))


def gpu_problems(num_gpus: int, needed_bytes: int, environment: Mapping[str, str]) -> Iterator[str]:
    """Yields a problem if too few GPUs are visible, or if one has less free memory than its ranks need."""
    free = device_memory_bytes(kind="free") if num_gpus else ()
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    count = len(free) if visible is None else min(len(free), len(visible.split(",")))
    if count < num_gpus:
        yield f"GPUs: {num_gpus} must be visible, {count} are"
    for index, size in enumerate(free):
        if size < needed_bytes:
            yield f"GPU {index}: must have {needed_bytes / _GB:.1f} GB free as predicted, has {size / _GB:.1f}"


def host_problems(needed_bytes: int) -> Iterator[str]:
    """Yields a problem if the host has less free memory than its ranks need."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    if free < needed_bytes:
        yield f"memory: {needed_bytes / _GB:.1f} GB must be free, {free / _GB:.1f} are"


def folder_problems(folder: Path, node: str) -> Iterator[str]:
    """Yields a problem if this node cannot write into the run's folder."""
    probe = folder / f".health-{node}"
    try:
        probe.write_text(node, encoding="utf-8")
        probe.unlink()
    except OSError as error:
        yield f"out_dir: {str(folder)!r} must be writable, is not: {error}"


def reach_problems(
    master: str, node: str, index: int, num_nodes: int, seconds: float = _REACH_SECONDS
) -> Iterator[str]:
    """Yields a problem if this node does not reach node 0, or if node 0 is not reached by all."""
    host, _, port = master.rpartition(":")
    until = time.monotonic() + seconds
    seen = set[bytes]()
    error: OSError | None = None
    while index and time.monotonic() < until:
        try:
            # Node 0 closes last, so that the port is free again for the ranks.
            with socket.create_connection((host, int(port)), timeout=seconds) as connection:
                connection.sendall(node.encode())
            return
        except OSError as refused:
            error = refused
            time.sleep(_RETRY_SECONDS)
    if index:
        yield f"{master}: must be reachable, is not: {error}"
        return
    try:
        with socket.create_server(("", int(port)), backlog=num_nodes) as server:
            while len(seen) < num_nodes - 1:
                server.settimeout(max(0.01, until - time.monotonic()))
                connection, _ = server.accept()
                connection.settimeout(seconds)
                with connection, connection.makefile("rb") as stream:
                    seen.add(stream.read())
    except OSError as error:
        yield f"{master}: {num_nodes - 1} nodes must reach this port, {len(seen)} did: {error}"


ALLOCATOR = "PYTORCH_ALLOC_CONF"
_OLD_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"  # its name before torch 2.10, which torch still reads
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
    if cluster.backend == "nccl":
        # By default, a device's streams share eight queues. A rank has about 16 streams, and behind a receive that
        # waits for its peer a queue would hold the message that this peer waits for.
        wanted[CONNECTIONS] = "32"
        # To load a kernel at its first launch, CUDA may wait for the whole device, where receives spin.
        wanted[MODULE_LOADING] = EAGER
    if cluster.device == "cuda" and _OLD_ALLOCATOR not in inherited:
        # Numbers of rows change in each micro-batch; blocks of fixed size would fragment.
        wanted[ALLOCATOR] = "expandable_segments:True"
    variables = {name: inherited.get(name, value) for name, value in wanted.items()}
    return {**variables, "OMP_NUM_THREADS": str(cluster.threads_per_rank)}


def environment_lines(cluster: ClusterConfig, environment: Mapping[str, str]) -> Iterator[str]:
    """Yields one line with the variables of CUDA, NCCL and the allocator that ranks on GPUs run with."""
    names = (CONNECTIONS, MODULE_LOADING, ALLOCATOR, _OLD_ALLOCATOR) if cluster.device == "cuda" else ()
    chosen = ", ".join(f"{name}={environment[name]}" for name in names if name in environment)
    if chosen:
        yield f"environment: {chosen}"


def local_rank_environment(store_file: Path) -> dict[str, str]:
    """Returns the variables of a rank of a job on this machine alone, over the loopback interface."""
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


if __name__ == "__main__":
    sys.exit(check_node(sys.argv[1:]))
