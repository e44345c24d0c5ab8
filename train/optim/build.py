"""The optimiser that a run asks for."""

from typing import Any, Protocol, assert_never

from model.gradients import GradientStore
from train.config import OptimConfig
from train.optim.parameters import ParameterGroups, Replicas
from train.optim.replicated import ReplicatedAdamW
from train.optim.zero1 import Zero1AdamW


class Optimiser(Protocol):
    """Applies the gradients in a store to the weights."""

    def step(self, learning_rate: float) -> float:
        """One update; returns the global gradient norm before clipping. The store is cleared."""
        ...

    def state(self) -> dict[str, Any]:
        """The rank's state as tensors to be saved, or to be filled in place."""
        ...

    def loaded(self) -> None:
        """Follows a change of the tensors of `state`."""
        ...

    def follow_weights(self) -> None:
        """Follows a change of the weights themselves."""
        ...


def build_optimiser(
    groups: ParameterGroups, store: GradientStore, replicas: Replicas, config: OptimConfig
) -> Optimiser:
    """By `config.sharding`."""
    match config.sharding:
        case "zero1":
            return Zero1AdamW(groups, store, replicas, config)
        case "replicated":
            return ReplicatedAdamW(groups, store, replicas, config)
        case _ as other:
            assert_never(other)
