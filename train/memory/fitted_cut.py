"""Chooses a run's cut so that it fits the memory, if a limit is known. No torch here."""

from collections import Counter
from dataclasses import replace

from dualpipe.build import build, schedules_folder
from dualpipe.ir import Placement, ScheduleError
from dualpipe.registry import FALLBACK
from model.config import cut_at, cut_layers
from train.config import TrainConfig
from train.memory.predict import predict_memory
from train.schedule.cut import CutLimits, balanced_cut, run_cut, run_placement, with_cut
from train.schedule.layer_times import LayerTimes, model_work, nominal_times, rank_groups
from train.schedule.nominal import nominal_costs


def fitted_config(config: TrainConfig) -> TrainConfig:
    """Returns a run's configuration with the cut that it uses, as a list.

    Args:
        config: of the run; `schedule=auto` is planned as dualpipe_split.

    Raises:
        ScheduleError, CutError: as `fitted_cut`.
    """
    return with_cut(config, fitted_cut(config, config.schedule.kind))


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
    for cut in (_tightened(config, placement, best, times), even):
        if cut is not None and _ranks_over(config, cut) == frozenset():
            return cut
    return best


def _tightened(
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
        for group, own in zip(groups, cut, strict=True):
            layers[group] += len(own)
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
            build(kind, config.parallelism.pipeline, config.num_micro_batches, costs, config.memory_cap, cache)
        if room is None:
            return frozenset()
        return frozenset(rank.pipeline_rank for rank in predict_memory(config).ranks if rank.total > room)
    except ScheduleError:
        return None
