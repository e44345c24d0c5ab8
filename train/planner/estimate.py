"""Ranks the layouts of a search by arithmetic, without building a schedule. No torch here.

The simulator gives an operation without another one to hide its exchange `alone` times its computation, plus its
exchange; a group of several operations takes at least the sum of their computation, the sum of their exchange, and any
operation alone with all its computation. Costs with computation c' = min(c, alone c + x) and exchange
x' = alone c + x - c' take at most as long in every group, without the factor. So what holds for these costs holds for
the run's own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import ceil
from typing import TypeVar

from comm.config import Cut
from dualpipe.registry import SCHEDULES, ScheduleConfig
from dualpipe.simulate.costs import Costs
from model.size import held_parameters, stage_shapes
from train.memory import predict_memory
from train.planner.config import KernelRates
from train.planner.job_plan import PlannerConfig
from train.planner.layouts import RankSetting, SearchSpace
from train.planner.scaling import alone_factor, part_seconds
from train.schedule.layer_times import LayerTimes, PartTimes, as_paired

_ROUNDING = 1 - 1e-9
"""Factor on least times, so that rounding never makes one larger than a simulated time."""
_MASTER_BYTES = 4
_FULL_BACKWARDS = ScheduleConfig(kind="1f1b", chunks=1, pairing="sequential")
"""Schedule after whose only forward the whole model's activations are alive, and nothing else."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedLayout:
    """A layout, and what arithmetic says of it for any cut.

    `seconds` has the idle time of its schedule. `least_memory` is that of the mean rank, `memory` that of the largest.
    """

    setting: RankSetting
    schedule: ScheduleConfig
    least_seconds: float
    seconds: float
    least_memory: float
    memory: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """Least seconds of one sequence: of the busiest rank, of its whole way, and of the mean rank."""

    busy: float
    path: float
    mean: Costs


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """Arithmetic on the layouts of a search. What different layouts share is computed once."""

    space: SearchSpace
    planner: PlannerConfig
    known: dict[object, object] = field(default_factory=dict)

    def ranked(self, setting: RankSetting, schedule: ScheduleConfig) -> RankedLayout:
        """Returns a layout with its estimates."""
        pipeline = setting.pipeline
        micro = setting.micro_sequences
        shares = _num_directions(schedule.kind)
        copies = shares if pipeline % 2 == 0 else 1
        sequences = self.space.config.batch.global_sequences / setting.data
        unit = _unit(setting)
        work = self._once((unit, schedule.pairing, shares), lambda: self._work(unit, schedule))
        parameters = self._held(setting.expert) * copies / pipeline
        update = self._update_seconds(parameters)
        factor = self.planner.efficiency.unexplained
        busy = work.busy * sequences
        idle = micro * _idle_seconds(schedule, pipeline, work.mean)
        static = self._static_bytes(setting, parameters)
        kept = micro * self._kept_bytes(setting) / pipeline
        return RankedLayout(
            setting=setting,
            schedule=schedule,
            least_seconds=factor * _ROUNDING * (max(busy, micro * work.path) + update),
            seconds=factor * (max(busy + idle, micro * work.path) + update),
            least_memory=static + kept,
            memory=static + kept * min(sequences / micro, pipeline + 1),
        )

    def unit_times(self, setting: RankSetting) -> LayerTimes:
        """Returns the times of the model's parts for one sequence; micro-batches take multiples of them."""
        unit = _unit(setting)
        config = self.space.layout_config(unit, self.space.schedules[0])
        return self._once(("times", unit), lambda: part_seconds(self.planner.rates, config))

    def _work(self, unit: RankSetting, schedule: ScheduleConfig) -> _Work:
        """Returns the work of a layout whose micro-batches have one sequence."""
        config = self.space.layout_config(unit, schedule)
        times = self.unit_times(unit)
        model = config.model
        pipeline = unit.pipeline
        shares = _num_directions(schedule.kind)
        alone = alone_factor(self.planner.rates, config)
        dense = as_paired(times.dense, config)
        moe = as_paired(times.moe, config)
        ends = [as_paired(part, config) for part in (times.embedding, times.head, times.mtp)]
        layers = ((model.num_dense_layers, dense), (model.num_layers - model.num_dense_layers, moe))
        parts = [(count, part) for count, part in layers if count] + [(1, part) for part in ends]
        # Ranks with the same layers share their micro-batches, and one of them has at least the mean of the layers.
        most_layers = ceil(model.num_layers * shares / pipeline) if pipeline % shares == 0 else 0
        busy = 0.0
        for lane in (lambda part: _least_compute(part, alone), lambda part: part.work.exchange):
            whole = sum(count * lane(part) for count, part in parts)
            smallest = min(lane(part) for _, part in parts[:-3])
            busy = max(busy, whole / pipeline, smallest * most_layers / shares, sum(map(lane, ends[1:])) / shares)
        sums = sum((part * count for count, part in parts), PartTimes())
        path = alone * (sums.forward + sums.backward_input) + sums.forward_exchange + sums.backward_exchange
        mean = Costs(
            forward=sums.forward / pipeline,
            backward_input=sums.backward_input / pipeline,
            backward_weight=sums.backward_weight / pipeline,
            exchange=sums.forward_exchange / pipeline,
            latency=times.latency,
        )
        return _Work(busy=busy, path=path + 2 * (pipeline - 1) * times.latency, mean=mean)

    def _held(self, expert: int) -> int:
        """Returns the parameters of a whole model whose experts are divided among ranks."""
        model = self.space.config.model
        whole = stage_shapes([range(model.num_layers)])
        local = model.num_routed_experts // expert
        return self._once(("held", expert), lambda: held_parameters(model, whole, local).total)

    def _update_seconds(self, parameters: float) -> float:
        rates = self.planner.rates
        share = parameters / rates.reference.parameters_per_rank if isinstance(rates, KernelRates) else 1.0
        return rates.optimizer_seconds * share

    def _static_bytes(self, setting: RankSetting, parameters: float) -> float:
        """Returns the bytes of weights, gradients and optimizer of the mean rank, with the reserve."""
        config = self.space.config
        value = {"float64": 8, "float32": 4}.get(setting.precision.kind, 2)
        moments = 2 * (2 if config.optim.moments == "bf16" else max(4, value))
        if config.optim.sharding == "replicated":
            state = parameters * moments
        else:
            state = self._held(1) * (_MASTER_BYTES + moments) / self.space.ranks
        return parameters * (value + max(4, value)) + state + config.cluster.memory_reserve_bytes

    def _kept_bytes(self, setting: RankSetting) -> int:
        """Returns the bytes that one sequence keeps in the whole model from forward to backward."""

        def predicted() -> int:
            whole = replace(setting, pipeline=1, micro_sequences=1)
            config = self.space.layout_config(whole, _FULL_BACKWARDS)
            batch = replace(config.batch, global_sequences=setting.data, ramp=None)
            mesh = replace(config.parallelism, cut=Cut("even"))
            return predict_memory(
                replace(config, batch=batch, parallelism=mesh, memory_cap=None)
            ).worst.pipeline.activations

        return self._once((setting.precision, setting.recompute, setting.context), predicted)

    def _once(self, key: object, compute: Callable[[], T]) -> T:
        """Returns a value that is computed at its first use."""
        if key not in self.known:
            self.known[key] = compute()
        return self.known[key]  # type: ignore[return-value]


@lru_cache(maxsize=64)
def _num_directions(kind: str) -> int:
    return 2 if SCHEDULES.get(kind).is_bidirectional() else 1


@lru_cache(maxsize=65536)
def _unit(setting: RankSetting) -> RankSetting:
    return replace(setting, micro_sequences=1)


def _least_compute(part: PartTimes, alone: float) -> float:
    """Returns the computation of the cheapest costs of a part; see the module."""
    forward = min(part.forward, alone * part.forward + part.forward_exchange)
    backward = min(part.backward_input, alone * part.backward_input + part.backward_exchange)
    return forward + backward + alone * part.backward_weight


def _idle_seconds(schedule: ScheduleConfig, pipeline: int, costs: Costs) -> float:
    """Returns the idle time of a rank by the published formula of a schedule, or a guess without one."""
    spec = SCHEDULES.get(schedule.kind)
    if spec.idle is not None:
        return spec.idle.value(pipeline, costs)
    if spec.takes_costs:
        return (pipeline - 1) * costs.forward / 2 / (schedule.chunks or 1)
    return (pipeline - 1) * (costs.forward + costs.backward_input + costs.backward_weight)
