"""Prepares the batches of a step, and reads the micro-batches of one rank."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from comm.protocol import SequenceParts
from data.loader import Batch, Loader
from model.objective import MicroBatch, find_target_rows
from model.router import Routes
from train.errors import PreemptedError
from train.replica import Replica
from train.tasks.registry import Task

Read = Callable[[int, int], Batch]
"""Returns sequences of a global batch, given the first one's index and their number."""


class BatchReader:
    """A reader of one rank's micro-batches of one step. Each micro-batch is read once.

    Only ranks with the first or the last stage read them, or every rank if attention masks documents. Ranks that share
    sequences keep their own tokens with their targets and extras. Documents stay those of whole sequences.
    """

    def __init__(self, replica: Replica, task: Task, read: Read) -> None:
        self._replica = replica
        self._task = task
        self._read = read
        self._known: dict[tuple[int, int], MicroBatch] = {}
        self._counts: dict[tuple[int, int], Tensor] = {}

    def __call__(self, direction: int, micro_batch: int) -> MicroBatch | None:
        """Returns the micro-batch, or None if this rank does not need it."""
        replica = self._replica
        batch = self._replica.config.batch
        model = self._replica.network
        if model.model.embed_tokens is None and model.output_head is None and not batch.document_mask:
            return None
        key = (direction, micro_batch)
        if key not in self._known:
            sequences = self._read(replica.first_sequence(direction, micro_batch), batch.micro_sequences)
            self._take_parts(direction, micro_batch - micro_batch % replica.schedule.slices, sequences)
        return self._known[key]

    def _take_parts(self, direction: int, first: int, sequences: Batch) -> None:
        """Keeps what this rank holds of sequences, as one micro-batch or a slice in each, and their counts."""
        replica = self._replica
        parts = self._replica.parts
        world = replica.world
        is_whole = len(parts.held) == 1
        # Sequences are split on the host, where target rows can be found without waiting for the device.
        whole = self._task.read(sequences, world.device if is_whole else torch.device("cpu"))
        if direction in replica.loss_directions and world.context_index == 0:
            self._counts[direction, first] = self._task.count(whole)
        for micro_batch in range(first, first + replica.schedule.slices):
            part = whole if is_whole else held_part(whole, parts, replica.part_of(micro_batch)).to(world.device)
            self._known[direction, micro_batch] = part

    def add_extras(self, name: str, found: Mapping[tuple[int, int], Tensor]) -> None:
        """Adds a further value of each token to micro-batches, by (direction, micro-batch)."""
        for place, extra in found.items():
            batch = self(*place)
            assert batch is not None
            self._known[place] = replace(batch, extras={**batch.extras, name: extra})

    def count(self) -> Tensor:
        """Returns the job's denominator of each loss, float64 on the host. All ranks call it.

        Raises:
            PreemptedError: on every rank, if one of them was preempted. No pass of the batch has started.
        """
        replica = self._replica
        world = self._replica.world
        counts = torch.zeros(len(self._task.names), dtype=torch.float64)
        for direction in replica.loss_directions:
            for micro_batch in replica.schedule.micro_batches_of(direction):
                batch = self(direction, micro_batch)
                assert batch is not None
                # The first part of a sequence counts all targets and the sequence itself.
                if (direction, micro_batch) in self._counts:
                    counts += self._counts[direction, micro_batch]
        # The preemption request shares this all-reduce, so that a step needs no other collective for it.
        requested = torch.tensor([world.preemption.is_requested], dtype=torch.float64)
        summed = world.reduce(torch.cat([counts, requested]), "sum of targets")
        if summed[-1]:
            raise PreemptedError(f"{int(summed[-1])} of {len(world.ranks)} ranks received a preemption request")
        return summed[:-1]


def held_part(whole: MicroBatch, parts: SequenceParts, index: int) -> MicroBatch:
    """Returns the part of a micro-batch that one of several ranks holds, or one of several slices.

    Inputs and targets were shifted over whole sequences, so MTP depths read and predict tokens of other parts.
    """
    targets = tuple(parts.take(targets_BT, index) for targets_BT in whole.targets_BT)
    return MicroBatch(
        inputs_BT=tuple(parts.take(inputs_BT, index) for inputs_BT in whole.inputs_BT),
        targets_BT=targets,
        documents=whole.documents,
        extras={name: parts.take(extra, index) for name, extra in whole.extras.items()},
        target_rows=tuple(find_target_rows(targets_BT) for targets_BT in targets) if whole.target_rows else (),
    )


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The batches of a step, whose gradients add up to one update; `metrics` is None without rollouts."""

    reads: tuple[Read, ...]
    metrics: Mapping[str, Any] | None = None
    routes: tuple[Routes | None, ...] = (None,)
    more_counts: Mapping[str, float] = field(default_factory=dict)


class TaskHook:
    """What a task does in a step besides its passes. This base class trains on the data alone.

    All ranks have one and call its methods at the same points.
    """

    def prepare(self, loader: Loader, step: int) -> StepBatch:
        """Returns the batches of a step, whose index counts from 0."""
        return StepBatch((partial(loader.batch, step),))

    def finish(self, earlier_seconds: float = 0.0) -> Mapping[str, float]:
        """Completes what must be on the disk before the update, and returns seconds by part."""
        return {}

    def validate(self) -> Mapping[str, float] | None:
        """Returns measurements of answers to held-out problems by name; None if held-out data are validated."""
        return None

    def roll_back(self, num_done: int) -> None:
        """Forgets what was prepared after `num_done` steps."""

    def close(self) -> None:
        """Closes what the hook opened. All ranks call it at the same point."""
