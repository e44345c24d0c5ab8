"""Defines the state of a rank in a checkpoint, with names and slices independent of the layout."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from model.transformer import named_tensors
from train.checkpoint.index import PREFIXES

if TYPE_CHECKING:
    from train.learner import Learner, ParameterEma
    from train.post.frozen import Reference

OPTIMIZER_PREFIX = "optimizer."


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """One rank's consecutive elements of a flat tensor, from `offset`. Ranks may hold the same."""

    whole: int
    offset: int
    local: Tensor


def as_slice(values: Slice | Tensor) -> Slice:
    """Returns a slice unchanged, and a contiguous tensor as the slice of all its elements."""
    return values if isinstance(values, Slice) else Slice(values.numel(), 0, values.detach().view(-1))


State = dict[str, Slice | Tensor]


Extras = Mapping[str, "ParameterEma | Reference"]
"""Further state by the prefix of its names."""


def state_of(learner: "Learner", extras: Extras) -> State:
    """Returns weights, router bias, optimizer state and further state of this rank, not copies."""
    state: State = {PREFIXES["trained"] + name: tensor for name, tensor in named_tensors(learner.replica.model).items()}
    state |= {f"{OPTIMIZER_PREFIX}{name}": values for name, values in learner.optimizer.state().items()}
    for prefix, extra in extras.items():
        state |= {f"{prefix}.{name}": values for name, values in extra.state().items()}
    return state


class HostCopy:
    """Host memory for copies of a state. It is reused, because allocating it takes longer than filling it."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def of(self, state: State) -> State:
        """Copies a state to the host, and returns the copy, which is valid until the next call."""
        return {name: self._copy(name, values) for name, values in state.items()}

    def _copy(self, name: str, values: Slice | Tensor) -> Slice | Tensor:
        if isinstance(values, Slice):
            return replace(values, local=self._fill(name, values.local))
        return self._fill(name, values)

    def _fill(self, name: str, source: Tensor) -> Tensor:
        kept = self._kept.get(name)
        if kept is None or (kept.shape, kept.dtype) != (source.shape, source.dtype):
            kept = source.new_empty(source.shape, device="cpu", pin_memory=source.is_cuda)
            self._kept[name] = kept
        return kept.copy_(source.detach())
