"""Plans a run: memory of every rank, time of a step, cost, and what they rest on. No torch here.

A plan counts parameters and optimizer state by arithmetic (`train.predict`). Ranks that another process builds, with
torch's fake process group and tensors without memory, check that against the real model and optimizer.
"""

import math
import multiprocessing
import pickle
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from base.decode import encode, flatten
from base.refusal import ConfigError
from base.registry import load_plugins, loaded_plugins
from dualpipe.ir import Schedule
from model.size import stage_shapes
from planner.rollouts import RolloutPlan, plan_rollouts, with_rollouts
from planner.scaling import KernelRates, Rates, rows_per_token
from train.config import DEFAULT_COST, TrainConfig
from train.predict.cut import run_cut, with_cut
from train.predict.fit import fitted_cut, shortage, with_fitting_cap
from train.predict.measured import layer_parameters
from train.predict.memory import JobMemory, predict_memory, rank_memory
from train.predict.timing import (
    SLICES,
    EfficiencyConfig,
    StepTime,
    TimedPlan,
    fastest_slices,
    planning_schedule,
    time_plan,
)
from train.report.plan_comparison import Comparison, compare, with_measured_schedule
from train.tasks.registry import TASKS

_SPEEDS = (
    *("peak_flops", "num_sms", "communication_sms", "inter_node_bytes_per_second", "intra_node_bytes_per_second"),
    *("memory_bytes_per_second", "host_memory_bytes_per_second", "host_link_bytes_per_second", "dollars_per_gpu_hour"),
)
"""Keys of the cluster on which no memory depends."""
_MEASURED = ("model.num_layers", "model.num_dense_layers", "model.mtp_depth")
_UNMEASURED = (
    *("model.", "attention.", "dispatch.", "optim.", "batch.micro_sequences.", "batch.sequence_length_tokens."),
    *("parallelism.expert.", *(f"cluster.{key}." for key in _SPEEDS if key != "dollars_per_gpu_hour")),
)
"""Keys that change the time of a run's step, and keys below them, on which rates of a run do not depend."""
_HOUR = 3600.0
_DAY_HOURS = 24.0
_TRILLION = 1e12
_LARGEST_EXPONENT = 700.0

_UNITS = {
    "seconds": "s",
    "tokens": "tokens",
    "flops": "FLOP/s",
    "flops_per_second": "FLOP/s",
    "bytes_per_second": "bytes/s",
    "bytes": "bytes",
    "sms": "SMs",
    "hour": "$ per GPU-hour",
    "hours": "h",
    "gpu": "W",
}
_TIMED = ("attention", "experts", "exchange", "recomputed", "times")
_MOST_PADDING = 12 * 12
"""ZeRO-1 rounds the shard of a parameter group up to a whole element, of 12 bytes; a rank has at most 12 groups."""
_COUNTED = {
    "parameters": "parameters",
    "weights_bytes": "bytes of weights",
    "gradients_bytes": "bytes of gradients",
    "optimiser_bytes": "bytes of optimizer",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannerConfig:
    """What a plan is computed from, in addition to the run's configuration."""

    rates: Rates
    efficiency: EfficiencyConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class JobPlan:
    """What a run needs, how long it takes and what it costs.

    `slices` has the seconds of a step by the number of slices, if `schedule=auto` has compared them.
    """

    config: TrainConfig
    memory: JobMemory
    reason: str
    timed: TimedPlan | None
    slices: Mapping[int, float]
    rollouts: RolloutPlan | None
    untimed: str
    cost: dict[str, Any] | None
    assumptions: tuple[dict[str, Any], ...]

    @property
    def fits(self) -> bool:
        """Whether no rank needs more than its device has."""
        return not self.reason


def plan_job(config: TrainConfig, planner: PlannerConfig, schedule: Schedule | None = None) -> JobPlan:
    """Plans a run.

    Raises:
        ScheduleError, CutError: the schedule or the cut is not defined.
    """
    untimed = untimed_reason(config, planner.rates)
    # A run with schedule=auto measures before it cuts the model; any other uses the configured costs.
    measures = config.schedule.kind == "auto" and not untimed
    slices = dict[int, float]()
    # Rates of a run say nothing of smaller products, and a configured number of slices is kept.
    is_free = measures and config.schedule.slices == 1 and isinstance(planner.rates, KernelRates)
    if is_free and config.parallelism.context == 1 and TASKS.get(config.task.kind).splits_sequences:
        slices = _compare_slices(planner, config)
        config = _with_slices(config, fastest_slices(slices))
    times = planner.rates.part_seconds(config) if measures else None
    config = with_cut(config, fitted_cut(config, config.schedule.kind, times))
    memory = predict_memory(_without_speed(config))
    timed = cost = rollouts = None
    if not untimed:
        timed = time_plan(planner.rates, planner.efficiency, config, schedule=schedule)
        if (rollouts := plan_rollouts(config, planner.rates, timed)) is not None:
            timed = with_rollouts(timed, rollouts, config, planner.efficiency)
        cost = job_cost(config, planner, timed.time, schedule)
        schedule = timed.schedule
        chunks = schedule.num_stages // schedule.num_ranks
        config = replace(config, schedule=replace(config.schedule, kind=schedule.kind, chunks=chunks))
    return JobPlan(
        config=config,
        memory=memory,
        reason=shortage(config, memory),
        timed=timed,
        slices=slices,
        rollouts=rollouts,
        untimed=untimed,
        cost=cost,
        assumptions=() if untimed else tuple(_assumptions(config, planner)),
    )


def _compare_slices(planner: PlannerConfig, config: TrainConfig) -> dict[int, float]:
    """Returns the seconds of a step by the number of slices, until more are slower or not possible.

    Each number has the memory cap and the cut with which it is planned.
    """
    steps = dict[int, float]()
    for slices in (1, *SLICES):
        run = _with_slices(config, slices)
        try:
            run = with_cut(run, fitted_cut(run, run.schedule.kind, planner.rates.part_seconds(run)))
            if slices > 1 and shortage(run, predict_memory(_without_speed(run))):
                break
            steps[slices] = time_plan(planner.rates, planner.efficiency, run).time.step
        except ValueError:
            if slices == 1:
                raise
            break
        if steps[slices] > min(steps.values()):
            break
    return steps


def _with_slices(config: TrainConfig, slices: int) -> TrainConfig:
    return with_fitting_cap(replace(config, schedule=replace(config.schedule, slices=slices)))


def compared_plan(config: TrainConfig, planner: PlannerConfig, folder: Path) -> tuple[JobPlan, Comparison]:
    """Plans a run with the schedule and the cut that it follows, and compares.

    Raises:
        ConfigError: the run has measured nothing yet, a file is not what a run writes, or the rates do not apply.
    """
    config, schedule, device = with_measured_schedule(config, folder)
    plan = plan_job(config, planner, schedule)
    return plan, compare(plan.config, require_time(plan), None if device == "cpu" else plan.memory, folder)


def _without_speed(config: TrainConfig) -> TrainConfig:
    """Returns a run without what only its time depends on, so that predictions of memory are shared."""
    timeless: Any = dict.fromkeys(_SPEEDS)
    cluster = replace(config.cluster, **timeless)
    return replace(config, cluster=cluster, cost=DEFAULT_COST)


def require_time(plan: JobPlan) -> TimedPlan:
    """Returns the schedule and time of a plan; raises ConfigError if the rates do not apply to the run."""
    if plan.timed is None:
        raise ConfigError(plan.untimed)
    return plan.timed


def untimed_reason(config: TrainConfig, rates: Rates) -> str:
    """Returns why the time of a run cannot be predicted from rates, or nothing if it can."""
    if isinstance(rates, KernelRates):
        return _kernels_reason(config)
    for key, (value, near) in config.planned_only.items():
        return f"{key}: is planned with rates of kernels alone, is {value}; nearest: {near}"
    scope = rates.scope
    parameters = layer_parameters(config.model)
    mesh = config.parallelism
    if scope.layer_parameters != parameters:
        rule = f"must be of the run's layers, in which a token uses {parameters:,} weights"
        return f"rates: {rule}, are of layers with {scope.layer_parameters:,}; nearest: rates=RUN of such a run"
    if scope.precision != config.precision.kind:
        rule = f"must be of a run with precision={config.precision.kind}"
        return f"rates: {rule}, are of {scope.precision}; nearest: precision={scope.precision}"
    if scope.expert == 1 < mesh.expert:
        rule = "must be of a run with experts on several ranks, as parallelism.expert has"
        return f"rates: {rule}, are of one rank; nearest: parallelism.expert=1, or rates=RUN of such a run"
    if scope.context != mesh.context:
        rule = f"must be of a run with parallelism.context={mesh.context}"
        return f"rates: {rule}, are of {scope.context}; nearest: parallelism.context={scope.context}"
    if scope.mtp_depth == 0 < config.model.mtp_depth:
        return "rates: must be of a run with MTP modules, are of one without; nearest: model.mtp_depth=0"
    names = config.computing.recomputed_names
    if scope.recomputed not in (None, names):
        measured = f"recompute=[{','.join(scope.recomputed or ())}]"
        return f"rates: must be of a run with recompute=[{','.join(names)}], are of {measured}; nearest: {measured}"
    return ""


def _kernels_reason(config: TrainConfig) -> str:
    """Returns why rates of kernels do not apply to a run, or nothing if they do."""
    if config.cluster.peak_flops is None:
        rule = "must be known for rates of another device, is null"
        near = "cluster=h800, or rates=RUN"
        if config.cluster.device == "cpu":
            near = "launch.train with the same keys and task.steps=20, and then rates= with that run's folder"
        return f"cluster.peak_flops: {rule}; nearest: {near}"
    kind = config.precision.kind
    if kind not in ("fp8", "bf16"):
        return f"precision: must be fp8 or bf16 for these rates, is {kind}; nearest: precision=bf16"
    return ""


def unmeasured_note(before: TrainConfig, after: TrainConfig, rates: Rates) -> str | None:
    """Returns what a change of a run does not change in rates of a run, or None."""
    old, new = (dict(flatten(encode(config))) for config in (before, after))
    keys = (key for key in old | new if old.get(key) != new.get(key) and key not in _MEASURED)
    unknown = [key for key in keys if f"{key}.".startswith(_UNMEASURED)]
    if not unknown or isinstance(rates, KernelRates):
        return None
    scaled = "; a micro-batch takes time in proportion to its tokens" if any("batch" in key for key in unknown) else ""
    return f"rates of a run do not measure what {', '.join(unknown)} changes{scaled}"


def job_cost(
    config: TrainConfig, planner: PlannerConfig, time: StepTime, schedule: Schedule | None = None
) -> dict[str, Any]:
    """Returns the cost of a run and of the stages in `config.cost`; what is unknown is None.

    Every step is priced as one of the largest batch: a token of a ramp's smaller batches costs the same. In stages with
    longer sequences, ranks share each sequence, so that a micro-batch has as many tokens on each rank as the run's. The
    layout that DeepSeek-V3 used for them is unknown. GPU-hours are divided by the share of the goodput, if it is known.
    """
    ranks = config.parallelism.world_size
    cost = config.cost
    goodput = _goodput(config, time)
    share = 1.0 if goodput is None else goodput["share"]
    per_token = 1 / (time.tokens_per_second_per_gpu * _HOUR)
    price = config.cluster.dollars_per_gpu_hour
    watts = cost.watts_per_gpu

    def stage(name: str, tokens: int | None, hours: float, note: str) -> dict[str, Any]:
        return {
            "name": name,
            "tokens": tokens,
            "gpu_hours": hours,
            "dollars": None if price is None else hours * price,
            "days": hours / ranks / _DAY_HOURS,
            "kilowatt_hours": None if watts is None else hours * watts / 1000,
            "note": note,
        }

    tokens = config.batch_sizes.tokens_before(config.task.steps)
    stages = [stage(config.task.kind, tokens, tokens * per_token / share, "steps of the largest batch")]
    if longer := cost.context_extension:
        step_tokens = config.batch.global_sequences * config.batch.sequence_length_tokens
        hours = 0.0
        for part in longer:
            length = part.sequence_length_tokens
            step = time_plan(planner.rates, planner.efficiency, config, length, schedule).time.step
            hours += step * ranks / _HOUR * part.tokens / step_tokens / share
        lengths = " and ".join(f"{part.sequence_length_tokens:,}" for part in longer)
        note = f"sequences of {lengths} tokens, each shared by ranks; the layout of the published run is unknown"
        stages.append(stage("context_extension", sum(part.tokens for part in longer), hours, note))
    if hours := cost.post_training_gpu_hours:
        stages.append(stage("post_training", None, hours, "cost.post_training_gpu_hours, an input"))
    summed = ("gpu_hours", "dollars", "kilowatt_hours")
    sums = {key: None if stages[0][key] is None else sum(part[key] for part in stages) for key in summed}
    return {
        "gpu_hours_per_trillion_tokens": per_token * _TRILLION / share,
        "stages": stages,
        "goodput": goodput,
        **sums,
    }


def _goodput(config: TrainConfig, time: StepTime) -> dict[str, Any] | None:
    """Returns the share of time with progress that is kept, if failures repeat steps.

    `best_interval_seconds` is Young's approximation; None if checkpoints take no time.
    """
    cost = config.cost
    if cost.gpu_mtbf_hours is None:
        return None
    job_seconds = cost.gpu_mtbf_hours * _HOUR / config.parallelism.world_size
    interval = (config.checkpointing.every_steps or config.task.steps) * time.step
    # Failures arrive at a constant rate, and each repeats the interval: an interval of length t takes
    # mtbf (exp(t / mtbf) - 1) in the mean, with exp(t / mtbf) - 1 failures.
    failures = math.expm1(min(_LARGEST_EXPONENT, (interval + cost.checkpoint_seconds) / job_seconds))
    return {
        "share": interval / (failures * (job_seconds + cost.restart_seconds)),
        "job_mtbf_hours": job_seconds / _HOUR,
        "checkpoint_interval_seconds": interval,
        "best_interval_seconds": math.sqrt(2 * cost.checkpoint_seconds * job_seconds) or None,
    }


def layout_json(config: TrainConfig) -> dict[str, Any]:
    """Returns the layout of a run with a listed cut in its public form."""
    mesh = config.parallelism
    return {
        "ranks": mesh.world_size,
        "pipeline": mesh.pipeline,
        "data": mesh.data,
        "context": mesh.context,
        "tensor": mesh.tensor,
        "expert": mesh.expert,
        "schedule": config.schedule.kind,
        "chunks": len(mesh.cut.layers) // mesh.pipeline,
        "slices": config.schedule.slices,
        "num_micro_batches": config.num_micro_batches,
        "micro_batch_sequences": config.batch.micro_sequences,
        "cut": list(mesh.cut.layers),
        "recompute": list(config.recompute),
        "precision": config.precision.kind,
        "dispatch": config.dispatch.kind,
    }


def _assumptions(config: TrainConfig, planner: PlannerConfig) -> Iterator[dict[str, Any]]:
    """Yields what a plan rests on: times of layers, rates, devices, links, and the declared factor."""
    rates = planner.rates
    times = rates.part_seconds(config)

    def assumption(name: str, value: float, unit: str, source: str) -> dict[str, Any]:
        return {"name": name, "value": value, "unit": unit, "source": source}

    unit = f"s per layer and {config.batch.micro_sequences * config.mean_part_tokens:,.0f} tokens"
    for name in ("dense", "moe", "head", "mtp"):
        kernels = "head_flops_per_second" if name == "head" else "attention"
        source = f"scaled from {_source_of(rates, kernels if isinstance(rates, KernelRates) else 'times')}"
        for phase, seconds in encode(getattr(times, name)).items():
            if seconds:
                yield assumption(f"{name}.{phase}", seconds, unit, source)
    for name, value in _numbers({key: value for key, value in encode(rates).items() if key not in ("kind", "sources")}):
        unit = _unit_of(name) or ("s per layer" if name.partition(".")[0] in _TIMED else "number")
        yield assumption(f"rates.{name}", value, unit, _source_of(rates, name))
    for name, value in _numbers({"cluster": encode(config.cluster), "cost": encode(config.cost)}):
        last = name.rpartition(".")[2]
        # A key of one word, such as `cluster.device`, has no unit.
        if "_" in last and _unit_of(name) and not last.startswith(("timeout", "grace")):
            yield assumption(name, value, _unit_of(name), "configuration")
    rows = rows_per_token(config).across_nodes
    yield assumption("rows_across_nodes", rows, "rows per token and dispatch", "random scores, experts equally loaded")
    factor = planner.efficiency.unexplained
    yield assumption("efficiency.unexplained", factor, "factor on a step", "declared: what no rate explains")


def _unit_of(name: str) -> str:
    last = name.rpartition(".")[2]
    return next((unit for end, unit in _UNITS.items() if last == end or last.endswith(f"_{end}")), "")


def _numbers(values: Mapping[str, object]) -> list[tuple[str, float]]:
    return [(key, value) for key, value in flatten(values) if type(value) in (int, float)]


def _source_of(rates: Rates, name: str) -> str:
    """Returns where a rate comes from: the source with the longest key that is a prefix of its name."""
    sources = [
        (len(key), source.text)
        for source in rates.sources
        for key in source.keys
        if name == key or name.startswith(f"{key}.") or key == "all"
    ]
    return max(sources)[1] if sources else "not given"


def compare_built_ranks(config: TrainConfig) -> list[dict[str, Any]]:
    """Builds one rank of each kind and compares what it holds with arithmetic."""
    counted = _count_by_arithmetic(config)
    return [compared_kind(built, counted) for built in build_ranks(config)]


def compared_kind(built: Mapping[str, Any], counted: Mapping[int, Mapping[str, int]]) -> dict[str, Any]:
    """Returns a built rank next to what arithmetic counts for each pipeline rank of its kind."""
    # All ranks of a kind must be as arithmetic says, not only the one that was built.
    differences = dict.fromkeys(
        f"{name}: built {built[key]:,}, by arithmetic {counted[rank][key]:,}"
        for rank in built["pipeline_ranks"]
        for key, name in _COUNTED.items()
        if abs(built[key] - counted[rank][key]) > (_MOST_PADDING if key == "optimiser_bytes" else 0)
    )
    return {**built, "equal": not differences, "differences": list(differences)}


def _count_by_arithmetic(config: TrainConfig) -> dict[int, dict[str, int]]:
    """Returns what each pipeline rank holds of the network that is trained, without second networks."""
    schedule = planning_schedule(config, config.num_micro_batches)
    shapes = stage_shapes(run_cut(config, schedule.placement))
    ranks = [rank_memory(config, schedule, rank, shapes) for rank in range(schedule.num_ranks)]
    sizes = ((rank.parameters, rank.weights, rank.gradients, rank.optimizer) for rank in ranks)
    return {number: dict(zip(_COUNTED, counts, strict=True)) for number, counts in enumerate(sizes)}


def build_ranks(config: TrainConfig) -> list[dict[str, Any]]:
    """Builds the first rank of every distinct set of stages, in a process that ends with the call.

    A process can have only one `torch.distributed`. `config` has the cut that the run uses. Counts are those of the
    network that is trained, without the padding of the optimizer's shards; all data replicas hold as much.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        # Plugins may define classes of the configuration, so they are loaded before it is unpickled.
        return pool.submit(_build, loaded_plugins(), pickle.dumps(config)).result()


def _build(plugins: Sequence[Path], pickled_config: bytes) -> list[dict[str, Any]]:
    from planner.fake_world import build_distinct_ranks

    load_plugins(plugins)
    config = pickle.loads(pickled_config)
    assert isinstance(config, TrainConfig)
    return build_distinct_ranks(config)
