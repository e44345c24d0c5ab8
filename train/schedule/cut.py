"""Places stages: their layers and ranks, and ramp sizes that keep the placement. No torch here."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby

from comm.config import Cut
from dualpipe.ir import Placement, Schedule, ScheduleError
from dualpipe.registry import FALLBACK, SCHEDULES, kind_for_size
from model.config import CutError, ModelConfig, cut_at, cut_layers
from train.config import TrainConfig, sized_config
from train.schedule.balanced_cut import balanced_cut
from train.schedule.layer_times import LayerTimes, model_work, nominal_times

_KEY = "parallelism.cut"


def num_stages(model: ModelConfig, pipeline: int, kind: str, chunks: int | None) -> int:
    """Returns the number of stages of a kind of schedule, the smallest by default."""
    spec = SCHEDULES.get(kind)
    return spec.num_stages(pipeline, spec.chunk_choices(chunks)[0])


def run_stages(config: TrainConfig, kind: str) -> int:
    """Returns `num_stages` of the run's model; a listed cut determines the number of chunks."""
    return num_stages(config.model, config.parallelism.pipeline, kind, run_chunks(config))


def run_chunks(config: TrainConfig) -> int | None:
    """Returns the chunks of a rank that the configuration determines, or None if they may be chosen."""
    chunks, rest = divmod(len(config.parallelism.cut.layers), config.parallelism.pipeline)
    return config.schedule.chunks if rest or not chunks else chunks


def run_placement(config: TrainConfig, kind: str) -> Placement:
    """Returns the placement of the run's stages under a kind of schedule, for `auto` that of `FALLBACK`."""
    kind = FALLBACK if kind == "auto" else kind
    pipeline = config.parallelism.pipeline
    return SCHEDULES.get(kind).placement(pipeline, run_stages(config, kind) // pipeline)


def run_cut(config: TrainConfig, placement: Placement, times: LayerTimes | None = None) -> tuple[range, ...]:
    """Returns the layers of each stage. Every process computes the same from the same arguments.

    Without measured times, the work of the model's parts is estimated.

    Raises:
        CutError: the model has fewer layers than stages, or the list does not fit the model and the stages.
    """
    model = config.model
    cut = config.parallelism.cut
    num_stages = len(placement[0])
    if cut.kind == "listed":
        _check_listed(cut.layers, config, num_stages)
        return cut_at(cut.layers)
    per_rank = num_stages // config.parallelism.pipeline
    even = cut_layers(model.num_layers, num_stages, model.mtp_depth, stages_per_rank=per_rank)
    if cut.kind == "even":
        return even
    sizes = _cached_cut(model_work(times or nominal_times(config), config), placement)
    assert sizes is not None
    return cut_at(sizes)


def with_cut(config: TrainConfig, cut: Sequence[range]) -> TrainConfig:
    """Returns the configuration with a listed cut."""
    listed = Cut("listed", tuple(map(len, cut)))
    return replace(config, parallelism=replace(config.parallelism, cut=listed))


_cached_cut = lru_cache(maxsize=256)(balanced_cut)


def _check_listed(sizes: tuple[int, ...], config: TrainConfig, num_stages: int) -> None:
    """Rejects a list that does not fit the model and the number of stages."""
    layers = config.model.num_layers
    last = len(sizes) - 1
    shown = f"is {_text(sizes)}; nearest valid: {_text(_nearest(sizes, config, num_stages))}"
    if len(sizes) != num_stages:
        raise CutError(
            f"{_KEY}: must list the layers of {num_stages} stages, because schedule={config.schedule.kind} has so many "
            f"with parallelism.pipeline={config.parallelism.pipeline}, lists {len(sizes)}, {shown}, or auto"
        )
    empty = [stage for stage, size in enumerate(sizes) if size == 0 and stage not in (0, last)]
    if empty:
        raise CutError(
            f"{_KEY}: every stage except the first and the last must have at least one layer, stage {empty[0]} has "
            f"none, {shown}, or auto"
        )
    if sum(sizes) != layers:
        raise CutError(f"{_KEY}: must add up to model.num_layers={layers}, adds up to {sum(sizes)}, {shown}, or auto")


def _nearest(sizes: tuple[int, ...], config: TrainConfig, num_stages: int) -> tuple[int, ...]:
    """Returns the list with as few changes as possible, or the even cut for another number of stages."""
    model = config.model
    last = num_stages - 1
    least = [int(stage not in (0, last)) for stage in range(num_stages)]
    if len(sizes) != num_stages or sum(least) > model.num_layers:
        return tuple(map(len, cut_layers(model.num_layers, num_stages, model.mtp_depth)))
    changed = list(map(max, sizes, least))
    while sum(changed) != model.num_layers:
        change = 1 if sum(changed) < model.num_layers else -1
        open_stages = [stage for stage in range(num_stages) if changed[stage] + change >= least[stage]]
        changed[min(open_stages, key=lambda stage: (change * changed[stage], stage))] += change
    return tuple(changed)


def _text(sizes: Sequence[int]) -> str:
    return f"[{','.join(map(str, sizes))}]"


def is_mirrored(schedule: Schedule) -> bool:
    """Returns whether pipeline ranks p and P-1-p hold the same stages.

    Raises:
        ScheduleError: ranks that are no mirror pair share a stage, so their gradients would not be summed.
    """
    down, *up = schedule.placement
    mirrored = tuple(schedule.num_ranks - 1 - rank for rank in down)
    if any(row != mirrored for row in up):
        raise ScheduleError(
            f"placement: the second direction must hold every stage on rank P-1-r, where r is the rank that holds it "
            f"for the first direction, is {schedule.placement}"
        )
    return bool(up)


def embedding_ranks(schedule: Schedule, mtp_depth: int) -> tuple[int, ...]:
    """Returns the ranks that hold the embedding: those of the first stage and, with MTP, of the last one."""
    ends = (0, schedule.num_stages - 1) if mtp_depth else (0,)
    return tuple(sorted({row[stage] for row in schedule.placement for stage in ends}))


def sized_run(config: TrainConfig, sequences: int) -> TrainConfig:
    """Returns the configuration of a run with one size of its batch ramp, and no ramp.

    If the configured schedule does not accept the size, another one with the same placement is configured.

    Raises:
        ScheduleError: no schedule with this placement accepts the size.
    """
    sized = sized_config(config, sequences)
    kind = config.schedule.kind
    pipeline = config.parallelism.pipeline
    if kind == "auto":
        return sized
    chunks = run_stages(config, kind) // pipeline
    other = kind_for_size(kind, pipeline, sized.num_micro_batches, chunks, micro_batches_key="batch.ramp")
    if other == kind:
        return sized
    return replace(sized, schedule=replace(config.schedule, kind=other, chunks=chunks))


def ramp_notices(config: TrainConfig) -> Iterator[str]:
    """Yields a line for consecutive sizes of the ramp that do not use the configured schedule."""
    kinds = [(size, sized_run(config, size).schedule.kind) for size in config.batch_sizes.sizes]
    for kind, group in groupby(kinds, key=lambda item: item[1]):
        if kind != config.schedule.kind:
            sizes = [size for size, _ in group]
            span = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
            yield (
                f"batch.ramp: steps of {span} sequences use schedule {kind}, which has the same placement, because "
                f"{config.schedule.kind} is not defined for their number of micro-batches"
            )
