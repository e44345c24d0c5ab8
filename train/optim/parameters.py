"""Groups a rank's parameters by the process group that holds the same ones, and by stage."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.distributed import ProcessGroup, get_process_group_ranks

from comm.groups import Groups
from dualpipe.ir import Schedule
from dualpipe.runtime.program import first_use_order, reduction_order
from model.block import RoutedExperts
from model.stage import Stage
from model.transformer import Transformer
from train.checkpoint.state import Slice

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReductionGroups:
    """The process groups over which gradients are summed and optimizer state is sharded.

    `dense` are the ranks with the same stages (mirror x data), `experts` those of them with the same routed experts,
    and `expert` those over which the experts of one data replica are sharded.
    """

    dense: ProcessGroup
    experts: ProcessGroup
    expert: ProcessGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterGroups:
    """The parameters of a rank by name and group, in the same order on all replicas.

    `vectors` are norms, without weight decay. `experts` stack the routed experts `held` of `num_experts` in a layer.
    """

    matrices: dict[str, nn.Parameter]
    vectors: dict[str, nn.Parameter]
    experts: dict[str, nn.Parameter]
    held: range
    num_experts: int

    def all(self) -> dict[str, nn.Parameter]:
        """Returns all parameters by name."""
        return self.matrices | self.vectors | self.experts

    def only(self, names: Container[str]) -> "ParameterGroups":
        """Returns the groups without the parameters that have other names."""

        def part(named: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
            return {name: parameter for name, parameter in named.items() if name in names}

        return replace(self, matrices=part(self.matrices), vectors=part(self.vectors), experts=part(self.experts))

    def place(self, name: str, first: int, values: Tensor) -> Slice:
        """Returns flat values that begin at element `first` as a slice of the job's parameter."""
        num_elements = self.all()[name].numel()
        if name not in self.experts:
            return Slice(num_elements, first, values)
        size = num_elements // len(self.held)
        return Slice(size * self.num_experts, size * self.held.start + first, values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """The parameters of one stage, or those that several stages read.

    All ranks of `replicas.dense` have a unit with the same parameters.

    `stages` are the `readers` that this rank holds. `reduction` and `first_use` are its places in orders of the job.
    """

    readers: tuple[int, ...]
    stages: tuple[int, ...]
    groups: ParameterGroups
    replicas: ReductionGroups
    reduction: tuple[int, int]
    first_use: tuple[int, int]

    def __str__(self) -> str:
        return f"stage {' and '.join(map(str, self.readers))}"

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters."""
        return list(self.groups.all().values())

    @property
    def ranks(self) -> list[int]:
        """Global ranks that hold the parameters, without other experts."""
        return get_process_group_ranks(self.replicas.dense)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOrders:
    """All stages, by the end of their last backward and by their first forward; equal on all ranks."""

    reduction: Sequence[int]
    first_use: Sequence[int]

    @property
    def ends(self) -> tuple[int, int]:
        """The first and the last stage."""
        return 0, len(self.reduction) - 1


def units_of(model: Transformer, stages: Mapping[int, Stage], schedule: Schedule, groups: Groups) -> list[Unit]:
    """Splits the parameters of a rank's stages into units in the order of their reductions."""
    return split_into_units(
        group_parameters(model),
        ReductionGroups(dense=groups.stage, experts=groups.expert_data, expert=groups.expert),
        {number: stage.parameters() for number, stage in stages.items()},
        StageOrders(reduction=reduction_order(schedule), first_use=first_use_order(schedule)),
        None if groups.embedding is groups.stage else groups.embedding,
    )


def split_into_units(
    groups: ParameterGroups,
    replicas: ReductionGroups,
    stages: Mapping[int, Iterable[nn.Parameter]],
    orders: StageOrders,
    embedding: ProcessGroup | None = None,
) -> list[Unit]:
    """Splits a rank's parameters by their stages, into units in the order of their reductions.

    Ranks that share several units have them in the same order.

    `embedding` are all ranks that hold the embedding, if MTP modules on ranks with other stages hold a copy.
    """
    held: dict[int, list[int]] = {}
    for stage in sorted(stages):
        for key in {id(parameter) for parameter in stages[stage]}:
            held.setdefault(key, []).append(stage)
    parts: dict[tuple[int, ...], list[str]] = {}
    for name, parameter in groups.all().items():
        readers = orders.ends if embedding is not None and name == EMBEDDING else tuple(held[id(parameter)])
        parts.setdefault(readers, []).append(name)
    units = []
    for readers, names in parts.items():
        over = replicas if embedding is None or EMBEDDING not in names else replace(replicas, dense=embedding)
        units.append(
            Unit(
                readers=readers,
                stages=tuple(stage for stage in readers if stage in stages),
                groups=groups.only(names),
                replicas=over,
                reduction=(max(map(orders.reduction.index, readers)), len(readers)),
                first_use=(min(map(orders.first_use.index, readers)), len(readers)),
            )
        )
    return sorted(units, key=lambda unit: unit.reduction)


def group_parameters(model: Transformer) -> ParameterGroups:
    """Sorts a model's parameters into groups."""
    stacks = {path: module for path, module in model.named_modules() if isinstance(module, RoutedExperts)}
    routed = {
        f"{path}.{name}": parameter for path, module in stacks.items() for name, parameter in module.named_parameters()
    }
    dense = {name: parameter for name, parameter in model.named_parameters() if name not in routed}
    return ParameterGroups(
        matrices={name: parameter for name, parameter in dense.items() if parameter.ndim > 1},
        vectors={name: parameter for name, parameter in dense.items() if parameter.ndim == 1},
        experts=routed,
        held=next((module.experts for module in stacks.values()), range(0)),
        num_experts=model.config.num_routed_experts,
    )
