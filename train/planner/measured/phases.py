"""Derives the times of a model's parts from the measured spans of a step. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, get_args

from dualpipe.ir import Op, Operation, Schedule
from dualpipe.runtime.measured import LaneSpan, Measured
from dualpipe.transfers import value_made, value_needed
from kernels.ranges import NonNegativeFloat, PositiveInt
from model.config import ModelConfig
from train.schedule.layer_times import LayerTimes, PartTimes

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
    alone: float
    phases: tuple[PhaseTimes, ...]


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
    return StepTimes(times=LayerTimes(**parts, latency=_latency(schedule, measured)), alone=alone, phases=phases)


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
    for each in phases:
        if not each.is_exchange and each.alone_seconds is not None and each.overlapped_seconds is not None:
            alone += each.alone_seconds
            overlapped += each.overlapped_seconds
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
            if span.lane == "send" and (made := value_made(schedule, span.operation)) is not None:
                sent[made] = span.start_seconds
            if span.lane == "wait" and (needed := value_needed(schedule, span.operation)) is not None:
                waits.append((needed, span))
    # There is no send between stages of one rank, and a message that waits for the rank says nothing.
    starts = [(sent.get(value), span) for value, span in waits]
    hops = [span.end_seconds - start for start, span in starts if start is not None and span.start_seconds < start]
    return max(0.0, median(hops)) if hops else 0.0
