"""Writes and reads what a run measured: `probe.json` and `measured.json`. No torch here."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Literal, get_args

from base.decode import decode, encode
from base.files import replace_text
from base.ranges import Above, Between, NonNegativeFloat, NonNegativeInt, PositiveInt
from base.refusal import ConfigError
from dualpipe.ir import Op, Operation, Schedule, from_json, to_json, value_made, value_needed
from dualpipe.runtime.measured import LaneSpan, Measured
from dualpipe.validate import validate_passes
from model.config import ModelConfig, Recomputed, cut_at
from model.size import attention_parameters
from train.predict.layer_times import LayerTimes, PartTimes

PositiveShare = Annotated[float, Above(0), Between(0, 1)]
Part = Literal["dense", "moe", "embedding", "head", "mtp"]
PhaseName = Literal["block", "attend", "dispatch", "experts", "combine", "embedding", "head"]
PassName = Literal["forward", "backward_input", "backward_weight"]

PARTS: tuple[Part, ...] = get_args(Part)
_BLOCK: tuple[PhaseName, ...] = ("attend", "dispatch", "experts", "combine")
_PASSES = {Op.FORWARD: "forward", Op.BACKWARD_INPUT: "backward_input", Op.BACKWARD_WEIGHT: "backward_weight"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseTimes:
    """The median time of one phase of one kind of layer in one pass; phases of MTP modules count together.

    Spans in groups of one operation are alone, others overlapped; None if there are none.
    """

    part: Part
    phase: PhaseName
    of_pass: PassName
    count: PositiveInt
    alone_seconds: NonNegativeFloat | None
    overlapped_seconds: NonNegativeFloat | None

    @property
    def is_exchange(self) -> bool:
        """Whether the phase is a dispatch or combine."""
        return self.phase in ("dispatch", "combine")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """What a step measured of a model's parts, next to another operation where possible.

    `alone` is computation of a lone operation over computation next to another one, at most 1.
    """

    times: LayerTimes
    alone: PositiveShare
    phases: tuple[PhaseTimes, ...] = ()


def stage_phases(model: ModelConfig, cut: Sequence[range], stage: int) -> tuple[tuple[Part, PhaseName], ...]:
    """Returns the part of the model and the name of every phase of a stage, in forward order."""
    named: list[tuple[Part, PhaseName]] = [("embedding", "embedding")] if stage == 0 else []
    for layer in cut[stage]:
        is_dense = layer < model.num_dense_layers
        named += [("dense", "block")] if is_dense else [("moe", phase) for phase in _BLOCK]
    if stage == len(cut) - 1:
        named.append(("head", "head"))
        for _ in range(model.mtp_depth):
            named += [*(("mtp", phase) for phase in _BLOCK), ("mtp", "head")]
    return tuple(named)


def step_times(model: ModelConfig, schedule: Schedule, cut: Sequence[range], measured: Measured) -> StepTimes:
    """Derives the times of a model's parts from the spans of a step, as medians over layers."""
    phases = _phase_times(model, schedule, cut, measured)
    alone = _alone(phases)
    parts = {part: _part(phases, part, alone) for part in PARTS}
    parts["mtp"] *= model.mtp_depth
    times = LayerTimes(**parts, latency_seconds=_latency(schedule, measured))
    return StepTimes(times=times, alone=alone, phases=phases)


def _phase_times(
    model: ModelConfig, schedule: Schedule, cut: Sequence[range], measured: Measured
) -> tuple[PhaseTimes, ...]:
    """Returns the medians of all phases, in the order in which they were first seen."""
    named = [stage_phases(model, cut, stage) for stage in range(schedule.num_stages)]
    samples: dict[tuple[Part, PhaseName, PassName], dict[bool, list[float]]] = {}
    for rank, spans in enumerate(measured.ranks):
        sizes = [sum(not op.kind.is_copy for op in group) for group in schedule.ranks[rank]]
        seen: set[tuple[Operation, int]] = set()
        for span in spans:
            if span.lane in ("compute", "comm") and span.phase >= 0:
                key = (*named[span.operation.stage][span.phase], _pass_of(span, seen))
                samples.setdefault(key, {True: [], False: []})[sizes[span.group] == 1].append(span.seconds)
    return tuple(
        PhaseTimes(
            part=part,
            phase=phase,
            of_pass=of_pass,
            count=len(seconds[True]) + len(seconds[False]),
            alone_seconds=median(seconds[True]) if seconds[True] else None,
            overlapped_seconds=median(seconds[False]) if seconds[False] else None,
        )
        for (part, phase, of_pass), seconds in samples.items()
    )


def _pass_of(span: LaneSpan, seen: set[tuple[Operation, int]]) -> PassName:
    """Returns the pass of a span. In a full backward, the second computation of a phase is for weights."""
    op = span.operation
    if op.kind is Op.BACKWARD:
        is_second = (op, span.phase) in seen
        seen.add((op, span.phase))
        return "backward_weight" if is_second and span.lane == "compute" else "backward_input"
    return _PASSES[op.kind]  # type: ignore[return-value]


def _alone(phases: Sequence[PhaseTimes]) -> float:
    """Returns computation of lone operations over computation next to others, at most 1.

    It is below 1 on a device whose exchange takes part of it. Only phases that were measured both ways count.
    """
    alone = overlapped = 0.0
    for phase in phases:
        if not phase.is_exchange and phase.alone_seconds is not None and phase.overlapped_seconds is not None:
            alone += phase.alone_seconds
            overlapped += phase.overlapped_seconds
    return min(1.0, alone / overlapped) if alone > 0 and overlapped > 0 else 1.0


def _part(phases: Sequence[PhaseTimes], part: Part, alone: float) -> PartTimes:
    """Returns the times of one part of the model: the sum of its phases."""
    sums = dict.fromkeys(("forward", "backward_input", "backward_weight", "forward_exchange", "backward_exchange"), 0.0)
    for phase in phases:
        if phase.part == part:
            exchange = "forward_exchange" if phase.of_pass == "forward" else "backward_exchange"
            sums[exchange if phase.is_exchange else phase.of_pass] += _phase_seconds(phase, alone)
    return PartTimes(**sums)


def _phase_seconds(phase: PhaseTimes, alone: float) -> float:
    """Returns the seconds of a phase next to another operation.

    An exchange takes from its start until the rank has waited for it. Next to another operation, the rank computes
    before it waits, so the smaller of both is closer.
    """
    if phase.is_exchange:
        return min(seconds for seconds in (phase.alone_seconds, phase.overlapped_seconds) if seconds is not None)
    if phase.overlapped_seconds is None:
        assert phase.alone_seconds is not None
        return phase.alone_seconds / alone
    return phase.overlapped_seconds


def _latency(schedule: Schedule, measured: Measured) -> float:
    """Returns the median time from a send until a waiting rank has the message; 0 if no rank has waited."""
    sent: dict[object, float] = {}
    waits: list[tuple[object, LaneSpan]] = []
    for spans in measured.ranks:
        for span in spans:
            if span.lane == "send" and (sent_value := value_made(schedule, span.operation)) is not None:
                sent[sent_value] = span.start_seconds
            if span.lane == "wait" and (needed := value_needed(schedule, span.operation)) is not None:
                waits.append((needed, span))
    # There is no send between stages of one rank, and a message that waits for the rank says nothing.
    starts = [(sent.get(value), span) for value, span in waits]
    hops = [span.end_seconds - start for start, span in starts if start is not None and span.start_seconds < start]
    return max(0.0, median(hops)) if hops else 0.0


PROBE_NAME = "probe.json"
MEASURED_NAME = "measured.json"
LOGGER = logging.getLogger("train")
_MOST_BYTES = 2**27
_SCHEDULE_KEY = "schedule"


@dataclass(frozen=True, kw_only=True, slots=True)
class TimesScope:
    """What the times of a model's parts hold for.

    Tokens are those of a micro-batch on a rank. `expert` ranks share experts, and `context` ranks each sequence.
    `recomputed` is what the backward computes again, None if it is unknown.
    """

    precision: str
    layer_parameters: PositiveInt
    expert: PositiveInt
    tokens: PositiveInt
    context: PositiveInt = 1
    mtp_depth: NonNegativeInt = 1
    recomputed: tuple[Recomputed, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredTimes:
    """What a run measured of its model's parts. `cut` lists the layers of each stage.

    Step 0 is the probe before the first step, which measures one phase at a time; other steps are drawn.
    """

    step: NonNegativeInt
    device: Literal["cpu", "cuda"]
    cut: tuple[NonNegativeInt, ...]
    scope: TimesScope
    measured: StepTimes

    @property
    def is_probe(self) -> bool:
        """Whether the times are those of the probe."""
        return self.step == 0

    @property
    def cut_ranges(self) -> tuple[range, ...]:
        """The layers of each stage."""
        return cut_at(self.cut)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredRun:
    """The times that a run measured, and the schedule that it follows."""

    measured: MeasuredTimes
    schedule: Schedule


def try_to_write(folder: Path, run: MeasuredRun) -> None:
    """Writes the record into a run's existing folder, in place of an earlier one. An error is only logged."""
    path = folder / (PROBE_NAME if run.measured.is_probe else MEASURED_NAME)
    values = {**encode(run.measured), _SCHEDULE_KEY: json.loads(to_json(run.schedule))}
    try:
        replace_text(path, json.dumps(values) + "\n")
    except OSError as error:
        LOGGER.warning("%s cannot be written: %s", path.name, error)


def read_measured(path: Path) -> MeasuredRun | None:
    """Reads a record; None if there is no such file.

    Raises:
        ConfigError: it is not a record of a run.
    """
    if not path.is_file():
        return None
    subject = f"rates: {str(path)!r}"
    if path.stat().st_size > _MOST_BYTES:
        raise ConfigError(f"{subject} must have at most {_MOST_BYTES} bytes, has {path.stat().st_size}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or _SCHEDULE_KEY not in values:
            raise ValueError(f"the key {_SCHEDULE_KEY} is missing")
        schedule = from_json(json.dumps(values.pop(_SCHEDULE_KEY)))
        validate_passes(schedule)
        measured = decode(MeasuredTimes, values)
        if len(measured.cut) != schedule.num_stages:
            raise ValueError(f"cut: must list {schedule.num_stages} stages, lists {len(measured.cut)}")
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{subject} must be what a run measured, is not: {reason}") from error
    return MeasuredRun(measured=measured, schedule=schedule)


def layer_parameters(model: ModelConfig) -> int:
    """Returns the weights that a token uses in a dense and a MoE layer, which identify a model's layers."""
    experts = model.num_experts_per_token + model.num_shared_experts
    widths = model.dense_intermediate_size + experts * model.expert_intermediate_size
    return 2 * attention_parameters(model) + 3 * model.hidden_size * widths
