"""A training run, as values. No torch here: a wrong run is refused before any process starts."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from comm.config import ClusterConfig, DispatchConfig, ParallelismConfig
from comm.dispatch.registry import DISPATCHERS
from comm.dispatch.requirements import DispatchSite, TokenSizes
from data.batch_sizes import BatchRamp, BatchSizes
from data.config import DataConfig
from dualpipe.config import ScheduleConfig
from dualpipe.simulate.costs import Costs
from kernels.attention import ATTENTION
from kernels.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, ShareBelowOne, ZeroOrAbove
from model.config import Computing, ModelConfig, Products, Recomputed
from train.config.token_schedule import TokenSchedule
from train.optim.config import OptimConfig
from train.tasks.registry import TASKS


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """Type of weights and activations. Gradients accumulate in float32, or float64 for float64 weights."""

    kind: Literal["float64", "float32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8PrecisionConfig:
    """FP8 mixed precision (arXiv:2412.19437, section 3.3): weights and activations in bf16, the products of linear maps
    and what is kept for the backward in FP8; rows travel to experts in FP8, whatever the exchange's payload.

    `scales`: of any value, or powers of two. Where the recipe asks for powers of two they are so always.
    """

    kind: Literal["fp8"]
    scales: Literal["float32", "power_of_two"]


Precision = PrecisionConfig | Fp8PrecisionConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """What every task has: its name, its number of optimizer steps, and the weights that belong to the model's layers.

    `mtp_loss_weight`: of all MTP depths together. `balance_loss_weight`: of the sequence-wise balance loss.
    `bias_update_rate`: change of a router bias in a step.
    """

    kind: str
    steps: PositiveInt
    mtp_loss_weight: TokenSchedule
    balance_loss_weight: NonNegativeFloat
    bias_update_rate: TokenSchedule


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """What a step reads. Sizes are over the whole job, so that a change of layout changes no sample.

    `ramp`: smaller global batches at the start of the run; None: all have `global_sequences`.
    `document_mask`: documents that are packed into one sequence do not see each other.
    """

    sequence_length_tokens: PositiveInt
    global_sequences: PositiveInt
    ramp: BatchRamp | None
    micro_sequences: PositiveInt
    document_mask: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """How often the held-out loss is computed (`every_steps` 0: after the last step), and over how many sequences."""

    every_steps: NonNegativeInt
    sequences: NonNegativeInt


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointingConfig:
    """How often a run saves (`every_steps` 0: after the last step), and how many checkpoints it keeps (None: all)."""

    every_steps: NonNegativeInt
    keep: PositiveInt | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplesConfig:
    """The text that a finished run generates from `prompt`; `tokens` 0: none."""

    prompt: str
    tokens: NonNegativeInt
    temperature: NonNegativeFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaConfig:
    """An average of the weights on the host: `decay` is what it keeps of itself in an update; None: there is none."""

    decay: ShareBelowOne | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StopGuardConfig:
    """A step whose loss or gradient norm is not finite, or a spike, ends the run.

    A spike is above `spike_factor` times the median of the `spike_window_steps` steps before, once there are so many;
    0: nothing is.
    """

    kind: Literal["stop"]
    spike_factor: Annotated[float, ZeroOrAbove(1)]
    spike_window_steps: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipGuardConfig:
    """Such a step is left out, and ends the run after `max_consecutive` others in a row."""

    kind: Literal["skip"]
    spike_factor: Annotated[float, ZeroOrAbove(1)]
    spike_window_steps: PositiveInt
    max_consecutive: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class RollBackGuardConfig:
    """From such a step the run goes back to its newest checkpoint, and leaves the batch out when it comes again.

    `max_consecutive`: so often without a step beyond the last refused one.
    """

    kind: Literal["roll_back"]
    spike_factor: Annotated[float, ZeroOrAbove(1)]
    spike_window_steps: PositiveInt
    max_consecutive: PositiveInt


GuardConfig = StopGuardConfig | SkipGuardConfig | RollBackGuardConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackConfig:
    """Where metrics go beside `metrics.jsonl` and the terminal.

    `picture_every_steps`: how often planned and measured time of the pipeline are drawn; 0: after the last step only.
    `loads_every_steps`: how often every expert's load goes to `loads.jsonl`; 0: never.
    """

    wandb: Literal["disabled", "offline", "online"]
    project: str
    log_every_steps: PositiveInt
    picture_every_steps: NonNegativeInt
    loads_every_steps: NonNegativeInt


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """Steps (from 1) and ranks that are looked into: a trace of torch's profiler, and on CUDA a snapshot of memory."""

    steps: tuple[int, ...]
    ranks: tuple[int, ...]
    trace: bool
    memory_snapshot: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything a rank needs to know.

    `rescue_dir` gets the last state if `out_dir` takes no checkpoint; empty: `<out_dir>.rescue`.
    `resume` is a run's folder or one of its checkpoints, `auto` for the newest in `out_dir` if any, or None.
    `init_from` is what the weights start from: a run's folder or one of its checkpoints, converted weights, or a
    Hugging Face folder; None: the seed. `init_mtp`: MTP modules start from there too, `fresh` from the seed, or `drop`:
    there are none. `costs` and `memory_cap` are what the schedule is made for: times in any one unit, live activations
    of model/P (None: as many as the schedule would keep). `plugins`: python files that register more kinds of what is
    chosen by name; the command that is started loads them, and every rank.
    """

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
    optim: OptimConfig
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

    @property
    def computing(self) -> Computing:
        """How the model is computed."""
        products: Products = "own"
        if isinstance(self.precision, Fp8PrecisionConfig):
            products = "fp8_power_of_two" if self.precision.scales == "power_of_two" else "fp8"
        return Computing(recomputed=frozenset(self.recompute), attention=self.attention, products=products)

    @property
    def batch_sizes(self) -> BatchSizes:
        """How many sequences each step reads."""
        batch = self.batch
        return BatchSizes(batch.global_sequences, batch.sequence_length_tokens, batch.ramp)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that one pipeline runs in a step, both directions together; at the end of a ramp."""
        return self.batch.global_sequences // (self.parallelism.data * self.batch.micro_sequences)

    @property
    def dispatch_site(self) -> DispatchSite:
        """What a rank dispatches to experts, and between which ranks."""
        model = self.model
        return DispatchSite(
            cluster=self.cluster,
            parallelism=self.parallelism,
            precision=self.precision.kind,
            tokens=TokenSizes(
                max_tokens=self.batch.micro_sequences * self.batch.sequence_length_tokens,
                hidden_size=model.hidden_size,
                num_choices=model.num_experts_per_token,
            ),
            num_experts=model.num_routed_experts,
            num_groups=model.num_expert_groups,
            num_limited_groups=model.num_limited_groups,
        )


def sized_config(config: TrainConfig, sequences: int) -> TrainConfig:
    """Returns the run as if every step read so many sequences."""
    return replace(config, batch=replace(config.batch, global_sequences=sequences, ramp=None))
