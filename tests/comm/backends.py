"""Dispatchers for tests, on the ranks of any expert group."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import distributed

from comm.config import ParallelismConfig, TwoHopDispatchConfig
from comm.dispatch.all_to_all.dispatcher import AllToAllDispatcher
from comm.dispatch.local import LocalDispatcher
from comm.dispatch.process_group import Observers
from comm.dispatch.traffic import Traffic
from comm.dispatch.two_hop.dispatcher import TwoHopDispatcher, TwoHopGroups
from comm.lane import Lane
from comm.layout import Layout
from comm.protocol import Dispatcher
from comm.watchdog.operation_log import OperationLog

Backend = Literal["local", "all_to_all", "two_hop"]
_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Setting:
    """A backend, and the node of each rank of the expert group, which is the world."""

    backend: Backend
    nodes: tuple[int, ...]
    chunks: int = 1
    partial_sums: Literal["rows", "float32"] = "rows"
    max_nodes: int | None = None

    @property
    def layout(self) -> "GivenLayout":
        """Of the world."""
        mesh = ParallelismConfig(pipeline=1, data=len(self.nodes), expert=len(self.nodes))
        return GivenLayout(mesh, 1, self.nodes)

    @property
    def two_hop(self) -> TwoHopDispatchConfig:
        """The backend's configuration."""
        return TwoHopDispatchConfig(
            kind="two_hop",
            payload="full",
            max_nodes=self.max_nodes or len(self.nodes),
            node_cap="verify",
            chunks=self.chunks,
            partial_sums=self.partial_sums,
        )


@dataclass(frozen=True, slots=True)
class GivenLayout(Layout):
    """Ranks on given nodes: what an expert group sees that begins or ends within a node."""

    nodes: tuple[int, ...]

    def node_of(self, rank: int) -> int:
        """See `nodes`."""
        return self.nodes[rank]


def watching() -> Observers:
    """New observers."""
    return Observers(Traffic(), OperationLog())


def maker(setting: Setting, num_experts: int, observers: Observers) -> Callable[[Lane], Dispatcher]:
    """Makes the process groups, once, and gives what makes dispatchers on them."""
    group, layout = distributed.new_group(), setting.layout
    assert isinstance(group, distributed.ProcessGroup)
    groups = TwoHopGroups.join(group, layout, _TIMEOUT_SECONDS)

    def make(lane: Lane) -> Dispatcher:
        match setting.backend:
            case "local":
                return LocalDispatcher(num_experts)
            case "all_to_all":
                return AllToAllDispatcher(group, num_experts, layout, lane, observers, setting.max_nodes)
            case "two_hop":
                return TwoHopDispatcher(groups, num_experts, layout, lane, observers, setting.two_hop)

    return make
