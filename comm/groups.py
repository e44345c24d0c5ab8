"""Creates the process groups of one rank, and initializes and destroys `torch.distributed`.

The built-in launcher has a separate rendezvous that opens no port: ranks use a store in a file of a private folder.
torch's own rendezvous start a TCP server that listens on all addresses of the machine and accepts any connection.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
from torch import distributed
from torch.distributed import (  # type: ignore[attr-defined]
    DistError,
    HashStore,
    ProcessGroup,
    ProcessGroupGloo,
)
from torch.distributed.distributed_c10d import Store
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from comm.config import CONTEXT_CTAS, EXCHANGE_CTAS, REDUCTION_CTAS, SMALL_CTAS, ClusterConfig
from comm.layout import Layout, Slices, context_partition, expert_data_partition, expert_partition, stage_partition
from kernels.launch import reserve_sms

GROUP_TIMEOUT_MARGIN_SECONDS = 20.0
"""Added to the timeout of process groups, so that the watchdog reports first: it can name the missing rank."""

MOST_CONNECTED_RANKS = 256
"""Largest number of ranks whose gloo group connects every pair of ranks at once."""

GLOO_STAGES = frozenset(
    ("all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all_single", "broadcast", "gather", "reduce")
)
"""Collectives with tensors of a GPU that torch's gloo passes through pinned host memory, as `cluster=one_gpu` needs."""

GLOO_ON_HOST = frozenset(("barrier", "broadcast_object_list", "gather_object", "scatter_object_list"))
"""Collectives of gloo whose tensors torch itself keeps on the host.

Sends and receives need tensors on the host: `comm.transfers.HostLink` copies them there, and so does the probe.
"""

_LARGE_SUM = 2**24
"""Numbers for which NCCL takes the algorithm of large sums, which are limited by bandwidth."""

_LAZY_VARIABLE = "TORCH_GLOO_LAZY_INIT"

_SHARED_GLOO = "gloo_on_world_device"
"""Name under which torch makes the groups of `_open_on_world_device`: it has no argument for gloo's devices."""


class ClusterError(ValueError):
    """Raised if a process cannot join the job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupKernels:
    """How NCCL runs a group's kernels."""

    max_ctas: int = SMALL_CTAS  # most SMs that a kernel occupies, also while it waits for a peer
    is_urgent: bool = False  # whether they run before others that are ready, because the schedule waits for them


_REDUCING = GroupKernels(max_ctas=REDUCTION_CTAS)
EXCHANGING = GroupKernels(max_ctas=EXCHANGE_CTAS, is_urgent=True)
_SHARING_CONTEXT = GroupKernels(max_ctas=CONTEXT_CTAS, is_urgent=True)


def exchange_kernels(communication_sms: int | None) -> GroupKernels:
    """Returns how NCCL runs dispatch and combine, given `cluster.communication_sms`."""
    return replace(EXCHANGING, max_ctas=communication_sms or EXCHANGE_CTAS)


class Groups:
    """Process groups of one rank, each with its own communicator.

    Groups with equal members still get separate communicators, and calls on one communicator must have the same order
    on all ranks. So each is used from one lane: the expert group from the comm lane; those of `stage`, `expert_data`
    and `embedding` from the lane of reductions; the context group and the world from the compute lane.

    Attributes:
        expert: ranks that together hold every routed expert of this rank's stages, ordered by expert index.
        stage: ranks that hold the same non-expert parameters.
        expert_data: ranks that hold the same routed experts.
        embedding: ranks that hold the embedding. It is `stage` itself if these are the same ranks, and on ranks that do
            not hold the embedding.
        context: ranks that share each sequence, ordered by context index; None if each rank holds whole sequences.
        exchange_kernels: how NCCL runs the kernels of dispatch and combine.
    """

    rank: int
    expert: ProcessGroup
    stage: ProcessGroup
    expert_data: ProcessGroup
    embedding: ProcessGroup
    context: ProcessGroup | None
    world: ProcessGroup
    exchange_kernels: GroupKernels

    def __init__(
        self,
        layout: Layout,
        *,
        mirrored: bool,
        timeout_seconds: float,
        embedding: Sequence[int] = (0,),
        communication_sms: int | None = None,
    ) -> None:
        """Creates all groups and opens their communicators. All ranks call it once, at the same point.

        Args:
            embedding: pipeline indices of the ranks that hold the embedding.
            communication_sms: SMs for dispatch and combine on NCCL; None as NCCL chooses.
        """
        if distributed.get_world_size() != layout.world_size:
            raise ClusterError(
                f"cluster: pipeline x data x context must equal the number of ranks started, "
                f"is {layout.world_size} for {distributed.get_world_size()} ranks"
            )
        self.rank = distributed.get_rank()
        self.exchange_kernels = exchange_kernels(communication_sms)
        self.expert = join_one(expert_partition(layout), timeout_seconds, self.exchange_kernels)
        self.stage = join_one(stage_partition(layout, mirrored=mirrored), timeout_seconds, _REDUCING)
        self.expert_data = join_one(expert_data_partition(layout, mirrored=mirrored), timeout_seconds, _REDUCING)
        holders = layout.ranks_at(embedding)
        is_stage_group = set(holders) <= set(layout.stage_group(holders[0], mirrored=mirrored))
        self.embedding = (None if is_stage_group else make_group(holders, timeout_seconds, _REDUCING)) or self.stage
        shares = layout.parallelism.context > 1
        self.context = join_one(context_partition(layout), timeout_seconds, _SHARING_CONTEXT) if shares else None
        world = distributed.group.WORLD
        assert world is not None
        self.world = world
        context: list[ProcessGroup] = [] if self.context is None else [self.context]
        other: list[ProcessGroup] = [] if self.embedding is self.stage else [self.embedding]
        open_communicators([self.expert, *context], [world, self.stage, self.expert_data, *other, *context])


def open_communicators(exchanging: Iterable[ProcessGroup], reducing: Iterable[ProcessGroup] = ()) -> None:
    """Runs the first collectives of this rank's groups on NCCL: an all-to-all, or sums and gathers.

    NCCL creates a communicator at its first collective, and connects ranks when an algorithm or a pair first needs it.
    Both block the host until all members arrive. Inside a schedule that can be a deadlock, because receives that wait
    for a peer already occupy the device (nccl#1082). All ranks call it with groups of the same partitions in the same
    order. `device_id` of `init_process_group` is no substitute: it connects no pairs, and makes each `new_group` a
    collective of the whole job.
    """
    if distributed.get_backend() != "nccl":
        return
    device = torch.device("cuda", torch.cuda.current_device())
    for group in exchanging:
        sent_R1 = torch.zeros(distributed.get_world_size(group), 1, device=device)
        distributed.all_to_all_single(torch.empty_like(sent_R1), sent_R1, group=group)
    for group in reducing:
        members = distributed.get_process_group_ranks(group)
        for size in (1, _LARGE_SUM):
            # NCCL chooses an algorithm for each kind and size. ZeRO-1 reduces to owners and gathers their weights.
            numbers = torch.zeros(size, device=device)
            distributed.all_reduce(numbers, group=group)
            distributed.reduce(numbers, members[0], group=group)
            shard = numbers[: -(-size // len(members))]
            distributed.all_gather([torch.empty_like(shard) for _ in members], shard, group=group)
    torch.cuda.synchronize(device)  # host sync


def join_one(
    partition: Iterable[Slices], timeout_seconds: float, kernels: GroupKernels = GroupKernels()
) -> ProcessGroup:
    """Creates all groups of a partition of the world and returns this rank's group. See `make_group`."""
    own_group = None
    for slices in partition:
        own_group = make_group(list(chain(*slices)), timeout_seconds, kernels) or own_group
    assert own_group is not None, "a partition must contain every rank"
    return own_group


def make_group(
    members: Sequence[int], timeout_seconds: float, kernels: GroupKernels = GroupKernels()
) -> ProcessGroup | None:
    """Creates a group of global ranks, ascending, and returns it on its members, None elsewhere.

    All ranks call it for every group in one order. torch names a group by the number of earlier calls. A rank that
    skips a call would use another name than its peers and block. (`use_local_synchronization` lets other ranks skip the
    call, but it counts calls too.) On a rank outside the group a call takes about 10 microseconds and needs no
    communication. `GROUP_TIMEOUT_MARGIN_SECONDS` is added to the timeout of each collective. Only NCCL has `kernels`.
    """
    timeout = timedelta(seconds=timeout_seconds + GROUP_TIMEOUT_MARGIN_SECONDS)
    backend = distributed.get_backend()
    if backend == "gloo":
        if _SHARED_GLOO not in distributed.Backend.backend_list:  # older torch refuses a second registration
            distributed.Backend.register_backend(_SHARED_GLOO, _open_on_world_device, devices=["cpu", "cuda"])
        group = distributed.new_group(list(members), timeout=timeout, backend=_SHARED_GLOO)
    else:
        options = _nccl_options(kernels, timeout) if backend == "nccl" else None
        group = distributed.new_group(list(members), timeout=timeout, pg_options=options)
    return group if isinstance(group, ProcessGroup) else None


def _open_on_world_device(store: Store, rank: int, size: int, timeout: timedelta) -> ProcessGroupGloo:
    """Creates a gloo group on the world's device; one thread then serves both.

    Otherwise each group has a device with a thread that wakes a hundred times a second.
    """
    world = distributed.group.WORLD
    assert world is not None
    backend: Any = world._get_backend(torch.device("cpu"))
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = getattr(backend, "wrapped_pg", backend).options._devices  # wrapped under torch's debug level
    return ProcessGroupGloo(store, rank, size, options)


def _nccl_options(kernels: GroupKernels, timeout: timedelta) -> Any:
    options = distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout  # torch warns if it differs from `new_group`'s
    options.is_high_priority_stream = kernels.is_urgent
    options.config.min_ctas = 1
    options.config.max_ctas = kernels.max_ctas
    return options


def make_host_group(timeout: timedelta) -> ProcessGroup:
    """Creates a gloo group of all ranks, also in a job on NCCL. All ranks call it at the same point.

    In jobs of more than `MOST_CONNECTED_RANKS` ranks, two ranks connect when they first communicate, because gloo would
    connect every pair at once.
    """
    if distributed.get_world_size() <= MOST_CONNECTED_RANKS:
        group = distributed.new_group(backend="gloo", timeout=timeout)
    else:
        # torch reads the variable when it creates a group, and has no argument for it.
        previous = os.environ.get(_LAZY_VARIABLE)
        os.environ[_LAZY_VARIABLE] = "1"
        try:
            group = distributed.new_group(backend="gloo", timeout=timeout)
        finally:
            del os.environ[_LAZY_VARIABLE]
            os.environ |= {} if previous is None else {_LAZY_VARIABLE: previous}
    assert isinstance(group, ProcessGroup)
    return group


def is_peer_error(error: RuntimeError) -> bool:
    """Returns whether a collective failed because another rank has ended or does not respond."""
    return isinstance(error, DistError) or "gloo" in str(error)


def start(cluster: ClusterConfig, store: Store | None = None) -> torch.device:
    """Initializes `torch.distributed` from RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* in the environment.

    Returns the device of this process. With gloo, ranks share devices if there are fewer devices than ranks. `store` is
    that of the job if one is open already.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise ClusterError(f"cluster: the launcher must set {', '.join(missing)}; start ranks with torchrun")
    if cluster.threads_per_rank > 0:
        torch.set_num_threads(cluster.threads_per_rank)
    device = _device(cluster, int(os.environ["LOCAL_RANK"]))
    if cluster.backend == "nccl" and os.environ["WORLD_SIZE"] != "1":
        reserve_sms(device, cluster.communication_sms or 0)
    timeout = timedelta(seconds=cluster.timeout_seconds + GROUP_TIMEOUT_MARGIN_SECONDS)
    with _batch_priority_threads():
        distributed.init_process_group(
            cluster.backend,
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timeout,
            pg_options=_nccl_options(GroupKernels(), timeout) if cluster.backend == "nccl" else None,
        )
    return device


@contextmanager
def _batch_priority_threads() -> Iterator[None]:
    """Starts threads inside with SCHED_BATCH on Linux, so that they do not preempt others on wake-up.

    gloo's event thread polls a connection's lock while a sender holds it. With fewer cores than threads, it would
    preempt that sender and then spin for milliseconds.
    """
    if sys.platform != "linux" or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield
        return
    unprivileged = os.sched_param(0)
    os.sched_setscheduler(0, os.SCHED_BATCH, unprivileged)
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, unprivileged)


def stop() -> None:
    """Leaves the job. Must not be called after an error: peers may wait for this rank inside a collective."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _device(cluster: ClusterConfig, local_rank: int) -> torch.device:
    if cluster.device == "cpu":
        if cluster.backend == "nccl":
            raise ClusterError("cluster.backend: nccl needs cluster.device=cuda, is cpu; nearest valid: gloo")
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    if num_devices == 0:
        raise ClusterError("cluster.device: cuda needs a GPU, none was found; nearest valid: cpu")
    if cluster.backend == "nccl" and local_rank >= num_devices:
        raise ClusterError(
            f"cluster.backend: nccl needs a GPU for each rank of a node, local rank {local_rank} has none of the "
            f"{num_devices} GPUs; nearest valid: gloo, which shares them"
        )
    device = torch.device("cuda", local_rank % num_devices)
    torch.cuda.set_device(device)
    return device


PRIVATE_RENDEZVOUS = "private"


class PrivateRendezvous(RendezvousHandler):
    """Rendezvous of a single launcher, which also checks the ranks each time the launcher does."""

    def __init__(self, run_id: str, check_ranks: Callable[[], None]) -> None:
        """Creates the rendezvous; it calls `check_ranks`, which may raise, while all ranks are healthy."""
        self._run_id = run_id
        self._check_ranks = check_ranks
        self._store = HashStore()

    def get_backend(self) -> str:
        """Returns the name under which this rendezvous is registered."""
        return PRIVATE_RENDEZVOUS

    def next_rendezvous(self) -> RendezvousInfo:
        """Returns node rank 0 of 1. The address that ranks receive has no listener."""
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

    def num_nodes_waiting(self) -> int:
        """Calls `check_ranks` and returns 0, as no other launcher joins. Called after each check of the ranks."""
        self._check_ranks()
        return 0

    def is_closed(self) -> bool:
        """Returns False: the rendezvous stays open."""
        return False

    def set_closed(self) -> None:
        """Does nothing: there is no other launcher to inform."""

    def get_run_id(self) -> str:
        """Returns the id of the attempt."""
        return self._run_id

    def shutdown(self) -> bool:
        """Returns True: nothing is left to close."""
        return True


def register_private_rendezvous() -> None:
    """Registers `PRIVATE_RENDEZVOUS` with torch's launcher; `rdzv_configs` must hold `check_ranks`."""
    rendezvous_handler_registry.register(PRIVATE_RENDEZVOUS, _create)


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    # One function, because torch refuses a second registration with another one, and each restart registers.
    return PrivateRendezvous(parameters.run_id, parameters.config["check_ranks"])
