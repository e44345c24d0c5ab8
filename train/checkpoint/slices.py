"""Flat tensors that the whole job holds in runs: how a checkpoint can be read under another cut than wrote it."""

from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, TensorWriteData, WriteItem, WriteItemType

from train.checkpoint.dcp.records import RecordError


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """One rank's run of a flat tensor of `whole` elements, from `offset`; ranks may hold the same one.

    DCP's own protocol for what is stored in chunks (`torch.distributed._checkpointable`): a chunk that several ranks
    hold is written once, and whatever run is asked for is read out of the chunks that hold it.
    """

    whole: int
    offset: int
    local: Tensor

    def size(self) -> torch.Size:
        """Of the whole tensor."""
        return torch.Size([self.whole])

    def over(self, local: Tensor) -> "Slice":
        """The same run of elements in another tensor."""
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
    """Writes a state of tensors and slices."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor behind a name and an offset."""
        held = self.state_dict[index.fqn]
        return held.__get_tensor_shard__(index) if isinstance(held, Slice) else super().lookup_object(index)


class SliceLoadPlanner(DefaultLoadPlanner):
    """Fills a state of tensors and slices in place."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Takes the state as it is: what is neither tensor nor number, DCP would put None for."""
        super().set_up_planner({}, metadata, is_coordinator)
        self.original_state_dict = self.state_dict = state_dict

    def create_local_plan(self) -> LoadPlan:
        """Plans the reads.

        Raises:
            RecordError: the checkpoint holds no tensor under a name of the state.
        """
        stored = {} if self.metadata is None else self.metadata.state_dict_metadata
        for name in self.state_dict:
            if not isinstance(stored.get(name), TensorStorageMetadata):
                raise RecordError(
                    f"{name}: must be a tensor of the checkpoint, is {'no tensor' if name in stored else 'missing'}"
                )
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        """Refuses: torch would unpickle these bytes without restriction.

        Raises:
            RecordError: always.
        """
        raise RecordError(f"{read_item.dest_index.fqn}: must be a tensor, is something else")

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The tensor behind a name and an offset."""
        held = self.state_dict[index.fqn]
        return held.__get_tensor_shard__(index) if isinstance(held, Slice) else super().lookup_tensor(index)
