"""Returns the layers of each stage of a run: as listed, even, or balanced by work. No torch here."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from comm.config import Cut
from dualpipe.ir import Placement
from dualpipe.registry import FALLBACK, SCHEDULES
from model.config import CutError, ModelConfig, cut_at, cut_layers
from train.config import TrainConfig
from train.schedule.balanced_cut import balanced_cut
from train.schedule.layer_times import LayerTimes, model_work, nominal_times
from train.schedule.stage_work import ModelWork

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
    kind, pipeline = FALLBACK if kind == "auto" else kind, config.parallelism.pipeline
    return SCHEDULES.get(kind).placement(pipeline, run_stages(config, kind) // pipeline)


def run_cut(config: TrainConfig, placement: Placement, times: LayerTimes | None = None) -> tuple[range, ...]:
    """Returns the layers of each stage. Every process computes the same from the same arguments.

    Without measured times, the work of the model's parts is estimated.

    Raises:
        CutError: the model has fewer layers than stages, or the list does not fit the model and the stages.
    """
    model, cut, num_stages = config.model, config.parallelism.cut, len(placement[0])
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


@lru_cache(maxsize=256)
def _cached_cut(work: ModelWork, placement: Placement) -> tuple[int, ...] | None:
    return balanced_cut(work, placement)


def _check_listed(sizes: tuple[int, ...], config: TrainConfig, num_stages: int) -> None:
    """Rejects a list that does not fit the model and the number of stages."""
    layers, last = config.model.num_layers, len(sizes) - 1
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
    model, last = config.model, num_stages - 1
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
