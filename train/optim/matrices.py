"""Updates whole matrices by a rule, such as Muon's; one of the ranks that hold a matrix owns it.

Gradients are summed to the owners, which keep the state and send the updated weights to the other ranks. AdamW updates
all other weights of a unit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup

from model.linear import GradientStore
from train.optim.adamw import ReplicatedAdamW, Slice, Unit, in_buckets, sum_of_squares
from train.optim.learning_rate import OptimConfig
from train.optim.registry import (
    OPTIMIZERS,
    MatrixRule,
    Stack,
    divide_matrices,
    is_updated_whole,
)
from train.optim.zero1 import Zero1AdamW

ADAMW_BY_SHARDING: dict[str, type[ReplicatedAdamW] | type[Zero1AdamW]]
ADAMW_BY_SHARDING = {"zero1": Zero1AdamW, "replicated": ReplicatedAdamW}


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Consecutive matrices of a stack with one owner: views of the store and of the weights, N x R x C.

    `first` is the place of the first element in this rank's parameter.
    """

    name: str
    owner: int
    first: int
    gradients: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _OwnedPart:
    """What the owner of a part keeps; `masters` are the weights, or wider copies of them."""

    part: _Part
    masters: Tensor
    buffers: dict[str, Tensor]


class _OwnedMatrices:
    """The matrices of a unit that the same ranks hold, such as its routed experts."""

    def __init__(
        self, unit: Unit, names: list[str], group: ProcessGroup, store: GradientStore, config: OptimConfig
    ) -> None:
        rule = OPTIMIZERS.get(config.kind).matrices
        assert rule is not None, f"{config.kind} has no rule for matrices"
        self._rule: MatrixRule = rule
        self._unit = unit
        self._group = group
        self._config = config
        self._parts = list(_divide({name: unit.groups.all()[name] for name in names}, group, store))
        self._owned = [self._keep(part) for part in self._parts if part.owner == dist.get_rank(group)]

    def _keep(self, part: _Part) -> _OwnedPart:
        weights = part.weights
        masters = weights if weights.dtype == part.gradients.dtype else weights.to(part.gradients.dtype)
        dtype = torch.bfloat16 if self._config.moments == "bf16" else masters.dtype
        return _OwnedPart(part, masters, {name: torch.zeros_like(weights, dtype=dtype) for name in self._rule.buffers})

    def reduce(self) -> Tensor:
        """Sums the gradients to their owners; returns the sum of squares of what this rank owns."""
        self._run(dist.reduce, "group_dst", lambda part: part.gradients)
        owned = [sum_of_squares(kept.part.gradients) for kept in self._owned]
        return torch.stack(owned).sum() if owned else torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def update(self, learning_rate: float, norm: float) -> None:
        """Moves what this rank owns by its clipped gradients, and gathers what others own."""
        scale = min(1.0, self._config.clip_norm / (norm + 1e-6))
        for kept in self._owned:
            gradients = kept.part.gradients.mul_(scale)
            move = self._rule.update(kept.part.weights, gradients, kept.buffers, self._config)
            kept.masters.mul_(1 - learning_rate * self._config.weight_decay).sub_(move, alpha=learning_rate)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Copies the masters to the weights of all ranks."""
        for kept in self._owned:
            if kept.masters is not kept.part.weights:
                kept.part.weights.copy_(kept.masters)
        self._run(dist.broadcast, "group_src", lambda part: part.weights)

    def follow_weights(self) -> None:
        """Copies the weights to the masters."""
        for kept in self._owned:
            if kept.masters is not kept.part.weights:
                kept.masters.copy_(kept.part.weights)

    def state(self) -> dict[str, Slice | Tensor]:
        """Returns this rank's slices of the buffers and, if the weights are not their own, of the masters."""
        named: dict[str, Slice | Tensor] = {}
        for kept in self._owned:
            part = kept.part
            copies = {} if kept.masters is part.weights else {"master": kept.masters}
            for key, values in (kept.buffers | copies).items():
                named[f"{part.name}.{key}"] = self._unit.groups.place(part.name, part.first, values.view(-1))
        return named

    def _run(self, collective: Callable[..., object], key: str, tensor: Callable[[_Part], Tensor]) -> None:
        """Runs a collective from or to each owner, over buckets of its parts."""
        if dist.get_world_size(self._group) == 1:
            return
        for owner in sorted({part.owner for part in self._parts}):
            tensors = [tensor(part) for part in self._parts if part.owner == owner]
            run = partial(collective, group=self._group, **{key: owner})
            in_buckets(tensors, self._config.bucket_elements, run)


def _divide(parameters: dict[str, nn.Parameter], group: ProcessGroup, store: GradientStore) -> Iterator[_Part]:
    """Yields the parts of some parameters for all owners, in an order that is equal on all ranks."""
    stacks = [stack_of(name, tuple(parameter.shape)) for name, parameter in parameters.items()]
    counts = divide_matrices(stacks, dist.get_world_size(group))
    for (name, parameter), stack, owned in zip(parameters.items(), stacks, counts, strict=True):
        gradients = store.gradient(parameter).view(stack).split(owned)
        weights = parameter.detach().view(stack).split(owned)
        first = 0
        for owner, parts in enumerate(zip(gradients, weights, strict=True)):
            if owned[owner]:
                yield _Part(name, owner, first, *parts)
            first += parts[0].numel()


def stack_of(name: str, shape: tuple[int, ...]) -> Stack:
    """Returns the number and shape of a parameter's matrices; gate and up projections are two."""
    number, rows, columns = (1,) * (3 - len(shape)) + shape
    return (2 * number, rows // 2, columns) if name.endswith(".gate_up_proj") else (number, rows, columns)


class MatrixOptimizer:
    """The optimizer of one unit with a rule for whole matrices, and AdamW for its other weights.

    All ranks with the unit create and call it; `StagedAdamW` says in which order.
    """

    def __init__(self, unit: Unit, store: GradientStore, config: OptimConfig) -> None:
        whole, others = split_unit(unit)
        self._matrices = [
            _OwnedMatrices(whole, list(named), group, store, config)
            for named, group in (
                (whole.groups.matrices, unit.replicas.dense),
                (whole.groups.experts, unit.replicas.experts),
            )
            if named
        ]
        adamw = ADAMW_BY_SHARDING[config.sharding]
        self._others = [adamw(others, store, config)] if others.parameters else []

    def reduce(self) -> Tensor:
        """Sums gradients over replicas, and returns as `ReplicatedAdamW.reduce`."""
        squares = [part.reduce() for part in (*self._others, *self._matrices)]
        return torch.stack([value.to(squares[0].device) for value in squares]).sum()

    def update(self, learning_rate: float, norm: float) -> None:
        """Clips the summed gradients, and updates the weights on all ranks."""
        for part in (*self._others, *self._matrices):
            part.update(learning_rate, norm)

    def discard(self) -> None:
        """Discards the gradients that are not in the store."""
        for part in self._others:
            part.discard()

    def state(self) -> dict[str, Slice | Tensor]:
        """Returns the state of both parts, not copies."""
        return {name: values for part in (*self._others, *self._matrices) for name, values in part.state().items()}

    def loaded(self, num_steps: Tensor) -> None:
        """Updates what depends on the state after it was filled."""
        for others in self._others:
            others.loaded(num_steps)
        for matrices in self._matrices:
            matrices.publish()

    def follow_weights(self) -> None:
        """Updates the masters after the weights were changed."""
        for part in (*self._others, *self._matrices):
            part.follow_weights()


def split_unit(unit: Unit) -> tuple[Unit, Unit]:
    """Returns the weights that are updated as whole matrices, and all others."""
    groups = unit.groups
    whole = {name for name in groups.matrices | groups.experts if is_updated_whole(name)}
    others = groups.all().keys() - whole
    return replace(unit, groups=groups.only(whole)), replace(unit, groups=groups.only(others))
