"""Puts a rank together: its part of the model as stages, its program, its links. The one place where `model` and
`dualpipe` meet."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from comm.groups import Groups
from comm.lane import Lane, open_lane
from comm.p2p import Transport
from comm.protocol import Dispatcher
from comm.select import build_dispatcher
from comm.traffic import Traffic
from dualpipe import pairing
from dualpipe.compile import compile_rank
from dualpipe.generate.select import build
from dualpipe.ir import Schedule
from dualpipe.passes import forward_only
from dualpipe.program import Program
from dualpipe.protocols import Stage as PipelineStage
from dualpipe.validate import validate
from model.cut import cut_layers
from model.gradients import GradientStore
from model.objective import LossSums, MicroBatch, Objective
from model.stage import Stage, StageRun
from model.transformer import Part, Transformer, initialise
from train.config import PrecisionConfig, TrainConfig
from train.optim.build import Optimiser, build_optimiser
from train.optim.parameters import Replicas, group_parameters

Batches = Callable[[int, int], MicroBatch | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembly:
    """A rank, ready to run steps. `programs` for training and for a forward pass only."""

    config: TrainConfig
    groups: Groups
    device: torch.device
    schedule: Schedule
    model: Transformer
    stages: dict[int, Stage]
    train_program: Program
    forward_program: Program
    transport: Transport
    lane: Lane
    traffic: Traffic
    store: GradientStore
    optimiser: Optimiser

    @property
    def holds_last(self) -> tuple[int, ...]:
        """Directions whose last stage is on this rank: where their losses live."""
        last = self.schedule.num_stages - 1
        pipeline = self.groups.pipeline_index
        return tuple(d for d in range(self.schedule.num_directions) if self.schedule.rank_of(d, last) == pipeline)

    def close(self) -> None:
        """Ends the lane's worker."""
        self.lane.close()


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
        return self._stage.start(batch, self._objective, self._sums, self._store)


def feed(
    assembly: Assembly, batches: Batches, objective: Objective, sums: LossSums, store: GradientStore | None
) -> dict[int, PipelineStage]:
    """The rank's stages for one step; without a store, for a forward pass only."""
    stages = assembly.stages.items()
    return {number: FedStage(stage, batches, objective, sums, store) for number, stage in stages}


def weight_dtype(precision: PrecisionConfig) -> torch.dtype:
    """The type of weights and activations."""
    return {"float64": torch.float64, "float32": torch.float32, "bf16": torch.bfloat16}[precision.kind]


def stage_part(config: TrainConfig, held: set[int], num_stages: int, experts: range) -> Part:
    """What of the model the given stages need."""
    model = config.model
    cut = cut_layers(model.num_layers, num_stages, model.mtp_depth)
    last = num_stages - 1 in held
    layers = [layer for stage in sorted(held) for layer in cut[stage]]
    if last:
        layers += range(model.num_layers, model.num_layers + model.mtp_depth)
    embedding = 0 in held or (last and model.mtp_depth > 0)
    return Part(layers=tuple(layers), experts=experts, embedding=embedding, head=last)


def assemble(config: TrainConfig, groups: Groups, device: torch.device) -> Assembly:
    """Builds everything that this rank runs, with the initial weights of the seed.

    Raises:
        ScheduleError: the schedule cannot be made or does not hold.
    """
    schedule = build(config.schedule.kind, config.parallelism.pipeline, config.num_micro_batches)
    validate(schedule)
    held = {stage for _, stage in schedule.stages_of(groups.pipeline_index)}
    lane, traffic = open_lane(device), Traffic()
    dispatcher = build_dispatcher(config.dispatch, config.model.num_routed_experts, groups, lane, traffic)
    model = _build_model(config, schedule, held, groups, dispatcher, device)
    cut = cut_layers(config.model.num_layers, schedule.num_stages, config.model.mtp_depth)
    stages = {
        number: Stage(model, cut[number], first=number == 0, last=number == schedule.num_stages - 1) for number in held
    }
    store = GradientStore(model.parameters())
    order = {"overlapped": pairing.overlapped, "sequential": pairing.sequential}[config.schedule.pairing]
    lanes = {number: stage.lanes for number, stage in stages.items()}
    stage_config = config.stage
    shape = (stage_config.micro_batch_sequences, stage_config.sequence_length_tokens, config.model.hidden_size)
    return Assembly(
        config=config,
        groups=groups,
        device=device,
        schedule=schedule,
        model=model,
        stages=stages,
        train_program=compile_rank(schedule, groups.pipeline_index, lanes, order),
        forward_program=compile_rank(forward_only(schedule), groups.pipeline_index, lanes, order),
        transport=Transport(groups, device, shape, weight_dtype(config.precision)),
        lane=lane,
        traffic=traffic,
        store=store,
        optimiser=build_optimiser(group_parameters(model), store, _replicas(groups), config.optim),
    )


def _build_model(
    config: TrainConfig,
    schedule: Schedule,
    held: set[int],
    groups: Groups,
    dispatcher: Dispatcher,
    device: torch.device,
) -> Transformer:
    per_rank = config.model.num_routed_experts // config.parallelism.expert
    first = groups.expert_index * per_rank
    part = stage_part(config, held, schedule.num_stages, range(first, first + per_rank))
    model = Transformer(config.model, dispatcher, weight_dtype(config.precision), part)
    initialise(model, config.seed)
    return model.to(device)


def _replicas(groups: Groups) -> Replicas:
    return Replicas(
        dense=groups.stage_replicas, experts=groups.expert_replicas, expert=groups.expert, world=groups.world
    )
