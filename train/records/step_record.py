"""Builds the record of a step over all ranks, and the pictures and profiles of chosen steps.

Ranks share the wall clock: each reports when its program began, and the steps' times count from then on. Between hosts
that is as good as their clocks agree. A device's first mark stands for the host's time at its launch, because the
device is idle then.

Shape legend: L layers, MTP modules among them, F fields of `LayerTraffic`.
"""

import logging
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from base.files import replace_text
from comm.dispatch.traffic import LayerTraffic, TrafficSnapshot
from comm.groups import make_group, open_communicators
from dualpipe.builder import Alternatives, by_makespan
from dualpipe.draw.entry import TimedSchedule, size, time_schedule
from dualpipe.draw.svg import svg
from dualpipe.draw.text import html
from dualpipe.draw.trace import trace
from dualpipe.ir import Schedule
from dualpipe.passes import ungroup
from dualpipe.runtime.execute import Execution
from dualpipe.runtime.measured import (
    LaneSpan,
    Measured,
    RankBusyTime,
    SpanLane,
    measured_costs,
    rank_busy_time,
    rank_spans,
    step_lanes,
)
from model.config import ModelConfig
from model.objective import BALANCE
from model.size import training_flops_per_token
from train.callbacks import add_metrics
from train.config import ProfileConfig, TrainConfig
from train.core.replica import Replica
from train.core.step import StepResult
from train.core.world import World
from train.files.run_files import redact
from train.predict.measured import (
    MeasuredRun,
    MeasuredTimes,
    TimesScope,
    layer_parameters,
    step_times,
    try_to_write,
)
from train.start.plan import excluded_schedules

_FIELDS = tuple(field.name for field in fields(LayerTraffic))
_RECEIVED = _FIELDS.index("num_bytes_from_nodes")
LOGGER = logging.getLogger("train")
SVG_NAME = "schedule.svg"
TRACE_NAME = "trace.json"
PAGE_NAME = "schedule.html"
_PROFILES = "profile"


def record_of(
    replica: Replica, watch: "PipelineTimeline", done: int, result: StepResult, peak_flops: float | None
) -> dict[str, Any]:
    """Returns the record of step `done`, from 1. All ranks call it. `peak_flops` is that of each rank."""
    world = replica.world
    model = replica.config.model
    mesh = replica.world.layout.parallelism
    use = watch.use(replica, result.execution)
    num_layers = model.num_layers + model.mtp_depth
    sent = traffic_parts(replica.observers.traffic.take(), replica.observers.clips.take(), num_layers)
    bias_LS = result.balance.bias_LS
    parts = [sent, _usage_parts(world, use), (bias_LS.new_empty(0), bias_LS.flatten())]
    sent, used, (_, bias) = world.reduce_parts(parts, "the step's record")
    exchange = exchange_metrics(*sent, num_layers, mesh.world_size)
    balance = replace(result.balance, bias_LS=bias.view_as(bias_LS))
    speed = result.tokens / result.seconds
    length = replica.config.batch.sequence_length_tokens
    losses = result.losses
    record = {
        "step": done,
        "global_batch_sequences": replica.global_sequences,
        "loss": losses.total,
        "main_loss": losses.main,
        "mtp_loss": losses.mtp,
        "balance_loss": losses.by_name[BALANCE],
        **losses.reported,
        **({} if losses.by_source is None else losses.by_source.record()),
        "grad_norm": result.grad_norm,
        "lr": result.rates.learning_rate,
        "mtp_loss_weight": result.rates.mtp_loss_weight,
        "bias_update_rate": result.rates.bias_update,
        "step_seconds": result.seconds,
        "tokens_per_second": speed,
        **mfu(model, length, speed, None if peak_flops is None else peak_flops * mesh.world_size),
        **_usage_metrics(world, *used, result),
        **balance.metrics(),
        **({} if result.rollouts is None else {"rollouts": dict(result.rollouts)}),
        **exchange,
    }
    return add_metrics(record)


def mfu(
    model: ModelConfig, sequence_length_tokens: int, tokens_per_second: float, peak_flops: float | None
) -> dict[str, float]:
    """Returns the model FLOPs utilization under the key `mfu`, or nothing if the peak is unknown.

    It counts the main model's forward and backward with causal attention halved, and no recomputation.
    """
    if peak_flops is None:
        return {}
    return {"mfu": training_flops_per_token(model, sequence_length_tokens) * tokens_per_second / peak_flops}


def _usage_parts(world: World, use: RankBusyTime) -> tuple[Tensor, Tensor]:
    """Returns this rank's sums and maxima for `_usage_metrics`, before their reduction."""
    peak_bytes = _peak_memory_bytes(world.device)
    slots = window_slots(use, world.layout.member_index(world.rank), world.layout.parallelism.stage_ranks)
    sums = [use.busy_seconds, use.exposed_seconds, peak_bytes]
    return torch.tensor(sums, dtype=torch.float64), torch.tensor([peak_bytes, *slots], dtype=torch.float64)


def _usage_metrics(world: World, sums: Tensor, maxima: Tensor, result: StepResult) -> dict[str, object]:
    """Returns peak memory, the bubble and the parts of the step's time, over all ranks."""
    mesh = world.layout.parallelism
    used_seconds, exposed, memory = sums.tolist()
    peak, *slots = maxima.tolist()
    return {
        "peak_memory_bytes": int(peak),
        "mean_peak_memory_bytes": int(memory / mesh.world_size),
        "pipeline_bubble": bubble_of(used_seconds, slots, mesh.pipeline),
        "step_time": _step_time(
            result, used_seconds, exposed, pipeline_seconds(slots) * mesh.pipeline, mesh.world_size
        ),
    }


def _step_time(result: StepResult, used: float, exposed: float, pipelines: float, world_size: int) -> dict[str, float]:
    """Returns the parts of a step's time in seconds, means over all ranks.

    Together they are `step_seconds`. Those of rollouts and of earlier batches are rank 0's. Arguments are summed over
    all ranks.
    """
    bubble = max(pipelines - used, 0.0)
    counted = result.update_seconds + (used + bubble) / world_size + sum(result.part_seconds.values())
    return {
        "compute_seconds": (used - exposed) / world_size,
        "exposed_exchange_seconds": exposed / world_size,
        "bubble_seconds": bubble / world_size,
        "optimizer_seconds": result.update_seconds,
        **{f"{part}_seconds": seconds for part, seconds in result.part_seconds.items()},
        "other_seconds": max(result.seconds - counted, 0.0),
    }


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def exchange_metrics(summed: Tensor, largest: Tensor, num_layers: int, world_size: int) -> dict[str, object]:
    """Returns metrics of the traffic of all ranks in a step, from `traffic_parts` reduced over all ranks.

    Returns totals of dispatch, combine and transfers, and under `exchange` an object for each layer that sent anything.
    NIC imbalance is the most bytes that a rank received from other nodes over the mean of the ranks that took part.
    """
    job = _job_traffic(summed, largest, num_layers)
    all_layers = job.traffic
    received = job.traffic.total.num_bytes_from_nodes
    return {
        "nodes_per_token": all_layers.total.nodes_per_token or 1.0,
        "inter_node_bytes": all_layers.num_bytes_across_nodes,
        "intra_node_bytes": all_layers.num_bytes_within_node,
        "lower_bound_share": all_layers.total.lower_bound_share,
        "nic_imbalance": _imbalance(job.most_received[-1], received, world_size),
        "clipped_tokens": sum(job.clipped),
        "exchange": {
            f"layer_{layer}": _layer_metrics(counts)
            | {
                "nic_imbalance": _imbalance(job.most_received[layer], counts.num_bytes_from_nodes, job.holders[layer]),
                "clipped_tokens": job.clipped[layer],
            }
            for layer, counts in all_layers.layers.items()
            if layer is not None
        },
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _JobTraffic:
    """Sums over all ranks, and the most bytes that one received from other nodes, by layer and in all."""

    traffic: TrafficSnapshot
    holders: list[int]
    clipped: list[int]
    most_received: list[float]


def traffic_parts(
    traffic: TrafficSnapshot, clipped: Mapping[int | None, int], num_layers: int
) -> tuple[Tensor, Tensor]:
    """Returns this rank's sums and maxima for `exchange_metrics`, before their reduction."""
    counts_LF = torch.zeros(num_layers, len(_FIELDS), dtype=torch.float64)
    held_L, clipped_L = torch.zeros(2, num_layers, dtype=torch.float64)
    for layer, counted in traffic.layers.items():
        assert layer is not None
        counts_LF[layer] = torch.tensor([getattr(counted, name) for name in _FIELDS], dtype=torch.float64)
        held_L[layer] = 1
    for layer, number in clipped.items():
        assert layer is not None
        clipped_L[layer] = number
    others = [
        traffic.num_message_bytes_within_node,
        traffic.num_message_bytes_across_nodes,
        traffic.num_context_bytes_within_node,
        traffic.num_context_bytes_across_nodes,
    ]
    messages = torch.tensor(others, dtype=torch.float64)
    received = counts_LF[:, _RECEIVED]
    largest = torch.cat([received, received.sum(0, keepdim=True)])
    return torch.cat([counts_LF.flatten(), held_L, clipped_L, messages]), largest


def _job_traffic(summed: Tensor, largest: Tensor, num_layers: int) -> _JobTraffic:
    num_counts = num_layers * len(_FIELDS)
    sizes = [num_counts, num_layers, num_layers, len(summed) - num_counts - 2 * num_layers]
    flat, *parts = summed.to(torch.int64).split(sizes)
    holders, clipped_of_all, (within, across, *context) = (part.tolist() for part in parts)
    rows = zip(flat.view(num_layers, len(_FIELDS)).tolist(), holders, strict=True)
    layers: dict[int | None, LayerTraffic] = {
        layer: LayerTraffic(**dict(zip(_FIELDS, row, strict=True)))
        for layer, (row, num_holders) in enumerate(rows)
        if num_holders
    }
    job_traffic = TrafficSnapshot(
        layers=layers,
        num_message_bytes_within_node=within,
        num_message_bytes_across_nodes=across,
        num_context_bytes_within_node=context[0],
        num_context_bytes_across_nodes=context[1],
    )
    return _JobTraffic(traffic=job_traffic, holders=holders, clipped=clipped_of_all, most_received=largest.tolist())


def _layer_metrics(counted: LayerTraffic) -> dict[str, object]:
    return {
        "rows_within_nodes": counted.num_rows_within_node,
        "rows_across_nodes": counted.num_rows_across_nodes,
        "bytes_within_nodes": counted.num_bytes_within_node,
        "bytes_across_nodes": counted.num_bytes_across_nodes,
        "predicted_rows_within_nodes": counted.predicted_rows_within_node,
        "predicted_rows_across_nodes": counted.predicted_rows_across_nodes,
        "predicted_bytes_within_nodes": counted.predicted_bytes_within_node,
        "predicted_bytes_across_nodes": counted.predicted_bytes_across_nodes,
        "nodes_per_token": counted.nodes_per_token,
        "lower_bound_share": counted.lower_bound_share,
    }


def _imbalance(most: float, total: float, num_ranks: float) -> float:
    return most * num_ranks / total if total else 1.0


class PipelineTimeline:
    """The measured times of this rank, and the gathering of those of the whole pipeline with data index 0."""

    def __init__(self, world: World, name: str, folder: Path) -> None:
        """Creates a group for the pipeline that is drawn. All ranks call it at the same point."""
        self._name = name
        self._folder = folder
        self._lanes: dict[int, tuple[SpanLane | None, ...]] = {}
        self._alternatives: dict[int, Alternatives] = {}
        self._group = make_group(world.layout.pipeline_group(0), world.timeout_seconds)
        if self._group is not None:
            open_communicators([self._group])

    def use(self, replica: Replica, execution: Execution) -> RankBusyTime:
        """Returns when this rank was busy in a step that the replica ran."""
        num_micro_batches = replica.schedule.num_micro_batches
        if num_micro_batches not in self._lanes:
            self._lanes[num_micro_batches] = step_lanes(replica.train_program)
        return rank_busy_time(self._lanes[num_micro_batches], execution.spans, execution.origin_seconds)

    def draw(self, replica: Replica, execution: Execution, step: int) -> bool:
        """Draws a step into the run's folder; returns True on rank 0, which writes. All ranks call it."""
        if self._group is None:
            return False
        schedule = replica.schedule
        if replica.config.pairing == "sequential":
            schedule = ungroup(schedule)
        rank = replica.world.pipeline_index
        groups = schedule.ranks[rank]
        rank_lanes = rank_spans(groups, replica.train_program, execution.spans, execution.origin_seconds)
        gathered: list[tuple[LaneSpan, ...]] | None = [()] * schedule.num_ranks if rank == 0 else None
        with replica.world.log.collective("pipeline", self._group, "gather of times"):
            dist.gather_object(rank_lanes, gathered, dst=0, group=self._group)
        if gathered is None:
            return False
        title = f"{redact(self._name)}, step {step}: {schedule.kind}, {size(schedule)}"
        try:
            measured = Measured(ranks=tuple(gathered))
            others = self._alternatives_of(replica)
            self._write_times(replica, schedule, measured, step)
            write_pictures(self._folder, title, schedule, measured, others)
        except OSError as error:  # the folder was deleted or the disk is full, which must not end the run
            LOGGER.warning("%s cannot be drawn: %s", SVG_NAME, error)
            return False
        return True

    def _write_times(self, replica: Replica, drawn_schedule: Schedule, measured: Measured, step: int) -> None:
        """Writes the times of the model's parts, from which `launch.plan` predicts steps."""
        config = replica.config
        batch = replica.config.batch
        mesh = replica.world.layout.parallelism
        scope = TimesScope(
            precision=config.precision.kind,
            layer_parameters=layer_parameters(config.model),
            expert=mesh.expert,
            tokens=batch.micro_sequences * batch.sequence_length_tokens // mesh.context,
            context=mesh.context,
            mtp_depth=config.model.mtp_depth,
            recomputed=config.computing.recomputed_names,
        )
        times = step_times(config.model, drawn_schedule, replica.cut, measured)
        record = MeasuredTimes(
            step=step,
            device="cuda" if replica.world.device.type == "cuda" else "cpu",
            cut=tuple(map(len, replica.cut)),
            scope=scope,
            measured=times,
        )
        try_to_write(self._folder, MeasuredRun(measured=record, schedule=replica.schedule))

    def _alternatives_of(self, replica: Replica) -> Alternatives:
        """Returns the other schedules for the replica's size. They are built for its first picture."""
        num_micro_batches = replica.schedule.num_micro_batches
        if num_micro_batches not in self._alternatives:
            model = replica.config.model
            excluded = excluded_schedules(model, replica.schedule.num_ranks)
            change = ungroup if replica.config.pairing == "sequential" else None
            self._alternatives[num_micro_batches] = Alternatives(excluded, change, model.num_layers)
        return self._alternatives[num_micro_batches]


def write_pictures(
    folder: Path, title: str, schedule: Schedule, measured: Measured, alternatives: Alternatives | None = None
) -> TimedSchedule:
    """Writes the planned and measured times as SVG, page and trace, each file completely or not at all.

    The plan is a simulation of `schedule`, which was run, with the measured times of its operations. The page compares
    `alternatives` with it under the same costs.
    """
    costs = measured_costs(schedule, measured)
    timed = time_schedule(schedule, costs, measured=measured)
    replace_text(folder / SVG_NAME, svg(schedule, timed.simulation, measured, title, bound=timed.bound) + "\n")
    replace_text(folder / TRACE_NAME, trace(schedule, timed.simulation, costs, measured, seconds_per_unit=1.0) + "\n")
    others = [] if alternatives is None else alternatives.timed(schedule, costs)
    replace_text(folder / PAGE_NAME, html(by_makespan([timed, *others]), title) + "\n")
    return timed


def window_slots(use: RankBusyTime, pipeline: int, num_pipelines: int) -> list[float]:
    """Returns the negated start and the end in this rank's slots, else -inf, for a maximum."""
    slots = [-float("inf")] * (2 * num_pipelines)
    slots[2 * pipeline : 2 * pipeline + 2] = [-use.start_seconds, use.end_seconds]
    return slots


def bubble_of(used_seconds: float, slots: Sequence[float], ranks_per_pipeline: int) -> float:
    """Returns the idle share of all ranks' time, over all pipelines.

    Time lasts from a pipeline's first rank to its last one. `slots` is the maximum over ranks of their `window_slots`,
    `used_seconds` the sum of their busy times.
    """
    total = ranks_per_pipeline * pipeline_seconds(slots)
    return max(0.0, 1.0 - used_seconds / total) if total > 0 else 0.0


def pipeline_seconds(slots: Sequence[float]) -> float:
    """Returns the sum of all pipelines' times from the maximum of all `window_slots`."""
    return sum(end + negated for negated, end in zip(slots[::2], slots[1::2], strict=True))


class StepProfiler:
    """The profiler of one rank. Steps that are not chosen cost nothing."""

    def __init__(self, config: ProfileConfig, out_dir: Path, rank: int, device: torch.device) -> None:
        self._config = config
        self._folder = out_dir / _PROFILES
        self._device = device
        self._rank = rank
        self._is_chosen = rank in config.ranks

    @contextmanager
    def step(self, done: int) -> Iterator[None]:
        """Profiles step number `done`, from 1, if it is chosen; a step that fails writes no files."""
        if not self._is_chosen or done not in self._config.steps:
            yield
            return
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:  # the run's folder was deleted, which must not end the run here
            LOGGER.warning("%s: step %d is not profiled: %s", self._folder, done, error)
            yield
            return
        with ExitStack() as stack:
            if self._config.memory_snapshot and self._device.type == "cuda":
                stack.enter_context(self._memory(done))
            if self._config.trace:
                stack.enter_context(self._trace(done))
            yield

    def path(self, done: int, ending: str) -> Path:
        """Returns the path of a step's file of this rank: `profile/step-00000005_rank-00000.trace.json.gz`."""
        return self._folder / f"step-{done:08d}_rank-{self._rank:05d}.{ending}"

    @contextmanager
    def _trace(self, done: int) -> Iterator[None]:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device.type == "cuda")
        with profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
            yield
        profiler.export_chrome_trace(str(self.path(done, "trace.json.gz")))

    @contextmanager
    def _memory(self, done: int) -> Iterator[None]:
        torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        try:
            yield
            torch.cuda.memory._dump_snapshot(str(self.path(done, "memory.pickle")))
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)


def profile_notice(config: TrainConfig) -> str:
    """Returns a line about what is profiled and what cannot be; empty if nothing is."""
    chosen = config.profile
    kinds = ["traces"] * chosen.trace
    missing = ""
    if chosen.memory_snapshot and config.cluster.device == "cuda":
        kinds.append("memory snapshots")
    elif chosen.memory_snapshot:
        missing = "; memory snapshots need cluster.device=cuda, and are not written on the CPU"
    if not chosen.steps or not (kinds or missing):
        return ""
    steps, ranks = (", ".join(map(str, numbers)) for numbers in (chosen.steps, chosen.ranks))
    return f"profile: {' and '.join(kinds) or 'nothing'} of steps {steps} on ranks {ranks} in {_PROFILES}/{missing}"
