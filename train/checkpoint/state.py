"""Defines the state of a rank in a checkpoint, with names and slices independent of the layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, TensorWriteData, WriteItem, WriteItemType

from model.transformer import named_tensors
from train.checkpoint.dcp.records import RecordError

if TYPE_CHECKING:
    from train.learner import Learner

WEIGHTS_PREFIX = "weights."
OPTIMIZER_PREFIX = "optimizer."
_LONGEST_TEXT = 120


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """One rank's consecutive elements of a flat tensor, from `offset` on.

    Several ranks may hold the same slice. It implements DCP's protocol for chunked storage
    (`torch.distributed._checkpointable`). DCP writes a chunk that several ranks hold once, and reads any range of
    elements from the chunks that contain it.

    Attributes:
        whole: number of elements of the whole tensor.
        offset: index of the first element.
        local: this rank's elements, flat.
    """

    whole: int
    offset: int
    local: Tensor

    def size(self) -> torch.Size:
        """Returns the size of the whole tensor."""
        return torch.Size([self.whole])

    def over(self, local: Tensor) -> "Slice":
        """Returns the same slice with other values."""
        return Slice(self.whole, self.offset, local)

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        (chunk,) = self.__create_chunk_list__()
        properties = TensorProperties.create_from_tensor(self.local)
        data = TensorWriteData(chunk=chunk, properties=properties, size=self.size())
        return [WriteItem(index=MetadataIndex(fqn, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=torch.Size([self.offset]), sizes=self.local.shape)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset == torch.Size([self.offset]), index
        return self.local


class SliceSavePlanner(DefaultSavePlanner):
    """The planner for writing a state of tensors and slices."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Returns the tensor of a name and an offset."""
        held = self.state_dict[index.fqn]
        return held.__get_tensor_shard__(index) if isinstance(held, Slice) else super().lookup_object(index)


class SliceLoadPlanner(DefaultLoadPlanner):
    """The planner for filling a state of tensors and slices in place."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Uses the state unchanged. DCP would replace everything that is neither tensor nor number by None."""
        super().set_up_planner({}, *args, **kwargs)
        self.original_state_dict = self.state_dict = state_dict

    def create_local_plan(self) -> LoadPlan:
        """Plans the reads.

        Raises:
            RecordError: the checkpoint holds no tensor for a name of the state.
        """
        stored = {} if self.metadata is None else self.metadata.state_dict_metadata
        for name in self.state_dict:
            if not isinstance(stored.get(name), TensorStorageMetadata):
                raise RecordError(
                    f"{name}: must be a tensor of the checkpoint, is {'no tensor' if name in stored else 'missing'}"
                )
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        """Refuses to load bytes, because torch would unpickle them without restriction.

        Raises:
            RecordError: always.
        """
        raise RecordError(f"{read_item.dest_index.fqn}: must be a tensor, is something else")

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Returns the tensor of a name and an offset."""
        held = self.state_dict[index.fqn]
        return held.__get_tensor_shard__(index) if isinstance(held, Slice) else super().lookup_tensor(index)


State = dict[str, Slice | Tensor]


class Extra(Protocol):
    """The protocol of further state that a run saves, such as a moving average of the weights."""

    def state(self) -> Mapping[str, Slice | Tensor]:
        """Returns this rank's part, to save or to fill in place, under names that do not depend on the layout.

        A whole tensor is equal on all ranks that return it. A slice holds some of its elements.
        """
        ...

    def loaded(self) -> None:
        """Updates what depends on the tensors of `state`, after they were filled from a checkpoint."""
        ...


Extras = Mapping[str, Extra]
"""Further state by the prefix of its names."""


def state_of(learner: "Learner", extras: Extras) -> State:
    """Returns weights, router bias, optimizer state and further state of this rank, not copies."""
    state: State = {f"{WEIGHTS_PREFIX}{name}": tensor for name, tensor in named_tensors(learner.replica.model).items()}
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
            return values.over(self._fill(name, values.local))
        return self._fill(name, values)

    def _fill(self, name: str, source: Tensor) -> Tensor:
        kept = self._kept.get(name)
        if kept is None or (kept.shape, kept.dtype) != (source.shape, source.dtype):
            kept = source.new_empty(source.shape, device="cpu", pin_memory=source.is_cuda)
            self._kept[name] = kept
        return kept.copy_(source.detach())


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, truncated to `_LONGEST_TEXT` characters."""
    return (next(iter(str(error).strip().splitlines()), "") or type(error).__name__)[:_LONGEST_TEXT]
