"""Registers dispatchers by name, with their requirements, memory and builder. Does not import torch.

A dispatcher registers in the `__init__` of its folder, except `local`, a single module. A file outside the checkout can
register another one, often by `dataclasses.replace` of an entry with a new name, a config class and a builder that
wraps the existing dispatcher.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from comm.config import DispatchConfig, LocalDispatchConfig
from comm.dispatch.requirements import DispatchSite, require_one_expert_rank
from kernels.registry import Registry

if TYPE_CHECKING:
    from comm.dispatch.build import DispatcherParts
    from comm.protocol import Dispatcher

INDEX_BYTES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBytes:
    """Rows of one layer and micro-batch on one rank.

    Attributes:
        num_arrived: rows that arrive at its experts if every expert receives equally many.
        to_experts: bytes of a row that is sent to experts.
        from_experts: bytes of a row that returns from experts.
    """

    num_tokens: int
    num_arrived: int
    to_experts: int
    from_experts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchMemory:
    """Memory of a dispatcher for one layer and micro-batch, in bytes.

    Attributes:
        routing: bytes held from the plan to the last exchange.
        to_experts: bytes held while rows are sent to experts.
        from_experts: bytes held while rows return from experts.
    """

    routing: int
    to_experts: int
    from_experts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ContractSetting:
    """Expert group over which the contract suite runs.

    Attributes:
        nodes: node of each rank of the group.
        fields: fields of the config that differ from `Contract.fields`.
        is_slow: whether the fast tests skip it.
    """

    nodes: tuple[int, ...]
    fields: Mapping[str, object] = field(default_factory=dict)
    is_slow: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Contract:
    """Parameters with which the contract suite tests a dispatcher.

    Attributes:
        settings: expert groups by a short name.
        fields: required fields of the config, without `kind`, `payload` and those of the node cap.
        row_types: names of the supported torch dtypes of rows.
        weights_type: name of the dtype of routing weights.
        package: package that the dispatcher needs; the suite uses an emulation if it is not installed.
    """

    settings: Mapping[str, ContractSetting]
    fields: Mapping[str, object] = field(default_factory=dict)
    row_types: tuple[str, ...] = ("float64", "bfloat16")
    weights_type: str = "float64"
    hidden_size: int = 5
    package: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatcherEntry:
    """Registered dispatcher, which `dispatch.kind` can name.

    Attributes:
        name: value of `dispatch.kind`.
        build: function that builds it; all ranks of an expert group call it at the same point.
        requirements: functions that raise `DispatchRequirementError` if the dispatcher cannot be used for the run.
        memory: function that predicts its memory. It assumes the largest counts that a routing can have: a token of K
            experts reaches K ranks, and as many nodes as the cap allows.
    """

    name: str
    summary: str
    config: type[DispatchConfig]
    build: "Callable[[Any, DispatcherParts], Dispatcher]"
    requirements: tuple[Callable[[Any, DispatchSite], None], ...]
    memory: Callable[[Any, DispatchSite, RowBytes], DispatchMemory]
    contract: Contract

    def check(self, config: DispatchConfig, site: DispatchSite) -> None:
        """Raises DispatchRequirementError if a requirement is not met."""
        for require in self.requirements:
            require(config, site)


DISPATCHERS = Registry[DispatcherEntry](
    "dispatch.kind", (__name__, "comm.dispatch.all_to_all", "comm.dispatch.two_hop", "comm.dispatch.deepep")
)


def order_bytes(site: DispatchSite, rows: RowBytes) -> int:
    """Returns the bytes of the three indices of each of a rank's choices (`expert_order.ExpertOrder`)."""
    return 3 * INDEX_BYTES * rows.num_tokens * site.tokens.num_choices


def _build_local(config: LocalDispatchConfig, parts: "DispatcherParts") -> "Dispatcher":
    from comm.dispatch.local import LocalDispatcher

    return LocalDispatcher(parts.num_experts)


def _local_memory(config: LocalDispatchConfig, site: DispatchSite, rows: RowBytes) -> DispatchMemory:
    return DispatchMemory(routing=order_bytes(site, rows), to_experts=0, from_experts=0)


DISPATCHERS.register(
    "local",
    DispatcherEntry(
        name="local",
        summary="every expert on the rank itself; nothing is sent",
        config=LocalDispatchConfig,
        build=_build_local,
        requirements=(require_one_expert_rank,),
        memory=_local_memory,
        contract=Contract(settings={"1": ContractSetting(nodes=(0,))}),
    ),
)
