"""Defines the protocol of an optimizer, and builds the one that a run configures."""

from typing import Protocol, assert_never

from torch import Tensor

from model.gradients import GradientStore
from train.checkpoint.state import Slice
from train.optim.config import OptimConfig
from train.optim.parameters import ParameterGroups, ReductionGroups
from train.optim.replicated import ReplicatedAdamW
from train.optim.zero1 import Zero1AdamW


class Optimizer(Protocol):
    """The protocol of an optimizer: `reduce`, then either `update` or, if the step is refused, `discard`."""

    def reduce(self) -> float:
        """Sums gradients over replicas and returns their global norm, equal on all ranks. Updates nothing."""
        ...

    def update(self, learning_rate: float) -> None:
        """Clips the summed gradients, updates the weights, and clears the store."""
        ...

    def discard(self) -> None:
        """Discards the gradients, reduced or not, and clears the store. Nothing else changes."""
        ...

    def state(self) -> dict[str, Slice | Tensor]:
        """Returns this rank's state, to save or to fill in place, with names independent of the layout.

        `step` is a scalar. `<parameter>.exp_avg` and `.exp_avg_sq` are slices of the whole job's flattened parameter.
        So is `.master`, which exists only if the weights are not their own master copies.
        """
        ...

    def loaded(self) -> None:
        """Updates everything that depends on the tensors of `state`, after they were filled."""
        ...

    def follow_weights(self) -> None:
        """Updates everything that depends on the weights, after they were changed."""
        ...


def build_optimizer(
    groups: ParameterGroups, store: GradientStore, replicas: ReductionGroups, config: OptimConfig
) -> Optimizer:
    """Builds the optimizer that `config.sharding` selects."""
    match config.sharding:
        case "zero1":
            return Zero1AdamW(groups, store, replicas, config)
        case "replicated":
            return ReplicatedAdamW(groups, store, replicas, config)
        case _ as other:
            assert_never(other)
