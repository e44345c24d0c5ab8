"""Puts a rank together: its part of the model as stages, its program, its links. The one place where `model` and
`dualpipe` meet."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from comm.dispatch.build import open_lane
from comm.dispatch.process_group import Observers
from comm.dispatch.traffic import Traffic
from comm.groups import Groups
from comm.lane import Lane
from comm.layout import Layout
from comm.preemption import Preemption
from comm.protocol import Dispatcher
from comm.watchdog.operation_log import OperationLog
from dualpipe.ir import Schedule, ScheduleError
from dualpipe.passes import forward_only
from dualpipe.runtime import pairing
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.program import Program
from dualpipe.runtime.protocols import Stage as PipelineStage
from dualpipe.validate import validate
from model.config import cut_layers
from model.gradients import GradientStore
from model.objective import LossSums, MicroBatch, Objective
from model.stage import Stage, StageRun
from model.transformer import Part, Transformer, initialise
from train.config import Precision, TrainConfig
from train.exchange import open_dispatcher
from train.optim.build import Optimiser, build_optimiser
from train.optim.ema import ParameterEma
from train.optim.parameters import Replicas, group_parameters
from train.schedule.links import PipelineLinks, open_links

Batches = Callable[[int, int], MicroBatch | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembly:
    """A rank, ready to run steps. `programs` for training and for a forward pass only; `preemption`: of its process."""

    config: TrainConfig
    layout: Layout
    groups: Groups
    device: torch.device
    schedule: Schedule
    model: Transformer
    stages: dict[int, Stage]
    train_program: Program
    forward_program: Program
    links: PipelineLinks
    lane: Lane
    dispatcher: Dispatcher
    observers: Observers
    store: GradientStore
    optimiser: Optimiser
    ema: ParameterEma | None
    preemption: Preemption = field(default_factory=Preemption)

    @property
    def holds_last(self) -> tuple[int, ...]:
        """Directions whose last stage is on this rank: where their losses live."""
        last = self.schedule.num_stages - 1
        pipeline = self.layout.pipeline_index(self.groups.rank)
        return tuple(d for d in range(self.schedule.num_directions) if self.schedule.rank_of(d, last) == pipeline)

    @property
    def extras(self) -> dict[str, ParameterEma]:
        """What is saved beside weights and optimiser state, by the prefix of its names."""
        return {} if self.ema is None else {"ema": self.ema}

    def close(self) -> None:
        """Ends the workers of average, lane and links, and the exchange; every rank at the same point.

        Not for the way out of an error, when peers may never answer.
        """
        if self.ema is not None:
            self.ema.close()
        self.lane.close()
        self.dispatcher.close()
        self.links.close()


class FedStage:
    """A model's stage with what it needs of one step: micro-batches, objective, sums, and where gradients go."""

    def __init__(
        self, stage: Stage, batches: Batches, objective: Objective, sums: LossSums, store: GradientStore | None
    ) -> None:
        self.lanes = stage.lanes
        self._stage = stage
        self._batches = batches
        self._objective = objective
        self._sums = sums
        self._store = store

    def start(self, direction: int, micro_batch: int) -> StageRun:
        """Begins a micro-batch."""
        batch = self._batches(direction, micro_batch)
        return self._stage.start(
            batch, self._objective, self._sums, self._store, direction=direction, micro_batch=micro_batch
        )


def feed(
    assembly: Assembly, batches: Batches, objective: Objective, sums: LossSums, store: GradientStore | None
) -> dict[int, PipelineStage]:
    """The rank's stages for one step; without a store, for a forward pass only."""
    stages = assembly.stages.items()
    return {number: FedStage(stage, batches, objective, sums, store) for number, stage in stages}


def weight_dtype(precision: Precision) -> torch.dtype:
    """The type of weights and activations."""
    return {"float64": torch.float64, "float32": torch.float32}.get(precision.kind, torch.bfloat16)


def is_mirrored(schedule: Schedule) -> bool:
    """Whether pipeline ranks p and P-1-p hold the same stages.

    Raises:
        ScheduleError: other ranks than those share a stage, whose gradients would not be summed.
    """
    down, *up = schedule.placement
    if any(row != down[::-1] for row in up) or (up and len(set(down)) < len(down)):
        raise ScheduleError(
            f"placement: of two directions, the second must be the first read backwards, with one stage for each rank, "
            f"is {schedule.placement}"
        )
    return bool(up)


def stage_part(config: TrainConfig, held: set[int], num_stages: int, experts: range) -> Part:
    """What of the model the given stages need."""
    model = config.model
    cut = cut_layers(model.num_layers, num_stages, model.mtp_depth)
    last = num_stages - 1 in held
    layers = [layer for stage in sorted(held) for layer in cut[stage]]
    if last:
        layers += range(model.num_layers, model.num_layers + model.mtp_depth)
    # MTP modules share the embedding, which no other rank than its own could sum up.
    assert not last or not model.mtp_depth or 0 in held
    return Part(layers=tuple(layers), experts=experts, embedding=0 in held, head=last)


def assemble(
    config: TrainConfig,
    layout: Layout,
    groups: Groups,
    device: torch.device,
    schedule: Schedule,
    log: OperationLog,
    preemption: Preemption | None = None,
) -> Assembly:
    """Builds everything that this rank runs, with the initial weights of the seed.

    Args:
        config: of the run; equal on all ranks, as is the schedule.
        layout: of the world.
        groups: mirrored where the schedule is.
        device: of this rank.
        schedule: of the configured number of pipeline ranks and micro-batches.
        log: of what this rank does with others.
        preemption: of this process, where anybody may ask it to make room.

    Raises:
        ScheduleError: the schedule does not hold.
    """
    assert schedule.num_ranks == config.parallelism.pipeline
    assert schedule.num_micro_batches == config.num_micro_batches
    pipeline_rank = layout.pipeline_index(groups.rank)
    lane, observers = open_lane(device), Observers(Traffic(), log)
    dispatcher = open_dispatcher(config, layout, groups.expert, lane, observers)
    held = {stage for _, stage in schedule.stages_of(pipeline_rank)}
    part = stage_part(config, held, schedule.num_stages, held_experts(config, layout.expert_index(groups.rank)))
    model = _build_model(config, dispatcher, part, device)
    stages = _build_stages(config, model, held, schedule.num_stages)
    store = GradientStore(model.parameters())
    train_program, forward_program = compile_programs(config, schedule, pipeline_rank, stages)
    optimiser = build_optimiser(group_parameters(model), store, _replicas(groups), config.optim)
    return Assembly(
        config=config,
        layout=layout,
        groups=groups,
        device=device,
        schedule=schedule,
        model=model,
        stages=stages,
        train_program=train_program,
        forward_program=forward_program,
        links=open_links(config, layout, groups.rank, device, observers, schedule, weight_dtype(config.precision)),
        lane=lane,
        dispatcher=dispatcher,
        observers=observers,
        store=store,
        optimiser=optimiser,
        ema=None if config.ema.decay is None else ParameterEma(model, config.ema.decay),
        preemption=preemption or Preemption(),
    )


def compile_programs(
    config: TrainConfig, schedule: Schedule, pipeline_rank: int, stages: Mapping[int, Stage]
) -> tuple[Program, Program]:
    """A pipeline rank's programs for training and for a forward pass only.

    Raises:
        ScheduleError: the schedule does not hold.
    """
    validate(schedule)
    forwards = forward_only(schedule)
    validate(forwards, forward_only=True)
    order = {"overlapped": pairing.overlapped, "sequential": pairing.sequential}[config.schedule.pairing]
    lanes = {number: stage.lanes for number, stage in stages.items()}
    return compile_rank(schedule, pipeline_rank, lanes, order), compile_rank(forwards, pipeline_rank, lanes, order)


def _build_model(config: TrainConfig, dispatcher: Dispatcher, part: Part, device: torch.device) -> Transformer:
    model = Transformer(config.model, dispatcher, weight_dtype(config.precision), part, config.computing)
    initialise(model, config.seed)
    return model.to(device)


def _build_stages(config: TrainConfig, model: Transformer, held: set[int], num_stages: int) -> dict[int, Stage]:
    cut = cut_layers(config.model.num_layers, num_stages, config.model.mtp_depth)
    return {
        number: Stage(model, cut[number], first=number == 0, last=number == num_stages - 1) for number in sorted(held)
    }


def held_experts(config: TrainConfig, expert_index: int) -> range:
    """The routed experts of every layer that a place in the expert group holds."""
    per_rank = config.model.num_routed_experts // config.parallelism.expert
    return range(expert_index * per_rank, (expert_index + 1) * per_rank)


def _replicas(groups: Groups) -> Replicas:
    return Replicas(dense=groups.stage, experts=groups.expert_data, expert=groups.expert, world=groups.world)
