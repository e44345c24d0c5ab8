"""Dispatchers by name: what each one needs of a run and holds in memory, and how it is built. No torch here.

A dispatcher registers in the `__init__` of its folder. `local`, the executable specification, is one module and
registers here. A file outside the checkout can register one more: often `dataclasses.replace` of an entry, with a name,
a config class and a builder that wraps the other's dispatcher.
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
        num_tokens: tokens of the rank.
        num_arrived: rows that arrive at its experts, if every expert receives equally many.
        to_experts: bytes of a row on its way to experts.
        from_experts: bytes of a row on its way back.
    """

    num_tokens: int
    num_arrived: int
    to_experts: int
    from_experts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchMemory:
    """Bytes that a dispatcher holds for one layer and micro-batch.

    Attributes:
        routing: from plan to the last exchange.
        to_experts: while rows are on their way to experts.
        from_experts: while rows are on their way back.
    """

    routing: int
    to_experts: int
    from_experts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ContractSetting:
    """One expert group over which the contract suite runs.

    Attributes:
        nodes: node of each rank of the group.
        fields: fields of the config that differ from `Contract.fields`.
        is_slow: left out of the fast tests.
    """

    nodes: tuple[int, ...]
    fields: Mapping[str, object] = field(default_factory=dict)
    is_slow: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Contract:
    """What the contract suite needs to run over a dispatcher.

    Attributes:
        settings: expert groups, by what distinguishes them.
        fields: fields of the config without which it cannot be made, besides `kind`, `payload` and those of the cap.
        row_types: names of torch dtypes whose rows it moves.
        weights_type: name of the dtype of routing weights.
        hidden_size: a width of rows that it moves.
        package: that it needs; the suite puts an emulation in the place of one that is not installed.
    """

    settings: Mapping[str, ContractSetting]
    fields: Mapping[str, object] = field(default_factory=dict)
    row_types: tuple[str, ...] = ("float64", "bfloat16")
    weights_type: str = "float64"
    hidden_size: int = 5
    package: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatcherEntry:
    """A dispatcher that `dispatch.kind` can name.

    Attributes:
        name: value of `dispatch.kind`.
        summary: one line for users.
        config: its configuration, a subclass of `DispatchConfig`.
        build: makes it for the ranks of an expert group, all of which call it at the same point.
        requirements: each raises `DispatchRequirementError` if the dispatcher cannot serve the run.
        memory: predicts what it holds. Counts that depend on the routing are taken at their largest: a token of K
            experts reaches K ranks, and as many nodes as the cap allows.
        contract: for the contract suite.
    """

    name: str
    summary: str
    config: type[DispatchConfig]
    build: "Callable[[Any, DispatcherParts], Dispatcher]"
    requirements: tuple[Callable[[Any, DispatchSite], None], ...]
    memory: Callable[[Any, DispatchSite, RowBytes], DispatchMemory]
    contract: Contract

    def check(self, config: DispatchConfig, site: DispatchSite) -> None:
        """Checks all requirements.

        Raises:
            DispatchRequirementError: one is not met.
        """
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
