"""Chooses a run's schedule: the checkpoint's, the configured one, or the best for measured times."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from comm.config import Cut
from comm.layout import Layout
from dualpipe.builder import build_schedule, choose, schedules_folder, survey
from dualpipe.costs import CostModel
from dualpipe.ir import Schedule, ScheduleError, from_json, to_json
from dualpipe.registry import SCHEDULES, check_slices
from dualpipe.validate import validate_passes
from model.config import CutError, ModelConfig, cut_layers
from train.checkpoint.locate import locate
from train.checkpoint.manifest import (
    CUT_KEY,
    SCHEDULE_NAME,
    CheckpointError,
    layout_record,
    ramp_schedule_name,
    read_manifest,
)
from train.config import TrainConfig, sized_config
from train.predict.cut import num_stages, run_chunks, run_cut, sized_run, with_cut
from train.predict.fit import fitted_cut
from train.predict.layer_times import LayerTimes, stage_costs
from train.predict.memory import ramp_memory_cap
from train.predict.timing import nominal_costs
from train.start.probe import measure

if TYPE_CHECKING:
    from kernels.gemm.tuned import TunedProduct

_LARGEST_SCHEDULE_BYTES = 2**28


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The schedule of a run, why it was chosen, the cut, and the schedules of a ramp's other sizes.

    All of them are proven. `cut` holds the layers of each stage. `times` are those of the probe; None if none ran.
    """

    schedule: Schedule
    reason: str
    cut: tuple[range, ...]
    ramp: Mapping[int, Schedule]
    times: LayerTimes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Broadcast:
    """What rank 0 sends: JSON of the schedules, and a digest of what it proved."""

    schedule: str
    reason: str
    cut: tuple[range, ...]
    ramp: dict[int, str]
    digest: str


def plan(config: TrainConfig, layout: Layout, device: torch.device) -> Plan:
    """Chooses the schedule on rank 0, proves it there, and broadcasts it.

    All ranks call it at the same point, before groups are created.

    Raises:
        ScheduleError: on rank 0, if the schedule cannot be built or is not valid; on another rank, if it received
            another schedule than the one that was proven.
    """
    times = None
    if config.schedule.kind == "auto" and _begun(config) is None:
        times = measure(config, layout, device)
    sent: list[_Broadcast | None] = [None]
    if dist.get_rank() == 0:
        chosen = _choose_proven(config, times)
        schedule_json = to_json(chosen.schedule)
        ramp = {size: to_json(schedule) for size, schedule in chosen.ramp.items()}
        sent[0] = _Broadcast(
            schedule=schedule_json, reason=chosen.reason, cut=chosen.cut, ramp=ramp, digest=_digest(schedule_json, ramp)
        )
    dist.broadcast_object_list(sent, src=0)
    received = sent[0]
    assert received is not None
    if _digest(received.schedule, received.ramp) != received.digest:
        raise ScheduleError(f"schedule: rank {dist.get_rank()} received another schedule than rank 0 has proven")
    sizes = {size: from_json(text) for size, text in received.ramp.items()}
    return Plan(
        schedule=from_json(received.schedule), reason=received.reason, cut=received.cut, ramp=sizes, times=times
    )


def tune_kernels(config: TrainConfig, layout: Layout, device: torch.device, *, has_probed: bool) -> None:
    """Chooses the tilings of FP8 products on a GPU before the first step. All ranks call it.

    The probe computes every product of the run's shapes, unless it already has. A product that is tuned inside the
    schedule would be compiled and measured while other ranks wait, next to exchanges that distort its times.
    """
    if device.type != "cuda" or config.precision.kind != "fp8":
        return
    if not has_probed:
        measure(config, layout, device)
    from kernels.gemm.tuned import PRODUCTS

    adopt_first_ranks_tilings(PRODUCTS)


def adopt_first_ranks_tilings(products: "Mapping[str, TunedProduct[Any]]") -> None:
    """Replaces this rank's tilings by those of rank 0, so that no rank is slower than others."""
    sent = [{name: product.choices for name, product in products.items()} if dist.get_rank() == 0 else {}]
    dist.broadcast_object_list(sent, src=0)
    for name, choices in sent[0].items():
        products[name].adopt(choices)


def ramp_schedules(config: TrainConfig, costs: CostModel | None = None) -> dict[int, Schedule]:
    """Returns the schedule of every size of the batch ramp except the last, by sequences."""
    pipeline = config.parallelism.pipeline
    cache = schedules_folder(config.data.cache_dir)
    *smaller, _ = config.batch_sizes.sizes
    schedules = {}
    for sequences in smaller:
        sized = sized_run(config, sequences)
        kind = sized.schedule.kind
        assert kind != "auto"
        size_costs = costs or nominal_costs(sized, kind)
        schedules[sequences] = build_schedule(
            kind, pipeline, sized.num_micro_batches, size_costs, ramp_memory_cap(sized), cache
        )
    return schedules


def _choose_proven(config: TrainConfig, times: LayerTimes | None) -> Plan:
    begun = _begun(config)
    if begun is not None:
        # These are validated as they are read.
        schedule = read_schedule(begun, config)
        reason = f"the schedule of {begun.parent}"
        ramp = _begun_ramp(begun.parent, config)
        return Plan(schedule=schedule, reason=reason, cut=read_cut(begun.parent, config, schedule), ramp=ramp)
    chosen, costs = _choose(config, times)
    kind = chosen.schedule.kind
    chunks = chosen.schedule.num_stages // config.parallelism.pipeline
    named = replace(config, schedule=replace(config.schedule, kind=kind, chunks=chunks))
    ramp = ramp_schedules(with_cut(named, chosen.cut), costs)
    for schedule in (chosen.schedule, *ramp.values()):
        validate_passes(schedule)
    return replace(chosen, ramp=ramp)


def _choose(config: TrainConfig, times: LayerTimes | None) -> tuple[Plan, CostModel | None]:
    """Builds the configured schedule, or the best one for measured times, with the costs of its stages."""
    pipeline = config.parallelism.pipeline
    micro_batches = config.num_micro_batches
    kind = config.schedule.kind
    cache = schedules_folder(config.data.cache_dir)
    if kind != "auto":
        cut = fitted_cut(config, kind)
        costs = nominal_costs(with_cut(config, cut), kind)
        schedule = build_schedule(kind, pipeline, micro_batches, costs, config.memory_cap, cache)
        return Plan(schedule=schedule, reason="the configured one", cut=cut, ramp={}), None
    assert times is not None
    cuts: dict[tuple[str, int], tuple[range, ...]] = {}

    def costs_of(kind: str, num_stages: int) -> CostModel:
        chunks = replace(config.schedule, kind=kind, chunks=num_stages // pipeline)
        cut = cuts[kind, num_stages] = fitted_cut(replace(config, schedule=chunks), kind, times)
        return stage_costs(times, config, cut)

    rows = survey(
        pipeline,
        micro_batches,
        costs_of,
        config.memory_cap,
        cache,
        excluded_schedules(config.model, pipeline, run_chunks(config), config.schedule.slices),
        chunks=run_chunks(config),
        most_stages=config.model.num_layers,
    )
    best = choose(rows, config.memory_cap)
    reason = f"the best for the measured seconds: {best.reason}"
    cut = cuts[best.schedule.kind, best.schedule.num_stages]
    return Plan(schedule=best.schedule, reason=reason, cut=cut, ramp={}), stage_costs(times, config, cut)


def _digest(schedule: str, ramp: Mapping[int, str]) -> str:
    digest = hashlib.sha256()
    for text in (schedule, *(f"{size} {text}" for size, text in sorted(ramp.items()))):
        digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()


def _begun(config: TrainConfig) -> Path | None:
    """Returns the schedule of the checkpoint to resume in the same layout, for bitwise equal sums."""
    if config.resume is None:
        return None
    folder = locate(config.resume).folder
    path = folder / SCHEDULE_NAME
    is_same = read_manifest(folder).get("layout") == layout_record(config)
    return path if is_same and path.is_file() else None


def _begun_ramp(folder: Path, config: TrainConfig) -> dict[int, Schedule]:
    """Reads and validates the schedules of a checkpoint for the smaller sizes of the batch ramp."""
    *smaller, _ = config.batch_sizes.sizes
    return {size: read_schedule(folder / ramp_schedule_name(size), sized_config(config, size)) for size in smaller}


def read_schedule(path: Path, config: TrainConfig) -> Schedule:
    """Reads a checkpoint's schedule and refuses an invalid one, under which ranks would deadlock."""
    ranks = config.parallelism.pipeline
    micro_batches = config.num_micro_batches
    rule = f"must be a valid schedule of {ranks} pipeline ranks and {micro_batches} micro-batches"
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_SCHEDULE_BYTES:
            raise ScheduleError(f"not a file of at most {_LARGEST_SCHEDULE_BYTES} bytes")
        stored = from_json(path.read_text(encoding="utf-8"))
        if (stored.num_ranks, stored.num_micro_batches) != (ranks, micro_batches):
            raise ScheduleError(f"has {stored.num_ranks} ranks and {stored.num_micro_batches} micro-batches")
        validate_passes(stored, config.memory_cap)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"resume: {path} {rule}, is not: {error}") from error
    return stored


def read_cut(folder: Path, config: TrainConfig, schedule: Schedule) -> tuple[range, ...]:
    """Reads the layers of each stage from a checkpoint's manifest, and refuses those that do not fit."""
    sizes = read_manifest(folder).get(CUT_KEY)
    if sizes is None:
        return run_cut(config, schedule.placement)
    try:
        listed = replace(config, parallelism=replace(config.parallelism, cut=Cut.from_plain(sizes)))
        return run_cut(listed, schedule.placement)
    except ValueError as error:
        raise CheckpointError(f"resume: {folder} must hold the cut of its schedule, does not: {error}") from error


def excluded_schedules(model: ModelConfig, pipeline: int, chunks: int | None = None, slices: int = 1) -> dict[str, str]:
    """Returns the kinds of schedule that this model or its slices cannot use, each with the reason."""
    reasons: dict[str, str] = {}
    for kind in SCHEDULES.names():
        try:
            check_slices(kind, slices, slices)
            stages = num_stages(model, pipeline, kind, chunks)
            cut_layers(model.num_layers, stages, model.mtp_depth, stages_per_rank=stages // pipeline)
        except (CutError, ScheduleError) as error:
            reasons[kind] = str(error)
    return reasons
