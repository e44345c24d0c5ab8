"""Chooses a run's schedule: the checkpoint's, the configured one, or the best for measured times."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed as dist

from comm.layout import Layout
from dualpipe.generate.cache import schedules_folder
from dualpipe.ir import Schedule, ScheduleError, from_json, to_json
from dualpipe.registry import SCHEDULES, build
from dualpipe.simulate.choose import choose, survey
from dualpipe.simulate.costs import CostModel
from dualpipe.validate import validate
from model.config import CutError, ModelConfig, cut_layers
from train.checkpoint.locate import locate
from train.checkpoint.manifest import SCHEDULE_NAME, CheckpointError, layout_record, read_manifest
from train.config import TrainConfig
from train.memory.predict import ramp_memory_cap
from train.schedule.layer_times import LayerTimes, stage_costs
from train.schedule.nominal import nominal_costs, num_stages, run_stages
from train.schedule.probe import measure
from train.schedule.ramp import sized_run

_LARGEST_SCHEDULE_BYTES = 2**28


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The schedule of a run, why it was chosen, and the schedules of the other sizes of a batch ramp."""

    schedule: Schedule
    reason: str
    ramp: Mapping[int, Schedule]


def plan(config: TrainConfig, layout: Layout, device: torch.device) -> Plan:
    """Chooses the schedule on rank 0 and broadcasts it.

    All ranks call it at the same point, before groups are created.

    Raises:
        ScheduleError: on rank 0, if the schedule cannot be built.
    """
    times = None
    if config.schedule.kind == "auto" and _begun(config) is None:
        times = measure(config, layout, device)
    sent: list[tuple[str, str, dict[int, str]] | None] = [None]
    if dist.get_rank() == 0:
        schedule, reason = _decide(config, times)
        sent[0] = to_json(schedule), reason, {size: to_json(made) for size, made in ramp_schedules(config).items()}
    dist.broadcast_object_list(sent, src=0)
    assert sent[0] is not None
    text, reason, ramp = sent[0]
    return Plan(
        schedule=from_json(text), reason=reason, ramp={size: from_json(schedule) for size, schedule in ramp.items()}
    )


def ramp_schedules(config: TrainConfig) -> dict[int, Schedule]:
    """Returns the schedule of every size of the batch ramp except the last, by the size in sequences.

    Raises:
        ScheduleError: one of them cannot be built.
    """
    pipeline = config.parallelism.pipeline
    *smaller, _ = config.batch_sizes.sizes
    made = {}
    for sequences in smaller:
        sized = sized_run(config, sequences)
        kind = sized.schedule.kind
        assert kind != "auto"
        costs = nominal_costs(config, run_stages(sized, kind))
        cache = schedules_folder(config.data.cache_dir)
        made[sequences] = build(kind, pipeline, sized.num_micro_batches, costs, ramp_memory_cap(sized), cache)
    return made


def _decide(config: TrainConfig, times: LayerTimes | None) -> tuple[Schedule, str]:
    pipeline, micro_batches, kind = config.parallelism.pipeline, config.num_micro_batches, config.schedule.kind
    begun = _begun(config)
    if begun is not None:
        return read_schedule(begun, config), f"the schedule of {begun.parent}"
    if kind != "auto":
        costs = nominal_costs(config, run_stages(config, kind))
        made = build(kind, pipeline, micro_batches, costs, config.memory_cap, schedules_folder(config.data.cache_dir))
        return made, "the configured one"
    assert times is not None

    def costs_of(num_stages: int) -> CostModel:
        return stage_costs(times, config, num_stages)

    excluded = excluded_schedules(config.model, pipeline, config.schedule.chunks)
    cache = schedules_folder(config.data.cache_dir)
    rows = survey(
        pipeline,
        micro_batches,
        costs_of,
        config.memory_cap,
        cache,
        excluded,
        chunks=config.schedule.chunks,
        most_stages=config.model.num_layers,
    )
    choice = choose(rows, config.memory_cap)
    return choice.schedule, f"the best for the measured seconds: {choice.reason}"


def _begun(config: TrainConfig) -> Path | None:
    """Returns the schedule file of the checkpoint from which the run resumes, if its layout is the same.

    Another schedule would sum gradients in another order, so the run would not be bitwise equal.
    """
    if config.resume is None:
        return None
    folder = locate(config.resume).folder
    path = folder / SCHEDULE_NAME
    is_same = read_manifest(folder).get("layout") == layout_record(config)
    return path if is_same and path.is_file() else None


def read_schedule(path: Path, config: TrainConfig) -> Schedule:
    """Reads and validates the schedule of a checkpoint. Ranks that followed an invalid one would deadlock.

    Raises:
        CheckpointError: it is not valid, or has another number of ranks or micro-batches.
    """
    ranks, micro_batches = config.parallelism.pipeline, config.num_micro_batches
    rule = f"must be a valid schedule of {ranks} pipeline ranks and {micro_batches} micro-batches"
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_SCHEDULE_BYTES:
            raise ScheduleError(f"not a file of at most {_LARGEST_SCHEDULE_BYTES} bytes")
        found = from_json(path.read_text(encoding="utf-8"))
        if (found.num_ranks, found.num_micro_batches) != (ranks, micro_batches):
            raise ScheduleError(f"has {found.num_ranks} ranks and {found.num_micro_batches} micro-batches")
        validate(found, config.memory_cap)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"resume: {path} {rule}, is not: {error}") from error
    return found


def excluded_schedules(model: ModelConfig, pipeline: int, chunks: int | None = None) -> dict[str, str]:
    """Returns the kinds of schedule that this model cannot use, each with the reason."""
    reasons: dict[str, str] = {}
    for kind in SCHEDULES.names():
        try:
            stages = num_stages(model, pipeline, kind, chunks)
            cut_layers(model.num_layers, stages, model.mtp_depth, stages_per_rank=stages // pipeline)
        except (CutError, ScheduleError) as error:
            reasons[kind] = str(error)
    return reasons
