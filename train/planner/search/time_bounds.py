"""Bounds the time of a step from below by arithmetic, without building a schedule. No torch here.

The simulator gives an operation without another one to hide its exchange `alone` times its computation, plus its
exchange; a group of several operations takes at least the sum of their computation, the sum of their exchange, and any
operation alone with all its computation. Costs with computation c' = min(c, alone c + x) and exchange
x' = alone c + x - c' take at most as long in every group, without the factor. So a bound for these costs holds for the
run's own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from dualpipe.ir import Placement, Schedule
from dualpipe.registry import SCHEDULES
from dualpipe.simulate.bounds import lower_bound
from dualpipe.simulate.costs import CostModel, StageCosts
from model.size import held_parameters, stage_shapes
from train.config import TrainConfig
from train.planner.config import KernelRates, Rates
from train.planner.scaling import DeviceScale
from train.schedule.layer_times import LayerTimes, PartTimes

ROUNDING = 1 - 1e-9
"""Factor on bounds, so that rounding never makes one larger than a simulated time."""
_PROBED_SIZES = ((4, 8), (2, 5))


def alone_factor(config: TrainConfig, rates: Rates) -> float:
    """Returns the factor on the computation of an operation that runs alone; see `CostModel`."""
    return DeviceScale.of_run(config, rates.reference).alone if isinstance(rates, KernelRates) else 1.0


@lru_cache(maxsize=64)
def has_pairs(kind: str) -> bool:
    """Returns whether a kind of schedule may overlap operations.

    A kind whose order does not depend on costs overlaps operations at every size or at none; two small sizes show it.
    """
    spec = SCHEDULES.get(kind)
    if spec.takes_costs:
        return True
    sizes = [size for size in _PROBED_SIZES if spec.limit(*size) is None]
    whole = [1] if spec.takes_slices else []
    groups = [group for size in sizes for rank in spec.generate(*size, *whole).ranks for group in rank]
    return not groups or any(len(group) > 1 for group in groups)


def work_bound(times: LayerTimes, config: TrainConfig, alone: float, *, pairs: bool) -> float:
    """Returns a time that the busiest rank needs at least for a step, for any cut: that of the mean rank.

    Args:
        times: of the model's parts, for one micro-batch.
        alone: see `alone_factor`.
    """
    computed = exchanged = 0.0
    for count, part in _parts(times, config):
        least, exposed, exchange = _least(part, alone)
        computed += count * (least if pairs else least + exposed)
        exchanged += count * exchange
    share = config.num_micro_batches / config.parallelism.pipeline
    return share * max(computed, exchanged) * ROUNDING


def path_bound(times: LayerTimes, config: TrainConfig, alone: float) -> float:
    """Returns the time of one micro-batch through all stages and back, for any cut.

    Args:
        times: of the model's parts, for one micro-batch.
        alone: see `alone_factor`.
    """
    total = 2 * (config.parallelism.pipeline - 1) * times.latency
    for count, part in _parts(times, config):
        computed = part.forward + part.backward_input
        total += count * (alone * computed + part.forward_exchange + part.backward_exchange)
    return total * ROUNDING


def _parts(times: LayerTimes, config: TrainConfig) -> Iterator[tuple[int, PartTimes]]:
    """Yields the parts of the model with their numbers, as groups of the configured pairing run them."""
    model = config.model
    parts = (
        (model.num_dense_layers, times.dense),
        (model.num_layers - model.num_dense_layers, times.moe),
        (1, times.embedding),
        (1, times.head),
        (1, times.mtp),
    )
    for count, part in parts:
        yield count, part if config.schedule.pairing == "overlapped" else part.without_overlap()


def _least(part: PartTimes, alone: float) -> tuple[float, float, float]:
    """Returns computation and exchange of the cheapest costs (see the module), and the whole exchange."""
    least = alone * part.backward_weight
    exposed = 0.0
    for computed, exchanged in (
        (part.forward, part.forward_exchange),
        (part.backward_input, part.backward_exchange),
    ):
        own = min(computed, alone * computed + exchanged)
        least += own
        exposed += alone * computed + exchanged - own
    return least, exposed, part.forward_exchange + part.backward_exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLoad:
    """Times of a rank in any schedule.

    Attributes:
        work: of all its groups at least.
        head: before the first forward can reach it.
    """

    work: float
    head: float


def rank_loads(kind: str, num_micro_batches: int, placement: Placement, costs: CostModel) -> list[RankLoad]:
    """Returns what each rank needs at least."""
    shape, pairs = empty_schedule(kind, num_micro_batches, placement), has_pairs(kind)
    computed, exchanged, heads = ([start] * shape.num_ranks for start in (0.0, 0.0, float("inf")))
    for direction, row in enumerate(placement):
        count, arrival = len(shape.micro_batches_of(direction)), 0.0
        for stage, rank in enumerate(row):
            own, least = costs.stages[stage], _cheapest(costs.stages[stage], costs.alone, pairs=pairs)
            computed[rank] += count * (least.forward + least.backward_input + least.backward_weight)
            exchanged[rank] += count * (own.forward_exchange + own.backward_exchange)
            heads[rank] = min(heads[rank], arrival) if count else heads[rank]
            arrival += costs.alone * own.forward + own.forward_exchange
            arrival += costs.latency if rank != row[min(stage + 1, len(row) - 1)] else 0.0
    return [
        RankLoad(work=max(work, exchange), head=head if head < float("inf") else 0.0)
        for work, exchange, head in zip(computed, exchanged, heads, strict=True)
    ]


def makespan_bound(kind: str, num_micro_batches: int, placement: Placement, costs: CostModel) -> float:
    """Returns a time below which no schedule of a kind can end."""
    shape = empty_schedule(kind, num_micro_batches, placement)
    stages = tuple(_cheapest(stage, costs.alone, pairs=has_pairs(kind)) for stage in costs.stages)
    bound = lower_bound(shape, replace(costs, stages=stages, alone=1.0)).value
    exchanges = [0.0] * shape.num_ranks
    for direction, row in enumerate(placement):
        count = len(shape.micro_batches_of(direction))
        for stage, rank in enumerate(row):
            exchanges[rank] += count * (costs.stages[stage].forward_exchange + costs.stages[stage].backward_exchange)
    return max(bound, *exchanges) * ROUNDING


def empty_schedule(kind: str, num_micro_batches: int, placement: Placement) -> Schedule:
    """Returns a schedule with placement and counts but without groups."""
    num_ranks = max(map(max, placement)) + 1
    return Schedule(
        kind=kind,
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=placement,
        ranks=((),) * num_ranks,
    )


def _cheapest(stage: StageCosts, alone: float, *, pairs: bool) -> StageCosts:
    """Returns the cheapest costs of a stage (see the module); without pairs, exchange is never hidden."""
    forward, backward = (
        alone * stage.forward + stage.forward_exchange,
        alone * stage.backward_input + stage.backward_exchange,
    )
    own_forward = min(stage.forward, forward) if pairs else forward
    own_backward = min(stage.backward_input, backward) if pairs else backward
    return replace(
        stage,
        forward=own_forward,
        forward_exchange=forward - own_forward,
        backward_input=own_backward,
        backward_exchange=backward - own_backward,
        backward_weight=alone * stage.backward_weight,
    )


def update_bound(config: TrainConfig, rates: Rates, *, copies: int) -> float:
    """Returns a time that the optimizer needs at least, for any cut: that of the mean of the weights.

    Args:
        copies: pipeline ranks that hold each stage.
    """
    if not isinstance(rates, KernelRates):
        return rates.optimizer_seconds
    (whole,) = stage_shapes([range(config.model.num_layers)])
    local = config.model.num_routed_experts // config.parallelism.expert
    mean = held_parameters(config.model, [whole], local).total * copies / config.parallelism.pipeline
    return rates.optimizer_seconds * mean / rates.reference.parameters_per_rank * ROUNDING
