"""Runs a network on this rank as stages, programs and links. `model` and `dualpipe` meet only here."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from comm.context_group import open_context
from comm.dispatch.process_group import Observers
from comm.protocol import Dispatcher, SequenceParts
from data.loader import Batch, Loader
from dualpipe.ir import Schedule, ScheduleError, linked_pairs
from dualpipe.passes import forward_only
from dualpipe.runtime import pairing as pairings
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.execute import Execution, execute, open_clock
from dualpipe.runtime.program import Action, PipelineStage, Program, RunKey, Step, with_reductions
from dualpipe.validate import validate_passes
from model.linear import GradientStore
from model.objective import BALANCE, LossSums, MicroBatch, Objective, find_target_rows
from model.phases import HostMemoryLink
from model.router import Routes
from model.slices import SlicedRuns
from model.stage import Stage, StageRun
from model.transformer import Transformer
from train.core.world import (
    PipelineLinks,
    ReplicaConfig,
    World,
    build_model,
    build_stages,
    held_experts,
    link_shapes,
    open_links,
    sequence_parts,
    stage_part,
    weight_dtype,
)
from train.errors import PreemptedError
from train.optim.staged import WeightUpdates
from train.tasks.registry import Task

Batches = Callable[[int, int], MicroBatch | None]
"""Returns the micro-batch of a direction and number, or None if this rank does not need it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """A network that runs training steps and passes. `network` may still change; `model` waits."""

    world: World
    config: ReplicaConfig
    network: Transformer
    weight_updates: WeightUpdates
    schedule: Schedule
    cut: tuple[range, ...]
    stages: dict[int, Stage]
    train_program: Program
    forward_program: Program
    links: PipelineLinks
    dispatcher: Dispatcher
    observers: Observers

    @property
    def model(self) -> Transformer:
        """This rank's part of the network, after all updates of its weights are complete."""
        self.weight_updates.wait_all()
        return self.network

    @property
    def loss_directions(self) -> tuple[int, ...]:
        """The directions with their last stage, and so their losses, on this rank."""
        last = self.schedule.num_stages - 1
        directions = range(self.schedule.num_directions)
        return tuple(d for d in directions if self.schedule.rank_of(d, last) == self.world.pipeline_index)

    @property
    def parts(self) -> SequenceParts:
        """Which tokens of a sequence each rank of the context group holds of each slice."""
        return sequence_parts(self.config, self.world.layout.parallelism.context, self.schedule.slices)

    def part_of(self, micro_batch: int) -> int:
        """Returns the index of the part of its sequences that a micro-batch holds on this rank."""
        context = self.world.layout.parallelism.context
        return micro_batch % self.schedule.slices * context + self.world.context_index

    @property
    def global_sequences(self) -> int:
        """The number of sequences in a global batch of this schedule."""
        schedule = self.schedule
        per_pipeline = schedule.num_micro_batches // schedule.slices * self.config.batch.micro_sequences
        return per_pipeline * self.world.layout.parallelism.data

    def train(
        self,
        batches: Batches,
        objective: Objective,
        sums: LossSums,
        store: GradientStore,
        follow: Callable[[tuple[Step, ...]], Iterable[Step]] = iter,
        routes: Routes | None = None,
        reduce: Callable[[int], None] = lambda stage: None,
    ) -> Execution:
        """Runs forward and backward of a global batch; `reduce` starts to reduce the gradients of a stage."""
        stages = self.bind_stages(batches, objective, sums, store, routes)
        with self.network.weights_unchanged():
            execution = execute(self.train_program, stages, self.links, open_clock(self.world.device), follow, reduce)
            store.receive()
        return execution

    def forward(
        self, batches: Batches, objective: Objective, sums: LossSums, routes: Routes | None = None
    ) -> Execution:
        """Runs forward of a global batch, and adds the losses to `sums`."""
        stages = self.bind_stages(batches, objective, sums, None, routes)
        with self.network.weights_unchanged():
            return execute(self.forward_program, stages, self.links, open_clock(self.world.device))

    def record(
        self, batches: Batches, objective: Objective, routes: Routes | None = None
    ) -> dict[tuple[int, int], Tensor]:
        """Runs forward, and returns what an objective records, [B, T, ...] by direction and micro-batch."""
        sums = LossSums((BALANCE,), {})
        self.forward(batches, objective, sums, routes)
        self.discard_counts()
        return sums.log_probs or {}

    def gather(self, values: Mapping[tuple[int, int], Tensor], width: Sequence[int] = ()) -> Tensor:
        """Returns what all ranks recorded, [B, T, ...] in batch order, float64 on the host. All ranks call it."""
        batch = self.config.batch
        shape = (self.global_sequences, batch.sequence_length_tokens, *width)
        found_BT = torch.zeros(shape, dtype=torch.float64)
        for (direction, micro_batch), values_BT in values.items():
            first = self.first_sequence(direction, micro_batch)
            rows_BT = found_BT[first : first + batch.micro_sequences]
            self.parts.put(values_BT.cpu(), self.part_of(micro_batch), rows_BT)  # host sync
        # One rank holds the value of a token; all others add zeros.
        return self.world.reduce(found_BT, "values of tokens")

    def first_sequence(self, direction: int, micro_batch: int) -> int:
        """Returns the index in the global batch of the first sequence of one of this rank's micro-batches."""
        schedule = self.schedule
        before = sum(len(schedule.micro_batches_of(earlier)) for earlier in range(direction))
        index = self.world.data_index * schedule.num_micro_batches + before + micro_batch
        return index // schedule.slices * self.config.batch.micro_sequences

    def discard_counts(self) -> None:
        """Forgets the traffic since the last record of a step, which must count the training pass alone."""
        self.observers.traffic.take()
        self.observers.clips.take()

    def bind_stages(
        self,
        batches: Batches,
        objective: Objective,
        sums: LossSums,
        store: GradientStore | None,
        routes: Routes | None = None,
    ) -> dict[int, PipelineStage]:
        """Returns the stages bound to one step's batches and objective. Without a store they only run forward.

        A stage waits for its weights before its first micro-batch.
        """
        steps = () if store is None else self.train_program.steps
        step = _StepInputs(
            batches=batches,
            objective=objective,
            sums=sums,
            store=store,
            routes=routes,
            offloaded=frozenset(step.run for step in steps if step.action is Action.OFFLOAD),
            link=self.world.host_copies,
        )
        parts = self.parts
        slices = self.schedule.slices
        wait = self.weight_updates.wait
        return {
            number: _BoundStage(number, stage, step, SlicedRuns(parts, slices), partial(wait, number))
            for number, stage in self.stages.items()
        }

    def with_schedule(self, schedule: Schedule, *, is_proven: bool = False) -> "Replica":
        """Returns the same network under another schedule, with the same stages and links.

        Raises:
            ScheduleError: the schedule is not valid, or places stages or messages on other ranks.
        """
        current = self.schedule
        if schedule.placement != current.placement or not set(linked_pairs(schedule)) <= set(linked_pairs(current)):
            raise ScheduleError(
                f"batch.ramp: every size must place its stages on the same ranks as {current.num_micro_batches} "
                f"micro-batches do, {schedule.num_micro_batches} micro-batches place them elsewhere"
            )
        programs = compile_programs(
            schedule, self.config.pairing, self.world.pipeline_index, self.stages, is_proven=is_proven
        )
        return replace(self, schedule=schedule, train_program=programs[0], forward_program=programs[1])

    def close(self) -> None:
        """Closes dispatcher and links. All ranks call it, but not after an error: peers may be gone."""
        self.dispatcher.close()
        self.links.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class _StepInputs:
    """What all stages of one step share, and the runs that the link offloads to host memory."""

    batches: Batches
    objective: Objective
    sums: LossSums
    store: GradientStore | None
    routes: Routes | None
    offloaded: frozenset[RunKey]
    link: HostMemoryLink


class _BoundStage:
    """A model's stage, bound to the micro-batches, objective, loss sums and gradient store of one step."""

    def __init__(
        self, number: int, stage: Stage, step: _StepInputs, places: SlicedRuns, wait_for_weights: Callable[[], None]
    ) -> None:
        self.lanes = stage.lanes
        self._number = number
        self._stage = stage
        self._step = step
        self._places = places
        self._wait_for_weights = wait_for_weights

    def start(self, direction: int, micro_batch: int) -> StageRun:
        """Starts a micro-batch, after the last update of the stage's weights."""
        self._wait_for_weights()
        step = self._step
        is_offloaded = RunKey(direction, self._number, micro_batch) in step.offloaded
        return self._stage.start(
            step.batches(direction, micro_batch),
            step.objective,
            step.sums,
            step.store,
            place=self._places.place(direction, micro_batch),
            routes=step.routes,
            link=step.link if is_offloaded else None,
        )


def open_replica(
    world: World, config: ReplicaConfig, schedule: Schedule, cut: tuple[range, ...], *, is_proven: bool = False
) -> Replica:
    """Builds this rank's part of a network with the initial weights of the seed. All ranks call it.

    The groups of the world are mirrored if the schedule is. A schedule that is not proven is validated.
    """
    assert schedule.num_ranks == world.layout.parallelism.pipeline
    assert schedule.num_stages == len(cut)
    observers = world.observers()
    stage_numbers = {stage for _, stage in schedule.stages_of(world.pipeline_index)}
    num_parts = world.layout.parallelism.expert
    experts = held_experts(config.model, num_parts, world.layout.expert_index(world.rank))
    dispatcher = world.open_dispatcher(config.dispatch, len(experts) * num_parts, observers, config.tokens)
    part = stage_part(config.model, stage_numbers, cut, experts)
    model = build_model(
        config, dispatcher, part, world.device, open_context(world.groups.context, world.layout, observers)
    )
    stages = build_stages(model, stage_numbers, cut)
    train_program, forward_program = compile_programs(
        schedule, config.pairing, world.pipeline_index, stages, is_proven=is_proven
    )
    parts = sequence_parts(config, world.layout.parallelism.context, schedule.slices)
    shapes = link_shapes(config, parts, schedule.slices)
    return Replica(
        world=world,
        config=config,
        network=model,
        weight_updates=WeightUpdates(),
        schedule=schedule,
        cut=cut,
        stages=stages,
        train_program=train_program,
        forward_program=forward_program,
        links=open_links(world, observers, schedule, shapes, weight_dtype(config.precision)),
        dispatcher=dispatcher,
        observers=observers,
    )


def compile_programs(
    schedule: Schedule,
    pairing: Literal["overlapped", "sequential"],
    pipeline_rank: int,
    stages: Mapping[int, Stage],
    *,
    is_proven: bool = False,
) -> tuple[Program, Program]:
    """Compiles programs for training and for forward alone; validates an unproven schedule.

    Raises:
        ScheduleError: the schedule is not valid.
    """
    if not is_proven:
        validate_passes(schedule)
    forwards = forward_only(schedule)
    order = {"overlapped": pairings.overlapped, "sequential": pairings.sequential}[pairing]
    lanes = {number: stage.lanes for number, stage in stages.items()}
    training = with_reductions(compile_rank(schedule, pipeline_rank, lanes, order))
    return training, compile_rank(forwards, pipeline_rank, lanes, order)


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
        self._sources: dict[tuple[int, int], Tensor] = {}

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
        # Targets are counted, and sequences are split, on the host, without waiting for the device.
        batch = self._task.read(sequences, torch.device("cpu"))
        if direction in replica.loss_directions and world.context_index == 0:
            self._counts[direction, first] = self._task.count(batch)
        for micro_batch in range(first, first + replica.schedule.slices):
            if sequences.sources_B is not None:
                self._sources[direction, micro_batch] = sequences.sources_B
            part = batch if is_whole else held_part(batch, parts, replica.part_of(micro_batch))
            self._known[direction, micro_batch] = part.to(world.device)

    def sources_of(self, direction: int, micro_batch: int) -> Tensor:
        """Returns the source of each sequence of a micro-batch that was read, on the host."""
        return self._sources[direction, micro_batch]

    def add_extras(self, name: str, found: Mapping[tuple[int, int], Tensor]) -> None:
        """Adds a further value of each token to micro-batches, by (direction, micro-batch)."""
        for key, extra in found.items():
            batch = self(*key)
            assert batch is not None
            self._known[key] = replace(batch, extras={**batch.extras, name: extra})

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
    """Returns the part of a micro-batch that one of several ranks holds of one of several slices.

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
    """The batches of a step with one update; `metrics` is None without rollouts."""

    reads: tuple[Read, ...]
    metrics: Mapping[str, Any] | None = None
    routes: tuple[Routes | None, ...] = (None,)
    more_counts: Mapping[str, float] = field(default_factory=dict)


class TaskHook:
    """What a task does in a step besides its passes. This base class trains on the data alone.

    All ranks have one and call its methods at the same points.
    """

    def prepare(self, loader: Loader, step: int) -> StepBatch:
        """Returns the batches of a step. Its index counts from 0."""
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
