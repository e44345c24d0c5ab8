"""Builds registered dispatchers for tests, on the ranks of any expert group."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.machinery import ModuleSpec
from typing import Any
from unittest.mock import patch

import torch
from torch import distributed

from comm.config import CappedDispatchConfig, DispatchConfig, ParallelismConfig
from comm.dispatch.build import DispatcherParts
from comm.dispatch.process_group import Observers
from comm.dispatch.registry import DISPATCHERS, DispatcherEntry, TokenSizes
from comm.dispatch.traffic import Traffic
from comm.lane import Lane
from comm.layout import Layout
from comm.protocol import Dispatcher
from comm.watchdog.collective_log import CollectiveLog
from tests.comm.deep_ep_emulation import Emulation

MAX_TOKENS, MAX_CHOICES = 200, 4  # maximum number of a rank's tokens in the contract suite
_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Setting:
    """Name of a dispatcher, fields of its config, and the node of each rank.

    The expert group is the world.
    """

    kind: str
    nodes: tuple[int, ...]
    fields: Mapping[str, object] = field(default_factory=dict)
    max_nodes: int | None = None

    @property
    def layout(self) -> "GivenLayout":
        mesh = ParallelismConfig(pipeline=1, data=len(self.nodes), expert=len(self.nodes))
        return GivenLayout(mesh, 1, self.nodes)

    @property
    def entry(self) -> DispatcherEntry:
        return DISPATCHERS.get(self.kind)

    @property
    def config(self) -> DispatchConfig:
        """Configuration of the dispatcher. Fields that it does not have are ignored."""
        entry = self.entry
        cap = {"max_nodes": self.max_nodes or len(self.nodes), "node_cap": "verify"}
        values = {"kind": self.kind, "payload": "full", **cap, **entry.contract.fields, **self.fields}
        known = {each.name for each in fields(entry.config)}
        made: Any = entry.config
        config: DispatchConfig = made(**{name: value for name, value in values.items() if name in known})
        return config


@dataclass(frozen=True, slots=True)
class GivenLayout(Layout):
    """Layout with given nodes, for expert groups that begin or end within a node."""

    nodes: tuple[int, ...]

    def node_of(self, rank: int) -> int:
        """Returns the node of a rank from `nodes`."""
        return self.nodes[rank]


def capped_kinds() -> list[str]:
    """Returns the names of dispatchers that send rows between ranks and need no package."""
    return [
        name
        for name, entry in DISPATCHERS.items()
        if issubclass(entry.config, CappedDispatchConfig) and entry.contract.package is None
    ]


def watching() -> Observers:
    return Observers(Traffic(), CollectiveLog())


def maker(setting: Setting, num_experts: int, observers: Observers) -> Callable[[Lane], Dispatcher]:
    """Creates a process group once and returns a function that builds dispatchers on it."""
    group = distributed.new_group()
    assert isinstance(group, distributed.ProcessGroup)

    def make(lane: Lane) -> Dispatcher:
        hidden_size = setting.entry.contract.hidden_size
        parts = make_parts(num_experts, setting.layout, group, lane, observers, hidden_size)
        return setting.entry.build(setting.config, parts)

    return make


def make_parts(
    num_experts: int,
    layout: Layout,
    group: distributed.ProcessGroup,
    lane: Lane,
    observers: Observers,
    hidden_size: int = 24,
) -> DispatcherParts:
    """Returns the arguments for a dispatcher, with room for the tokens of any test."""
    return DispatcherParts(
        num_experts=num_experts,
        layout=layout,
        group=group,
        lane=lane,
        observers=observers,
        timeout_seconds=_TIMEOUT_SECONDS,
        tokens=TokenSizes(max_tokens=MAX_TOKENS, hidden_size=hidden_size, num_choices=MAX_CHOICES),
    )


@contextmanager
def emulated(setting: Setting) -> Iterator[None]:
    """Replaces the package that the dispatcher needs by an emulation while inside."""
    package = setting.entry.contract.package
    if package is None:
        yield
        return
    assert package == "deep_ep", f"no emulation of {package}"
    ranks_per_node = setting.nodes.count(setting.nodes[0])
    # The package can be built for either dtype of ids.
    ids_dtype = torch.int64 if ranks_per_node == len(set(setting.nodes)) else torch.int32
    emulation: Any = Emulation(ranks_per_node, ids_dtype)
    emulation.__spec__ = ModuleSpec(package, None)
    with patch.dict(sys.modules, {package: emulation}):
        yield
