"""Configuration of the planner: measured rates and one declared factor. No torch here."""

from dataclasses import dataclass
from typing import Annotated, Literal

from kernels.ranges import AtLeast, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from train.schedule.layer_times import PartTimes
from train.schedule.measured import PositiveShare


@dataclass(frozen=True, kw_only=True, slots=True)
class RateReference:
    """What the times of `KernelRates` were measured on."""

    tokens: PositiveInt
    sequence_length_tokens: PositiveInt
    hidden_size: PositiveInt
    attention_parameters: PositiveInt
    recomputed_parameters: NonNegativeInt
    score_width: PositiveInt
    active_expert_width: PositiveInt
    rows_across_nodes: PositiveFloat
    parameters_per_rank: PositiveInt
    num_sms: PositiveInt
    communication_sms: PositiveInt
    peak_flops: PositiveFloat
    inter_node_bytes_per_second: PositiveFloat
    intra_node_bytes_per_second: PositiveFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelTimes:
    """Seconds of one pass of one layer's attention or experts, by kind of kernel."""

    products: NonNegativeFloat
    scores: NonNegativeFloat
    casts: NonNegativeFloat
    other: NonNegativeFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class PassTimes:
    """Kernel times of F, I and W."""

    forward: KernelTimes
    backward_input: KernelTimes
    backward_weight: KernelTimes


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeTimes:
    """Seconds of one layer's exchanges."""

    dispatch: NonNegativeFloat
    combine: NonNegativeFloat
    dispatch_backward: NonNegativeFloat
    combine_backward: NonNegativeFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class RecomputedTimes:
    """Seconds of one layer's I for each kind of output that the backward recomputes."""

    norm: NonNegativeFloat
    mla_up: NonNegativeFloat
    swiglu: NonNegativeFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class RateSource:
    """The source of the rates under some keys."""

    keys: tuple[str, ...]
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelRates:
    """Times of kernels on a reference, which are scaled by work to other models and devices.

    `conf/rates/h800_trace.yaml` says what each value is.
    """

    kind: Literal["kernels"]
    reference: RateReference
    attention: PassTimes
    experts: PassTimes
    exchange: ExchangeTimes
    receive_imbalance: Annotated[float, AtLeast(1)]
    recomputed: RecomputedTimes
    dense_over_experts: PositiveFloat
    bf16_over_fp8: PositiveFloat
    head_flops_per_second: PositiveFloat
    latency_seconds: NonNegativeFloat
    optimizer_seconds: NonNegativeFloat
    sources: tuple[RateSource, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredRates:
    """Times of a model's parts that a run measured on its own ranks.

    They hold for that model and device, and scale with the tokens of a micro-batch on a rank.

    `alone` is computation of a lone operation over computation next to another one, which the times are.
    `latency_seconds` is from one pipeline rank to the next; `optimizer_seconds` is a step's time outside the passes.
    """

    kind: Literal["measured"]
    precision: str
    layer_parameters: PositiveInt
    expert: PositiveInt
    tokens: PositiveInt
    dense: PartTimes
    moe: PartTimes
    embedding: PartTimes
    head: PartTimes
    mtp: PartTimes
    alone: PositiveShare
    latency_seconds: NonNegativeFloat
    optimizer_seconds: NonNegativeFloat
    sources: tuple[RateSource, ...]
    context: PositiveInt = 1


Rates = KernelRates | MeasuredRates


@dataclass(frozen=True, kw_only=True, slots=True)
class EfficiencyConfig:
    """The factor on the time of a step for what no rate explains."""

    unexplained: PositiveFloat
