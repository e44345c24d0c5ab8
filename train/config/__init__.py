"""Defines the configuration of a run; `conf/` explains its keys. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal, Self

from base.decode import decode, encode
from base.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ShareBelowOne, ZeroOrAbove
from base.refusal import ConfigError
from comm.config import ClusterConfig, DispatchConfig, ParallelismConfig
from comm.dispatch.registry import DISPATCHERS, DispatchSite, TokenSizes
from data.config import BatchRamp, BatchSizes, DataConfig
from dualpipe.costs import Costs
from dualpipe.registry import ScheduleConfig
from evaluation.protocol import EVALUATION_TASKS, EvaluationTaskConfig
from infer.cohorts import PROMPT_TOKENS
from kernels.attention import ATTENTION
from model.config import BalanceOver, Computing, InferencePrecision, ModelConfig, Products, Recomputed
from model.size import slice_lengths
from score.reward import RewardConfig
from train.config.tasks import TASKS, RolloutConfig
from train.optim.learning_rate import OptimConfig
from train.optim.registry import OPTIMIZERS

_SCHEDULE_RULE = "must be a number, or a list of {from_tokens, value} whose first has from_tokens: 0"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPoint:
    """A value, and the number of tokens of the run from which on it is used."""

    from_tokens: int
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSchedule:
    """A number, 0 or above, that is piecewise constant over the tokens of the run.

    YAML and the command line write it as a number, or as a list: `[{from_tokens: 0, value: 0.3}, {from_tokens: 10e12,
    value: 0.1}]`. The value of a step depends only on the tokens that were read before it, not on the layout or on the
    step from which the run was resumed.
    """

    points: tuple[TokenPoint, ...]

    @classmethod
    def constant(cls, value: float) -> Self:
        """Returns the schedule with one value for the whole run."""
        return cls(points=(TokenPoint(from_tokens=0, value=value),))

    @classmethod
    def from_plain(cls, value: object) -> Self:
        """Reads a schedule from a number or a list."""
        if not isinstance(value, list | tuple):
            return cls.constant(_value(value, value))
        points = tuple(_point(item) for item in value)
        starts = [point.from_tokens for point in points]
        if not starts or starts[0] != 0:
            raise ValueError(f"{_SCHEDULE_RULE}, is {value!r}")
        if starts != sorted(set(starts)):
            raise ValueError(f"from_tokens must increase from one to the next, are {', '.join(map(str, starts))}")
        return cls(points=points)

    def to_plain(self) -> object:
        """Returns what `from_plain` reads."""
        if len(self.points) == 1:
            return self.points[0].value
        return [{"from_tokens": point.from_tokens, "value": point.value} for point in self.points]

    def at(self, tokens: int) -> float:
        """Returns the value of a step."""
        return next(point.value for point in reversed(self.points) if point.from_tokens <= tokens)


def _point(item: object) -> TokenPoint:
    if not isinstance(item, Mapping) or set(item) != {"from_tokens", "value"}:
        raise ValueError(f"{_SCHEDULE_RULE}, one is {item!r}")
    tokens = _number(item["from_tokens"])
    if tokens is None or tokens < 0 or tokens != tokens.to_integral_value():
        raise ValueError(f"from_tokens must be a whole number of 0 or above, is {item['from_tokens']!r}")
    return TokenPoint(from_tokens=int(tokens), value=_value(item["value"], item))


def _value(value: object, shown: object) -> float:
    number = _number(value)
    if number is None:
        raise ValueError(f"{_SCHEDULE_RULE}, is {shown!r}")
    if number < 0:
        raise ValueError(f"must be 0 or above, is {value}")
    return float(number)


def _number(value: object) -> Decimal | None:
    """Returns a finite number, or None. YAML 1.1 reads numbers such as 14.3e12 as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = Decimal(str(value).replace("_", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


_Names = tuple[Annotated[str, EVALUATION_TASKS], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationTasksConfig:
    """Evaluation tasks, and pairs of a registered task's name and its configuration."""

    tasks: tuple[str, ...]
    configured: tuple[tuple[str, EvaluationTaskConfig], ...] = ()

    @property
    def settings(self) -> dict[str, EvaluationTaskConfig]:
        """The configuration of each registered task that has one, by name."""
        return dict(self.configured)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "EvaluationTasksConfig":
        """Decodes the key `tasks` and a group of keys for each task."""
        names: tuple[str, ...] = decode(_Names, values.get("tasks"), "tasks")
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"tasks: must name a task once, is {list(names)}; nearest valid: one {name}")
        configured = tuple(
            (name, decode(spec.config, values.get(name, {}), name))
            for name, spec in EVALUATION_TASKS.items()
            if name in values or name in names
        )
        return cls(tasks=names, configured=configured)

    def to_plain(self) -> dict[str, Any]:
        """Returns the values that `from_plain` reads."""
        return {"tasks": list(self.tasks), **{name: encode(setting) for name, setting in self.settings.items()}}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Interval:
    every_steps: NonNegativeInt


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEvaluationConfig:
    """Evaluations during training."""

    every_steps: int
    tasks: EvaluationTasksConfig

    @classmethod
    def from_plain(cls, values: object) -> "RunEvaluationConfig":
        """Decodes the keys `every_steps` and `tasks`, and a group of keys for each task."""
        if not isinstance(values, Mapping):
            raise ValueError(f"must hold keys and values, is {values!r}")
        task_keys = ("tasks", *EVALUATION_TASKS.names())
        other_values = {key: value for key, value in values.items() if key not in task_keys}
        tasks = EvaluationTasksConfig.from_plain({key: values[key] for key in task_keys if key in values})
        return cls(every_steps=decode(_Interval, other_values).every_steps, tasks=tasks)

    def to_plain(self) -> dict[str, Any]:
        """Returns the values that `from_plain` reads."""
        return {"every_steps": self.every_steps, **self.tasks.to_plain()}


NO_EVALUATION = RunEvaluationConfig(every_steps=0, tasks=EvaluationTasksConfig(tasks=()))


@dataclass(frozen=True, kw_only=True, slots=True)
class StopGuardConfig:
    """A guard that ends the run if a step's loss or gradient norm is not finite, or is a spike.

    A spike is larger than `spike_factor` times the median of the previous `spike_window_steps` steps. Steps before the
    window is full are not spikes, and with `spike_factor` 0 no step is.
    """

    kind: Literal["stop"]
    spike_factor: Annotated[float, ZeroOrAbove(1)]
    spike_window_steps: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipGuardConfig:
    """A guard that skips refused steps, and ends the run after more than `max_consecutive` in a row."""

    kind: Literal["skip"]
    spike_factor: Annotated[float, ZeroOrAbove(1)]
    spike_window_steps: PositiveInt
    max_consecutive: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class RollBackGuardConfig:
    """A guard that rolls back to the newest checkpoint, and skips the refused batch on the second pass.

    The run ends after more than `max_consecutive` rollbacks without a step beyond the last refused one.
    """

    kind: Literal["roll_back"]
    spike_factor: Annotated[float, ZeroOrAbove(1)]
    spike_window_steps: PositiveInt
    max_consecutive: PositiveInt


GuardConfig = StopGuardConfig | SkipGuardConfig | RollBackGuardConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """The type of weights and activations; gradients accumulate in float32, or as wider weights."""

    kind: Literal["float64", "float32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8PrecisionConfig:
    """FP8 mixed precision (arXiv:2412.19437, section 3.3).

    Weights and activations are bf16. Matrix products of linear layers and what is kept for the backward are FP8. Rows
    are dispatched to experts in FP8, independently of `dispatch.payload`.
    """

    kind: Literal["fp8"]
    scales: Literal["float32", "power_of_two"]
    gradient_blocks: bool = False


Precision = PrecisionConfig | Fp8PrecisionConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceConfig:
    """Weights that ranks hold together to generate, under the placement of a kind of schedule.

    `ckpt` is a Hugging Face folder, converted weights, a run's folder or a checkpoint. `dispatch`: None for one
    all-to-all without a limit of nodes.
    """

    ckpt: str
    weights: Literal["trained", "ema"]
    model: ModelConfig
    dtype: InferencePrecision
    cluster: ClusterConfig
    parallelism: ParallelismConfig
    kind: str
    cut: tuple[range, ...]
    dispatch: DispatchConfig | None = None

    @property
    def dispatch_site(self) -> DispatchSite:
        """The sizes of what a rank dispatches to experts that are in order, and the ranks that take part."""
        model = self.model
        tokens = TokenSizes(
            max_tokens=PROMPT_TOKENS, hidden_size=model.hidden_size, num_choices=model.num_experts_per_token
        )
        return DispatchSite(
            cluster=self.cluster,
            parallelism=self.parallelism,
            precision=self.dtype,
            tokens=tokens,
            num_experts=model.num_routed_experts,
            num_groups=model.num_expert_groups,
            num_limited_groups=model.num_limited_groups,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """The fields of every task."""

    kind: str
    steps: PositiveInt
    mtp_loss_weight: TokenSchedule
    balance_loss_weight: NonNegativeFloat
    balance_over: BalanceOver = "sequence"
    bias_update_rate: TokenSchedule


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """The sizes of a step's batch over the whole job, so that a change of layout changes no sample."""

    sequence_length_tokens: PositiveInt
    global_sequences: PositiveInt
    ramp: BatchRamp | None
    micro_sequences: PositiveInt
    document_mask: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """The interval of validations (0: only after the last step), and the number of sequences read.

    A validation loss of at most `target_loss` ends the run.
    """

    every_steps: NonNegativeInt
    sequences: NonNegativeInt
    target_loss: PositiveFloat | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointingConfig:
    """The interval of checkpoints (0: only after the last step), and how many are kept (None: all)."""

    every_steps: NonNegativeInt
    keep: PositiveInt | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplesConfig:
    """What a finished run generates."""

    prompt: str
    held_out: NonNegativeInt
    tokens: NonNegativeInt
    temperature: NonNegativeFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaConfig:
    """The average of the weights on the host; `decay` is the weight of the old one, None: no average."""

    decay: ShareBelowOne | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackConfig:
    """The outputs of a run in addition to `metrics.jsonl`."""

    wandb: Literal["disabled", "offline", "online"]
    project: str
    log_every_steps: PositiveInt
    picture_every_steps: NonNegativeInt
    loads_every_steps: NonNegativeInt
    micro_batch_loads_every_steps: NonNegativeInt = 0
    report_minutes: NonNegativeFloat = 5.0
    tensorboard: bool = False
    layers: bool = False
    entity: str | None = None
    tags: tuple[str, ...] = ()
    prometheus: str | None = None
    on_end: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """The steps (from 1) and ranks that are profiled, by torch's profiler and a memory snapshot (CUDA)."""

    steps: tuple[int, ...]
    ranks: tuple[int, ...]
    trace: bool
    memory_snapshot: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class LongerStage:
    """A later training stage with longer sequences and another global batch."""

    sequence_length_tokens: PositiveInt
    sequences: PositiveInt
    steps: PositiveInt

    @property
    def tokens(self) -> int:
        """The tokens of the whole stage."""
        return self.sequence_length_tokens * self.sequences * self.steps


@dataclass(frozen=True, kw_only=True, slots=True)
class CostConfig:
    """What the planner counts in addition to a run's own steps."""

    context_extension: tuple[LongerStage, ...] = ()
    post_training_gpu_hours: NonNegativeFloat = 0.0
    watts_per_gpu: PositiveFloat | None = None
    gpu_mtbf_hours: PositiveFloat | None = None
    checkpoint_seconds: NonNegativeFloat = 0.0
    restart_seconds: NonNegativeFloat = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerLengths:
    """A log-normal distribution of the numbers of tokens of answers."""

    median: PositiveFloat
    sigma: NonNegativeFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanCheckConfig:
    """What is planned before a run starts: see `plan` in `conf/train.yaml`.

    No run executes `fsdp` or `products`; they describe runs of other programs.
    """

    check: bool = True
    answer_tokens: AnswerLengths | None = None
    fsdp: bool = False
    products: Literal["mxfp8", "nvfp4"] | None = None


# Configurations of runs from before these keys existed use the defaults.
DEFAULT_COST = CostConfig()
DEFAULT_PLAN_CHECK = PlanCheckConfig()


RANDOM = "random"
"""Value of `init_from` that confirms a start from random weights. A folder of that name is `./random`."""


def named_weights(init_from: object) -> str | None:
    """Returns the weights that a value of `init_from` names; None: they are drawn from the seed."""
    return init_from if isinstance(init_from, str) and init_from != RANDOM else None


Acceptance = Literal["small_tokenizer", "repeated_corpus"]
"""What a run is refused for unless it is confirmed.

That is a tokenizer with tokens for less than 90 % of the model's vocabulary, or a corpus that is read more than 100
times.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The configuration of a training run, equal on all ranks."""

    name: str
    out_dir: str
    rescue_dir: str
    seed: NonNegativeInt
    resume: str | None
    init_from: str | None
    init_mtp: Literal["checkpoint", "fresh", "drop"]
    cluster: ClusterConfig
    parallelism: ParallelismConfig
    dispatch: Annotated[DispatchConfig, DISPATCHERS]
    model: ModelConfig
    data: DataConfig
    task: Annotated[TaskConfig, TASKS]
    batch: BatchConfig
    validation: ValidationConfig
    checkpointing: CheckpointingConfig
    samples: SamplesConfig
    rollout: RolloutConfig | None
    reward: RewardConfig | None
    optim: Annotated[OptimConfig, OPTIMIZERS]
    ema: EmaConfig
    precision: Precision
    schedule: ScheduleConfig
    costs: Costs
    memory_cap: float | None
    recompute: tuple[Recomputed, ...]
    attention: Annotated[str, ATTENTION]
    guard: GuardConfig
    track: TrackConfig
    profile: ProfileConfig
    plugins: tuple[str, ...]
    accept: tuple[Acceptance, ...] = ()
    cost: CostConfig = DEFAULT_COST
    plan: PlanCheckConfig = DEFAULT_PLAN_CHECK
    evaluation: RunEvaluationConfig = NO_EVALUATION

    @property
    def initial_weights(self) -> str | None:
        """The weights that `init_from` names; None: they are drawn from the seed."""
        return named_weights(self.init_from)

    @property
    def computing(self) -> Computing:
        """The recomputed parts, the attention implementation and the precision of matrix products."""
        products: Products = "own"
        if isinstance(self.precision, Fp8PrecisionConfig):
            products = "fp8_power_of_two" if self.precision.scales == "power_of_two" else "fp8"
        return Computing(
            recomputed=frozenset(self.recompute),
            attention=self.attention,
            products=products,
            gradient_blocks=isinstance(self.precision, Fp8PrecisionConfig) and self.precision.gradient_blocks,
            balance_over=self.task.balance_over,
        )

    @property
    def batch_sizes(self) -> BatchSizes:
        """The number of sequences of each step."""
        batch = self.batch
        return BatchSizes(batch.global_sequences, batch.sequence_length_tokens, batch.ramp)

    @property
    def num_micro_batches(self) -> int:
        """The micro-batches, or slices, of a pipeline's step, both directions together, after a ramp."""
        batch = self.batch
        return batch.global_sequences // (self.parallelism.data * batch.micro_sequences) * self.schedule.slices

    @property
    def rank_sequence_tokens(self) -> int:
        """The number of tokens of each sequence that a rank holds in one micro-batch, the most of all slices."""
        return max(self.part_lengths)

    @property
    def mean_part_tokens(self) -> float:
        """The number of tokens of each sequence that a micro-batch has on a rank, as a mean over slices."""
        return self.batch.sequence_length_tokens / (self.parallelism.sequence_ranks * self.schedule.slices)

    @property
    def part_lengths(self) -> tuple[int, ...]:
        """The tokens of each slice of a sequence that a rank holds."""
        context = self.parallelism.sequence_ranks
        lengths = slice_lengths(
            self.model,
            self.batch.sequence_length_tokens,
            self.schedule.slices,
            is_fp8=self.precision.kind == "fp8",
            equal=self.schedule.slice_by,
            context=context,
        )
        return tuple(length // context for length in lengths)

    @property
    def planned_only(self) -> dict[str, tuple[object, str]]:
        """The keys that no run executes, each with its value and that of a run."""
        plan = self.plan
        keys: dict[str, tuple[object, str]] = {}
        keys |= {"parallelism.tensor": (self.parallelism.tensor, "1")} if self.parallelism.tensor > 1 else {}
        keys |= {"plan.fsdp": ("true", "false")} if plan.fsdp else {}
        return keys | ({"plan.products": (plan.products, "null")} if plan.products is not None else {})

    @property
    def dispatch_site(self) -> DispatchSite:
        """The sizes of what a rank dispatches to experts, and the ranks that take part."""
        model = self.model
        number_bytes = {"float64": 8, "float32": 4}.get(self.precision.kind, 2)
        is_fp8 = self.precision.kind == "fp8"
        sent_bytes = 1 if is_fp8 or self.dispatch.payload == "fp8" else number_bytes
        expert_weights = 3 * model.hidden_size * model.expert_intermediate_size
        return DispatchSite(
            cluster=self.cluster,
            parallelism=self.parallelism,
            precision=self.precision.kind,
            tokens=TokenSizes(
                max_tokens=self.batch.micro_sequences * self.rank_sequence_tokens,
                hidden_size=model.hidden_size,
                num_choices=model.num_experts_per_token,
                row_bytes=2 * model.hidden_size * (sent_bytes + number_bytes),
                copy_bytes=expert_weights * (2 * (1 if is_fp8 else number_bytes) + max(4, number_bytes)),
            ),
            num_experts=model.num_routed_experts,
            num_groups=model.num_expert_groups,
            num_limited_groups=model.num_limited_groups,
        )


def sized_config(config: TrainConfig, sequences: int) -> TrainConfig:
    """Returns the configuration of a run with one batch size, in sequences, and no ramp."""
    return replace(config, batch=replace(config.batch, global_sequences=sequences, ramp=None))
