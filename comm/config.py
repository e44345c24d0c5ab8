"""Where ranks live, how they are laid out, and how tokens travel to experts, as values. No torch here."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """The machines. A node is `ranks_per_node` consecutive ranks; a simulated node shares a machine with others."""

    device: Literal["cpu", "cuda"]
    backend: Literal["gloo", "nccl"]
    ranks_per_node: int
    threads_per_rank: int
    timeout_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelismConfig:
    """world = pipeline x data; the expert axis divides the data axis."""

    pipeline: int
    data: int
    expert: int

    @property
    def world_size(self) -> int:
        """Ranks in the job."""
        return self.pipeline * self.data


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalDispatchConfig:
    """All experts on this rank: nothing is sent."""

    kind: Literal["local"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AllToAllDispatchConfig:
    """One all-to-all over the expert group each way."""

    kind: Literal["all_to_all"]


DispatchConfig = LocalDispatchConfig | AllToAllDispatchConfig
