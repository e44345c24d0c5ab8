"""Plans a run: memory of every rank, time of a step, cost, and assumptions. No torch here."""

from dataclasses import dataclass, replace

from dualpipe.ir import Schedule
from model.size import count_parameters, training_flops_per_token
from train.config import DEFAULT_COST, TrainConfig
from train.config.errors import ConfigError
from train.memory import JobMemory, predict_memory, summary_line
from train.memory.fitted_cut import fitted_cut
from train.planner.assumptions import Assumption, assumptions
from train.planner.config import EfficiencyConfig, KernelRates, Rates
from train.planner.cost import JobCost, job_cost
from train.planner.measured.record import layer_parameters
from train.planner.timing import TimedPlan, part_seconds, time_plan
from train.schedule.cut import with_cut


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannerConfig:
    """What a plan is computed from, in addition to the run's configuration."""

    rates: Rates
    efficiency: EfficiencyConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class JobPlan:
    """What a run needs, how long it takes and what it costs.

    Attributes:
        config: of the run, with the planned cut and a named schedule.
        parameters: weights of the main model.
        flops_per_token: of training.
        memory: predicted peak of each pipeline rank.
        reasons: why the run does not fit; empty if it does, or if the devices' memory is unknown.
        timed: schedule and time of a step; None if the rates do not apply.
        untimed: why there is no time; empty if there is.
        cost: None without a time.
        assumptions: what the figures rest on.
    """

    config: TrainConfig
    parameters: int
    flops_per_token: float
    memory: JobMemory
    reasons: tuple[str, ...]
    timed: TimedPlan | None
    untimed: str
    cost: JobCost | None
    assumptions: tuple[Assumption, ...]

    @property
    def fits(self) -> bool:
        """Whether no rank needs more than its device has."""
        return not self.reasons


def plan_job(config: TrainConfig, planner: PlannerConfig, schedule: Schedule | None = None) -> JobPlan:
    """Plans a run.

    Args:
        config: of the run, which passes the rules.
        planner: rates and the declared factor.
        schedule: that the run follows; None: it is built.

    Raises:
        ScheduleError, CutError: the schedule or the cut is not defined.
    """
    untimed = untimed_reason(config, planner.rates)
    # A run with schedule=auto measures before it cuts the model; any other uses the configured costs.
    measures = config.schedule.kind == "auto" and not untimed
    times = part_seconds(planner.rates, config) if measures else None
    config = with_cut(config, fitted_cut(config, config.schedule.kind, times))
    memory = predict_memory(_without_speed(config))
    room, worst = config.cluster.memory_bytes, memory.worst
    reasons = () if room is None or worst.total <= room else (summary_line(config, memory),)
    timed = cost = None
    if not untimed:
        timed = time_plan(planner.rates, planner.efficiency, config, schedule=schedule)
        cost = job_cost(config, planner.rates, planner.efficiency, timed.time, schedule)
        config = replace(config, schedule=replace(config.schedule, kind=timed.schedule.kind))
    return JobPlan(
        config=config,
        parameters=count_parameters(config.model).total,
        flops_per_token=training_flops_per_token(config.model, config.batch.sequence_length_tokens),
        memory=memory,
        reasons=reasons,
        timed=timed,
        untimed=untimed,
        cost=cost,
        assumptions=() if untimed else assumptions(config, planner.rates, planner.efficiency),
    )


def _without_speed(config: TrainConfig) -> TrainConfig:
    """Returns a run without what only its time depends on, so that predictions of memory are shared."""
    timeless = replace(
        config.cluster,
        peak_flops=None,
        num_sms=None,
        communication_sms=None,
        inter_node_bytes_per_second=None,
        intra_node_bytes_per_second=None,
        memory_bytes_per_second=None,
        dollars_per_gpu_hour=None,
    )
    return replace(config, cluster=timeless, cost=DEFAULT_COST)


def untimed_reason(config: TrainConfig, rates: Rates) -> str:
    """Returns why the time of a run cannot be predicted from rates, or nothing if it can."""
    if not isinstance(rates, KernelRates):
        own = layer_parameters(config.model)
        if rates.layer_parameters != own:
            rule = f"must be of the run's layers, in which a token uses {own:,} weights"
            return f"rates: {rule}, are of layers with {rates.layer_parameters:,}; nearest: rates=RUN of such a run"
        if rates.precision != config.precision.kind:
            rule = f"must be of a run with precision={config.precision.kind}"
            return f"rates: {rule}, are of {rates.precision}; nearest: precision={rates.precision}"
        if rates.expert == 1 < config.parallelism.expert:
            rule = "must be of a run with experts on several ranks, as parallelism.expert has"
            return f"rates: {rule}, are of one rank; nearest: parallelism.expert=1, or rates=RUN of such a run"
        if rates.context != config.parallelism.context:
            rule = f"must be of a run with parallelism.context={config.parallelism.context}"
            return f"rates: {rule}, are of {rates.context}; nearest: parallelism.context={rates.context}"
        return ""
    if config.cluster.peak_flops is None:
        rule = "must be known for rates of another device, is null"
        return f"cluster.peak_flops: {rule}; nearest: cluster=h800, or rates=RUN"
    if config.precision.kind not in ("fp8", "bf16"):
        return f"precision: must be fp8 or bf16 for these rates, is {config.precision.kind}; nearest: precision=bf16"
    return ""


def require_time(plan: JobPlan) -> TimedPlan:
    """Returns the schedule and time of a plan.

    Raises:
        ConfigError: the rates do not apply to the run.
    """
    if plan.timed is None:
        raise ConfigError(plan.untimed)
    return plan.timed
