"""Process groups of one rank, and the process' entry into and exit from the job."""

import os
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import Store

from comm.config import ClusterConfig
from comm.layout import Layout

GROUP_TIMEOUT_MARGIN_SECONDS = 20.0
"""Added to the timeout of process groups, so that the watchdog, which can name the missing rank, reports first."""


class ClusterError(ValueError):
    """A process that cannot take its place in the job."""


class Groups:
    """The groups in which one rank takes part, each with a communicator of its own.

    Equal member lists still get separate communicators: the expert group is used from the comm lane
    while the others are used from the compute lane, and one communicator must see one order of calls.

    Attributes:
        rank: of this process in the world.
        expert: holds every routed expert of this rank's stages; a member's place is its expert index.
        stage: holds the same ordinary parameters.
        expert_data: holds the same routed experts.
        world: every rank of the job.
    """

    rank: int
    expert: ProcessGroup
    stage: ProcessGroup
    expert_data: ProcessGroup
    world: ProcessGroup

    def __init__(self, layout: Layout, mirrored: bool, timeout_seconds: float) -> None:
        """Makes all groups, once per process, by every rank at the same point, after `start`.

        Args:
            layout: of the world.
            mirrored: whether pipeline ranks p and P-1-p hold the same stages.
            timeout_seconds: of each collective.

        Raises:
            ClusterError: the world has another size than the layout.
        """
        if distributed.get_world_size() != layout.world_size:
            raise ClusterError(
                f"cluster: pipeline x data must equal the number of ranks started, "
                f"got {layout.world_size} for {distributed.get_world_size()}"
            )
        self.rank = distributed.get_rank()
        ranks = range(layout.world_size)
        self.expert = join_one({layout.expert_group(rank) for rank in ranks}, timeout_seconds)
        self.stage = join_one({layout.stage_group(rank, mirrored) for rank in ranks}, timeout_seconds)
        self.expert_data = join_one({layout.expert_data_group(rank, mirrored) for rank in ranks}, timeout_seconds)
        world = distributed.group.WORLD
        assert world is not None
        self.world = world


def join_one(partition: set[tuple[int, ...]], timeout_seconds: float) -> ProcessGroup:
    """Makes all groups of a partition of the world and gives the one that this rank is in. See `make_group`."""
    made = [make_group(members, timeout_seconds) for members in sorted(partition)]
    (mine,) = (group for group in made if group is not None)
    return mine


def make_group(members: tuple[int, ...], timeout_seconds: float) -> ProcessGroup | None:
    """Makes a group and returns it to members. All ranks of the job call it for every group, in one order.

    torch names a group after the number of calls before it, so a rank that leaves one out meets its peers
    under another name, in vain. (`use_local_synchronization` counts too, though it lets others stay away.)
    A call costs an outsider some 10 microseconds and no communication.

    Args:
        members: global ranks, ascending.
        timeout_seconds: of each collective; see `GROUP_TIMEOUT_MARGIN_SECONDS`.
    """
    timeout = timedelta(seconds=timeout_seconds + GROUP_TIMEOUT_MARGIN_SECONDS)
    group = distributed.new_group(list(members), timeout=timeout)
    return group if isinstance(group, ProcessGroup) else None


def start(cluster: ClusterConfig, store: Store | None = None) -> torch.device:
    """Joins the job that the launcher describes in the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*).

    Args:
        cluster: the machines.
        store: of the job, where one is open already; else the one at MASTER_*.

    Returns:
        The device of this process. Ranks share devices on the gloo backend where there are too few.

    Raises:
        ClusterError: the environment names no rank, or there is no device for it.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise ClusterError(f"cluster: the launcher must set {', '.join(missing)}; start ranks with torchrun")
    if cluster.threads_per_rank > 0:
        torch.set_num_threads(cluster.threads_per_rank)
    device = _device(cluster, int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(
        cluster.backend,
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=cluster.timeout_seconds + GROUP_TIMEOUT_MARGIN_SECONDS),
    )
    return device


def stop() -> None:
    """Leaves the job. Not for the way out of an error: peers may be waiting for this rank inside a collective."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _device(cluster: ClusterConfig, local_rank: int) -> torch.device:
    if cluster.device == "cpu":
        if cluster.backend == "nccl":
            raise ClusterError("cluster.backend: nccl needs cluster.device=cuda, got cpu; gloo serves both")
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    if num_devices == 0:
        raise ClusterError("cluster.device: cuda needs a GPU and none was found; cpu runs anywhere")
    if cluster.backend == "nccl" and local_rank >= num_devices:
        raise ClusterError(
            f"cluster.backend: nccl needs a GPU for each rank of a node, got local rank {local_rank} "
            f"and {num_devices} GPUs; gloo shares them"
        )
    device = torch.device("cuda", local_rank % num_devices)
    torch.cuda.set_device(device)
    return device
