"""Chooses a cut that fits the memory, and formats the prediction in GB. No torch here."""

from collections import Counter
from contextlib import suppress
from dataclasses import replace

from base.figures import aligned
from dualpipe.builder import build_schedule, schedules_folder
from dualpipe.ir import Placement, ScheduleError
from dualpipe.registry import FALLBACK, SCHEDULES
from model.config import CutError, cut_at, cut_layers
from train.config import TrainConfig
from train.predict.cut import CutLimits, balanced_cut, run_cut, run_placement, with_cut
from train.predict.layer_times import LayerTimes, model_work, nominal_times, rank_groups
from train.predict.memory import JobMemory, RankMemory, imbalance_bytes, predict_memory
from train.predict.timing import nominal_costs
from train.tasks.registry import TASKS

_GB = 1e9
_SLICED_CAPS = (1.0, 0.75, 0.5)
"""Memory caps that are tried for slices, in whole sequences of model/P per pipeline rank."""


def fitted_config(config: TrainConfig) -> TrainConfig:
    """Returns a run's configuration with the cut that it uses, as a list.

    Args:
        config: of the run; `schedule=auto` is planned as dualpipe_split.

    Raises:
        ScheduleError, CutError: as `fitted_cut`.
    """
    return with_cut(config, fitted_cut(config, config.schedule.kind))


def with_fitting_cap(config: TrainConfig) -> TrainConfig:
    """Returns a run of slices with the largest memory cap under which its most balanced cut fits.

    A searched order of slices otherwise defers nearly every W, and a less balanced cut that fits costs far more time
    than a cap. A configured cap is kept. If no cap is needed, or none is enough, it stays null.
    """
    kind = FALLBACK if config.schedule.kind == "auto" else config.schedule.kind
    room = config.cluster.memory_bytes
    slices = config.schedule.slices
    is_searched = slices > 1 and config.memory_cap is None and SCHEDULES.get(kind).takes_costs
    if room is None or not is_searched:
        return config
    for cap in (None, *(share * slices * config.parallelism.pipeline for share in _SLICED_CAPS)):
        capped = replace(config, memory_cap=cap)
        with suppress(ScheduleError, CutError):  # the run's checks say why
            if predict_memory(capped).worst.total <= room:
                return capped
    return config


def fitted_cut(config: TrainConfig, kind: str, times: LayerTimes | None = None) -> tuple[range, ...]:
    """Returns the layers of each stage: the cut of the run, or a less balanced one that fits.

    A less balanced cut than that of `run_cut` is only used if `cluster.memory_bytes` or `memory_cap` needs it. If no
    cut fits, the most balanced one is returned.

    Args:
        times: measured times of the model's parts; None: the configured costs, divided by estimated work.

    Raises:
        ScheduleError: the schedule is not defined for the configured number of chunks.
        CutError: the model cannot be cut into the stages.
    """
    kind = FALLBACK if kind == "auto" else kind
    placement = run_placement(config, kind)
    best = run_cut(config, placement, times)
    limits = (config.cluster.memory_bytes, config.memory_cap)
    if config.parallelism.cut.kind != "auto" or limits == (None, None):
        return best
    config = replace(config, schedule=replace(config.schedule, kind=kind))
    even = cut_layers(config.model.num_layers, len(best), config.model.mtp_depth)
    for cut in (_tighten(config, placement, best, times), even):
        if cut is not None and _ranks_over(config, cut) == frozenset():
            return cut
    return best


def _tighten(
    config: TrainConfig, placement: Placement, best: tuple[range, ...], times: LayerTimes | None
) -> tuple[range, ...] | None:
    """Moves layers away from ranks that need too much memory, until the cut fits or there is none.

    A rank first moves layers to later stages, of which it keeps fewer activations, then gives them away.
    """
    groups = rank_groups(placement)
    work = model_work(times or nominal_times(config), config)
    most = dict[int, int]()
    late = frozenset[int]()
    cut = best
    for _ in range(2 * config.model.num_layers):
        over = _ranks_over(config, cut)
        if not over:
            return None if over is None else cut
        layers = Counter[int]()
        for group, stage_layers in zip(groups, cut, strict=True):
            layers[group] += len(stage_layers)
        for group in {groups[stage] for row in placement for stage, rank in enumerate(row) if rank in over}:
            if group in late:
                most[group] = layers[group] - 1
        late |= {groups[stage] for row in placement for stage, rank in enumerate(row) if rank in over}
        sizes = balanced_cut(work, placement, CutLimits(layers=most, late=late))
        if sizes is None:
            return None
        cut = cut_at(sizes)
    return None


def _ranks_over(config: TrainConfig, cut: tuple[range, ...]) -> frozenset[int] | None:
    """Returns the ranks that need more than `cluster.memory_bytes`, or None without a schedule."""
    config, room = with_cut(config, cut), config.cluster.memory_bytes
    try:
        if config.memory_cap is not None:
            kind = config.schedule.kind
            cache = schedules_folder(config.data.cache_dir)
            costs = nominal_costs(config, kind)
            build_schedule(kind, config.parallelism.pipeline, config.num_micro_batches, costs, config.memory_cap, cache)
        if room is None:
            return frozenset()
        return frozenset(rank.pipeline_rank for rank in predict_memory(config).ranks if rank.total > room)
    except ScheduleError:
        return None


def memory_lines(config: TrainConfig) -> list[str]:
    """Returns a summary line and a table of every pipeline rank's predicted memory.

    Raises:
        ScheduleError: the schedule cannot be built.
        CutError: the model has fewer layers than stages.
    """
    config = fitted_config(config)
    job = predict_memory(config)
    header = ["rank", *job.worst.peak_parts, "total"]
    rows = [[str(rank.pipeline_rank), *map(_gb, (*rank.peak_parts.values(), rank.total))] for rank in job.ranks]
    return [summary_line(config, job), *aligned([header, *rows]), *_notes(config, job)]


def summary_line(config: TrainConfig, job: JobMemory) -> str:
    """Returns one line about the rank that needs most memory, with its parts."""
    worst = job.worst
    of = "" if config.cluster.memory_bytes is None else f" of {config.cluster.memory_bytes / _GB:.1f}"
    return f"memory: rank {worst.pipeline_rank} needs {gigabytes(worst.total)}{of} ({parts(worst)})"


def shortage(config: TrainConfig, job: JobMemory) -> str:
    """Returns why a run does not fit its devices or its nodes, in one line, or nothing if it fits."""
    room = config.cluster.memory_bytes
    if room is not None and job.worst.total > room:
        return summary_line(config, job)
    host = config.cluster.host_memory_bytes
    ranks = min(config.cluster.ranks_per_node, config.parallelism.world_size)
    largest = max(rank.host for rank in job.ranks)
    if host is None or ranks * largest <= host:
        return ""
    return (
        f"host memory: a node needs {gigabytes(ranks * largest)} of {gigabytes(host)}: {ranks} ranks with up to "
        f"{gigabytes(largest)}, with the copy that a checkpoint is written from"
    )


def parts(rank: RankMemory) -> str:
    """Returns the parts of a rank's memory that are at least 1 % of it, the largest first.

    They are in GB without a unit, or below 0.1 GB in MB with a unit.
    """
    sizes = rank.peak_parts
    sizes["activations"] += sizes.pop("pending W")
    largest = sorted(((size, name) for name, size in sizes.items() if size >= 0.01 * rank.total), reverse=True)
    return ", ".join(f"{name} {_part(size)}" for size, name in largest)


def gigabytes(size: float) -> str:
    """Returns a size with its unit: MB below 0.1 GB, or else GB."""
    return f"{size / _GB:.1f} GB" if size >= 0.1 * _GB else f"{size / 1e6:.1f} MB"


def _notes(config: TrainConfig, job: JobMemory) -> list[str]:
    lines = [
        "GB at the peak, which may be that of the last passes with the update; "
        f"{job.num_micro_batches} micro-batches of {config.batch.micro_sequences} sequences",
        "experts are taken to receive equally many rows"
        + (
            f"; 10 % more on the rank that needs most add {gigabytes(imbalance_bytes(config, job))}"
            if config.parallelism.expert > 1
            else ""
        ),
    ]
    if config.schedule.kind == "auto":
        lines.append("schedule=auto is chosen when the run starts; predicted for dualpipe_split")
    return lines


def _gb(size: int) -> str:
    return f"{size / _GB:.1f}" if size >= 0.1 * _GB else f"{size / _GB:.3f}"


def _part(size: int) -> str:
    return f"{size / _GB:.1f}" if size >= 0.1 * _GB else gigabytes(size)


LEAST_SHARED_TOKENS = 4096
"""Tokens of a sequence that a rank of a suggested context group holds at least: a sequence of pre-training."""


def context_sizes(config: TrainConfig) -> tuple[int, ...]:
    """Returns the sizes of context groups that a layout may have, ascending.

    They are powers of two that leave a rank at least `LEAST_SHARED_TOKENS` of each sequence, and the run's own size.
    """
    length = config.batch.sequence_length_tokens
    sizes = {1, config.parallelism.context}
    if TASKS.get(config.task.kind).splits_sequences:
        powers = (2**power for power in range(1, 21))
        sizes |= {size for size in powers if length % (2 * size) == 0 and length // size >= LEAST_SHARED_TOKENS}
    return tuple(sorted(sizes))
