"""The optimizer's protocol, and the one that a run names."""

from typing import Protocol, assert_never

from torch import Tensor

from model.gradients import GradientStore
from train.checkpoint.state import Slice
from train.optim.config import OptimConfig
from train.optim.parameters import ParameterGroups, ReductionGroups
from train.optim.replicated import ReplicatedAdamW
from train.optim.zero1 import Zero1AdamW


class Optimizer(Protocol):
    """Applies the gradients in a store to the weights, in two parts, between which the step can be refused."""

    def reduce(self) -> float:
        """Sums gradients over replicas; returns their global norm, equal on all ranks. No weight or state changes."""
        ...

    def update(self, learning_rate: float) -> None:
        """Clips and applies what `reduce` summed. The store is cleared."""
        ...

    def discard(self) -> None:
        """Forgets the gradients, reduced or not: as if there had been no step. The store is cleared."""
        ...

    def state(self) -> dict[str, Slice | Tensor]:
        """Returns this rank's state, to save or to fill in place, under names that depend on no layout.

        `step` is a scalar; `<parameter>.exp_avg`, `.exp_avg_sq` and, where the weights are not their own master
        copies, `.master` are runs of the whole job's flat parameter.
        """
        ...

    def loaded(self) -> None:
        """Follows a change of the tensors of `state`."""
        ...

    def follow_weights(self) -> None:
        """Follows a change of the weights themselves."""
        ...


def build_optimizer(
    groups: ParameterGroups, store: GradientStore, replicas: ReductionGroups, config: OptimConfig
) -> Optimizer:
    """Builds the optimizer that `config.sharding` names."""
    match config.sharding:
        case "zero1":
            return Zero1AdamW(groups, store, replicas, config)
        case "replicated":
            return ReplicatedAdamW(groups, store, replicas, config)
        case _ as other:
            assert_never(other)
