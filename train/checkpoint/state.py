"""What a checkpoint holds of a rank, under names that no layout is part of."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from model.transformer import named_tensors
from train.checkpoint.reader import WEIGHTS_PREFIX
from train.checkpoint.slices import Slice
from train.learner import Learner

OPTIMISER_PREFIX = "optimiser."

State = dict[str, Slice | Tensor]


class Extra(Protocol):
    """Something else that a run keeps beside its weights, as an average of them."""

    def state(self) -> Mapping[str, Slice | Tensor]:
        """This rank's part to be saved, or to be filled in place, under names that are the same in every layout.

        A whole tensor is the same on all ranks that name it; a slice is one run of it.
        """
        ...

    def loaded(self) -> None:
        """Follows a change of the tensors of `state`. Not called where the checkpoint holds none of them."""
        ...


Extras = Mapping[str, Extra]
"""By the prefix that their names get."""


def state_of(learner: Learner, extras: Extras) -> State:
    """Weights, router bias, optimiser state and extras of this rank: the tensors themselves."""
    state: State = {f"{WEIGHTS_PREFIX}{name}": tensor for name, tensor in named_tensors(learner.replica.model).items()}
    state |= {f"{OPTIMISER_PREFIX}{name}": values for name, values in learner.optimiser.state().items()}
    for prefix, extra in extras.items():
        state |= {f"{prefix}.{name}": values for name, values in extra.state().items()}
    return state


class HostCopy:
    """Copies a state into memory of the host that is kept from one time to the next.

    Filling memory that is already there takes a fraction of the time of asking for it anew.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def of(self, state: State) -> State:
        """A copy, which stands until the next is asked for."""
        return {name: self._copy(name, values) for name, values in state.items()}

    def _copy(self, name: str, values: Slice | Tensor) -> Slice | Tensor:
        if isinstance(values, Slice):
            return values.over(self._fill(name, values.local))
        return self._fill(name, values)

    def _fill(self, name: str, source: Tensor) -> Tensor:
        kept = self._kept.get(name)
        if kept is None or (kept.shape, kept.dtype) != (source.shape, source.dtype):
            kept = source.new_empty(source.shape, device="cpu", pin_memory=source.is_cuda)
            self._kept[name] = kept
        return kept.copy_(source.detach())
