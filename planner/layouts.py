"""Defines all layouts of a run on a number of ranks. No torch here."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations, product
from math import ceil, gcd, inf
from typing import TypeVar

from base.refusal import broken
from comm.config import Cut, DispatchConfig, ParallelismConfig
from data.config import BatchSizes
from dualpipe.costs import Costs
from dualpipe.registry import SCHEDULES, ScheduleConfig, is_closed_form
from model.config import LAYER, RECOMPUTED, Recomputed, all_recomputed
from model.size import HeldParameters, StageShape, held_parameters, stage_shapes
from planner.job_plan import PlannerConfig
from planner.scaling import KernelRates
from train.config import Precision, TrainConfig
from train.predict.fit import context_sizes
from train.predict.layer_times import LayerTimes, PartTimes, as_paired
from train.predict.memory import predict_memory, run_sizes
from train.predict.rank_bytes import state_bytes, value_bytes

MOST_RANKS = 2**20
_MOST_LAYOUTS = 3_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSetting:
    """Everything that a layout chooses, except its schedule."""

    mesh: ParallelismConfig
    micro_sequences: int
    precision: Precision
    recompute: tuple[Recomputed, ...]
    dispatch: DispatchConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """All layouts that a search compares."""

    config: TrainConfig
    ranks: int
    schedules: tuple[ScheduleConfig, ...]
    precisions: tuple[Precision, ...]
    recomputes: tuple[tuple[Recomputed, ...], ...]
    dispatches: tuple[DispatchConfig, ...]
    most_micro_sequences: float = inf

    def is_like_run(self, setting: RankSetting) -> bool:
        """Returns whether a setting differs from the run's own only in the number of data-parallel ranks."""
        run = self.config
        own = run.parallelism
        return (
            replace(setting.mesh, data=own.data, cut=own.cut) == own
            and setting.micro_sequences == run.batch.micro_sequences
            and setting.precision == run.precision
            and setting.dispatch == run.dispatch
            and all_recomputed(setting.recompute) == all_recomputed(run.recompute)
        )

    def settings(self) -> Iterator[RankSetting]:
        """Yields all settings of ranks, the smallest pipelines first."""
        self._check_size()
        for mesh in self._meshes():
            sizes = self._micro_batch_sizes(mesh)
            choices = [(kind, again) for kind in self.precisions for again in self._recomputes_of(kind)]
            for size, (precision, recompute), dispatch in product(sizes, choices, self.dispatches):
                yield RankSetting(
                    mesh=mesh, micro_sequences=size, precision=precision, recompute=recompute, dispatch=dispatch
                )

    def schedules_of(self, pipeline: int, context: int) -> tuple[ScheduleConfig, ...]:
        """Returns every kind of schedule with each number of chunks for which there are enough layers.

        Slices have the smallest number of chunks, as more chunks save little then. Ranks that share sequences run no
        slices.
        """
        schedules = []
        for schedule in self.schedules:
            if schedule.slices > 1 < context:
                continue
            first, *others = SCHEDULES.get(schedule.kind).chunk_choices(None)
            # A kind with too few layers for its smallest number of chunks is kept, so that the rules reject it.
            most = self.config.model.num_layers if schedule.slices == 1 else 0
            enough = [chunks for chunks in others if pipeline * chunks <= most]
            schedules += [replace(schedule, chunks=chunks) for chunks in (first, *enough)]
        return tuple(schedules)

    def layout_config(self, setting: RankSetting, schedule: ScheduleConfig) -> TrainConfig:
        """Returns the configuration of a layout."""
        return replace(
            self.config,
            parallelism=setting.mesh,
            batch=replace(self.config.batch, micro_sequences=setting.micro_sequences),
            precision=setting.precision,
            recompute=setting.recompute,
            dispatch=setting.dispatch,
            schedule=schedule,
        )

    def _micro_batch_sizes(self, mesh: ParallelismConfig) -> tuple[int, ...]:
        """Returns the sequences of a micro-batch that divide a data rank's share of the batch.

        Ranks that share sequences take one, or as many as the run: with more, fewer ranks could share each of them. If
        the ranks do not divide the batch, the result is 1, which rules reject.
        """
        share, rest = divmod(self.config.batch.global_sequences, mesh.data)
        sizes = (1,) if rest else tuple(size for size in divisors(share) if size <= self.most_micro_sequences)
        configured = self.config.batch.micro_sequences
        return sizes if mesh.context == 1 else tuple(size for size in sizes if size in (1, configured))

    def _check_size(self) -> None:
        choices = len(self.dispatches) * sum(len(self._recomputes_of(precision)) for precision in self.precisions)
        count = sum(len(self._micro_batch_sizes(mesh)) for mesh in self._meshes()) * choices * len(self.schedules)
        if count > _MOST_LAYOUTS:
            rule = f"a search may have at most {_MOST_LAYOUTS:,} layouts"
            size = f"{self.config.batch.global_sequences} with about {count:,} layouts for ranks={self.ranks}"
            raise broken("batch.global_sequences", rule, size, "a batch with fewer divisors")

    def _meshes(self) -> Iterator[ParallelismConfig]:
        """Yields the sizes of all axes, the smallest pipelines and context groups first."""
        layers = self.config.model.num_layers
        node = self.config.cluster.ranks_per_node
        cut = Cut("even" if self.config.parallelism.cut.kind == "even" else "auto")
        pipelines = [length for length in divisors(self.ranks) if length <= layers]
        # The first pipeline with more ranks than layers is kept, so that the rules reject it.
        longer = [length for length in divisors(self.ranks) if layers < length <= 2 * layers][:1]
        for pipeline, context in product((*pipelines, *longer), context_sizes(self.config)):
            stage_ranks = self.ranks // pipeline
            if stage_ranks % context:
                continue
            for expert in divisors(gcd(stage_ranks, self.config.model.num_routed_experts)):
                # Expert groups are within a node or fill whole nodes.
                if expert % node == 0 or node % expert == 0 or self.ranks <= node:
                    data = stage_ranks // context
                    yield ParallelismConfig(pipeline=pipeline, data=data, expert=expert, cut=cut, context=context)

    def _recomputes_of(self, precision: Precision) -> tuple[tuple[Recomputed, ...], ...]:
        """Returns the sets of recomputed parts for a precision. FP8 recomputes all but `layer` in any case."""
        if precision.kind != "fp8":
            return self.recomputes
        return tuple(
            recompute for recompute in self.recomputes if all_recomputed(recompute).issuperset(RECOMPUTED)
        ) or (RECOMPUTED,)


def recompute_sets() -> tuple[tuple[Recomputed, ...], ...]:
    """Returns all sets of recomputed parts, the largest first: `layer`, then its cheap parts."""
    sizes = range(len(RECOMPUTED), -1, -1)
    return ((LAYER,), *(chosen for size in sizes for chosen in combinations(RECOMPUTED, size)))


def adapted_run(config: TrainConfig, ranks: int) -> TrainConfig:
    """Returns a run with a batch that can be divided among some layouts of this many ranks.

    That is the run itself if possible. Otherwise its batch becomes the smallest multiple of the ranks that is not
    below it, without a ramp, in as many steps as process the same tokens.
    """
    batch = config.batch
    lengths = range(1, min(config.model.num_layers, ranks) + 1)
    contexts = context_sizes(config)
    meshes = ((length, context) for length in lengths for context in contexts if ranks % (length * context) == 0)
    if any(batch.global_sequences % (ranks // (length * context)) == 0 for length, context in meshes):
        return config
    sequences = ceil(batch.global_sequences / ranks) * ranks
    step = BatchSizes(sequences, batch.sequence_length_tokens, None).tokens_before(1)
    steps = ceil(config.batch_sizes.tokens_before(config.task.steps) / step)
    validation = ceil(config.validation.sequences / sequences) * sequences
    return replace(
        config,
        batch=replace(batch, global_sequences=sequences, ramp=None, micro_sequences=1),
        task=replace(config.task, steps=steps),
        validation=replace(config.validation, sequences=validation),
    )


def divisors(number: int) -> tuple[int, ...]:
    """Returns the divisors of a number that is at least 1, ascending."""
    small = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return tuple(sorted({*small, *(number // size for size in small)}))


_ROUNDING = 1 - 1e-9
"""Factor on least times, so that rounding never makes one larger than a simulated time."""
_PEAK_SHARES = {"v_min": 1 / 3, "v_half": 1 / 2}
"""Activations that these kinds keep relative to 1F1B (arXiv:2405.15362)."""
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


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """Arithmetic on the layouts of a search. What different layouts share is computed once."""

    space: SearchSpace
    planner: PlannerConfig
    cache: dict[object, object] = field(default_factory=dict)

    def ranked(self, setting: RankSetting, schedule: ScheduleConfig) -> RankedLayout:
        """Returns a layout with its estimates, without those of its time if it does not fit."""
        mesh = setting.mesh
        pipeline = mesh.pipeline
        micro = setting.micro_sequences
        shares = _num_directions(schedule.kind)
        copies = shares if pipeline % 2 == 0 else 1
        count = self.space.config.batch.global_sequences / mesh.data / micro
        slices = schedule.slices
        held = self._held(mesh.expert)
        static = self._static_bytes(setting, held, copies / pipeline)
        activations = micro * self._activation_bytes(setting) / pipeline
        pending, inside = (micro * size for size in self._backward_bytes(setting))
        alive = min(count, pipeline * _PEAK_SHARES.get(schedule.kind, 1.0) + 1)
        deferred = min(count, _num_deferred(schedule, pipeline))
        kept = max(0.0, alive - deferred) * activations + deferred * max(activations, pending / pipeline)
        layout = RankedLayout(
            setting=setting,
            schedule=schedule,
            least_seconds=0.0,
            seconds=0.0,
            least_memory=static + activations,
            memory=static + inside + kept,
        )
        if layout.least_memory > (self.space.config.cluster.memory_bytes or inf):
            return layout
        busy, path, mean = self._once(
            (setting, schedule.pairing, shares, slices), lambda: self._work(setting, schedule)
        )
        update = self._update_seconds(held.total * copies / pipeline)
        factor = self.planner.efficiency.unexplained
        busy *= count * slices
        idle = _idle_seconds(schedule, pipeline, mean)
        return replace(
            layout,
            least_seconds=factor * _ROUNDING * (max(busy, path) + update),
            seconds=factor * (max(busy + idle, path) + update),
        )

    def times(self, setting: RankSetting, slices: int = 1) -> LayerTimes:
        """Returns the times of the model's parts for one micro-batch, the same for all pipelines and data."""
        shared = (setting.mesh.pipeline > 1, setting.mesh.context, setting.mesh.expert, setting.micro_sequences)
        key = (*shared, setting.precision, setting.recompute, setting.dispatch, slices)
        config = self.space.layout_config(setting, replace(self.space.schedules[0], slices=slices))
        return self._once(key, lambda: self.planner.rates.part_seconds(config))

    def _work(self, setting: RankSetting, schedule: ScheduleConfig) -> tuple[float, float, Costs]:
        """Returns a micro-batch's least seconds on the busiest rank and on its way, and the mean rank's costs."""
        config = self.space.layout_config(setting, schedule)
        times = self.times(setting, schedule.slices)
        model = config.model
        pipeline = setting.mesh.pipeline
        shares = _num_directions(schedule.kind)
        alone = self.planner.rates.alone_factor(config)
        dense = as_paired(times.dense, config)
        moe = as_paired(times.moe, config)
        ends = [as_paired(part, config) for part in (times.embedding, times.head, times.mtp)]
        layers = ((model.num_dense_layers, dense), (model.num_layers - model.num_dense_layers, moe))
        parts = [(count, part) for count, part in layers if count] + [(1, part) for part in ends]
        # Ranks with the same layers share their micro-batches, and one of them has at least the mean of the layers.
        most_layers = ceil(model.num_layers * shares / pipeline) if pipeline % shares == 0 else 0
        busy = 0.0
        for lane in (lambda part: _least_compute(part, alone), lambda part: part.work.exchange):
            total = sum(count * lane(part) for count, part in parts)
            smallest = min(lane(part) for _, part in parts[:-3])
            busy = max(busy, total / pipeline, smallest * most_layers / shares, sum(map(lane, ends[1:])) / shares)
        sums = sum((part * count for count, part in parts), PartTimes())
        path = alone * (sums.forward + sums.backward_input) + sums.forward_exchange + sums.backward_exchange
        mean = Costs(
            forward=sums.forward / pipeline,
            backward_input=sums.backward_input / pipeline,
            backward_weight=sums.backward_weight / pipeline,
            exchange=sums.forward_exchange / pipeline,
            latency=times.latency_seconds,
        )
        return busy, path + 2 * (pipeline - 1) * times.latency_seconds, mean

    def _held(self, expert: int) -> HeldParameters:
        """Returns the parameters of a whole model with its experts divided among ranks."""
        model = self.space.config.model
        shapes = stage_shapes([range(model.num_layers)])
        local = model.num_routed_experts // expert
        return self._once(("held", expert), lambda: held_parameters(model, shapes, local))

    def _update_seconds(self, parameters: float) -> float:
        rates = self.planner.rates
        share = parameters / rates.reference.parameters_per_rank if isinstance(rates, KernelRates) else 1.0
        return rates.optimizer_seconds * share

    def _static_bytes(self, setting: RankSetting, held: HeldParameters, share: float) -> float:
        """Returns the bytes of the mean rank, with `share` of the model's copies, but no activations."""
        config = self.space.config
        parameters = held.total * share
        value = value_bytes(setting.precision)
        if config.optim.sharding == "replicated":
            state = parameters * 2 * (2 if config.optim.moments == "bf16" else max(4, value))
        else:
            state = 0.0 if config.optim.offload else state_bytes(config, self._held(1).total) / self.space.ranks
        codes = held.code_bytes * share if setting.precision.kind == "fp8" else 0.0
        return parameters * (value + max(4, value)) + state + codes + config.cluster.memory_reserve_bytes

    def _activation_bytes(self, setting: RankSetting) -> int:
        """Returns the bytes that one sequence keeps in the whole model from forward to backward."""

        def predicted() -> int:
            mesh = replace(setting.mesh, pipeline=1, cut=Cut("even"))
            config = self.space.layout_config(replace(setting, mesh=mesh, micro_sequences=1), _FULL_BACKWARDS)
            batch = replace(config.batch, global_sequences=mesh.data, ramp=None)
            return predict_memory(replace(config, batch=batch, memory_cap=None)).worst.pipeline.activations

        return self._once((setting.precision, setting.recompute, setting.mesh.context), predicted)

    def _backward_bytes(self, setting: RankSetting) -> tuple[int, int]:
        """Returns the bytes of a sequence that all layers keep from I to W, and one takes in its backward."""

        def predicted() -> tuple[int, int]:
            config = self.space.layout_config(replace(setting, micro_sequences=1), _FULL_BACKWARDS)
            inner = StageShape(layers=range(config.model.num_layers), is_first=False, is_last=False)
            phases = run_sizes(config, [inner]).stages[0][0]
            return sum(phase.waiting for phase in phases), max(phase.backward_peak for phase in phases)

        return self._once(("backward", setting.precision, setting.recompute, setting.mesh.context), predicted)

    def _once(self, key: object, compute: Callable[[], T]) -> T:
        """Returns a value that is computed at its first use."""
        if key not in self.cache:
            self.cache[key] = compute()
        return self.cache[key]  # type: ignore[return-value]


@lru_cache(maxsize=64)
def _num_directions(kind: str) -> int:
    return 2 if SCHEDULES.get(kind).is_bidirectional() else 1


def _num_deferred(schedule: ScheduleConfig, pipeline: int) -> int:
    """Returns about how many micro-batches of a rank wait for W; searched orders defer nearly all."""
    spec = SCHEDULES.get(schedule.kind)
    if schedule.kind in ("zb_v", "zb1p"):
        return pipeline
    if spec.takes_costs and not is_closed_form(schedule.kind, schedule.chunks, schedule.slices):
        return pipeline if spec.is_bidirectional() else 2 * pipeline
    return int(schedule.kind != _FULL_BACKWARDS.kind)


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
