"""Derives the times of a model's parts from the measured spans of a step. No torch here."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
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
    """The median time of one phase of one kind of layer in one pass.

    Attributes:
        part: kind of layer.
        phase: name of the phase. MTP modules count together.
        of_pass: forward, backward for inputs, or backward for weights.
        count: number of measured spans.
        alone_seconds: in groups of one operation; None if there are none.
        overlapped_seconds: in groups of several operations; None if there are none.
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
    """What a step measured of a model's parts.

    Attributes:
        times: of the parts, next to another operation where the schedule has such groups.
        alone: computation of a lone operation over computation next to another one, at most 1.
        phases: the times of all phases.
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
    """Derives the times of a model's parts from the spans of a step, as medians over layers.

    Args:
        schedule: the schedule that was run; the spans refer to its groups.
        measured: measured spans of all ranks.
    """
    samples = _Samples(model, schedule, cut)
    for rank, spans in enumerate(measured.ranks):
        samples.add(rank, spans)
    phases = samples.phases()
    alone = _alone(phases)
    return StepTimes(
        times=LayerTimes(
            **{part: _part(phases, part, alone, model.mtp_depth if part == "mtp" else 1) for part in PARTS},
            latency=_latency(schedule, measured),
        ),
        alone=alone,
        phases=phases,
    )


class _Samples:
    """Seconds of spans by part, phase, pass, and whether the operation was alone in its group."""

    def __init__(self, model: ModelConfig, schedule: Schedule, cut: Sequence[range]) -> None:
        self._named = [stage_phases(model, cut, stage) for stage in range(schedule.num_stages)]
        self._sizes = [[sum(not op.kind.is_copy for op in group) for group in groups] for groups in schedule.ranks]
        self._seconds: dict[tuple[Part, PhaseName, PassName, bool], list[float]] = defaultdict(list)

    def add(self, rank: int, spans: Sequence[LaneSpan]) -> None:
        """Adds the spans of one rank, ordered by start."""
        seen: set[tuple[Operation, int]] = set()
        for span in spans:
            if span.lane not in ("compute", "comm") or span.phase < 0:
                continue
            part, phase = self._named[span.operation.stage][span.phase]
            is_alone = self._sizes[rank][span.group] == 1
            self._seconds[part, phase, _pass_of(span, seen), is_alone].append(span.seconds)

    def phases(self) -> tuple[PhaseTimes, ...]:
        """Returns the medians, in the order in which the phases were first seen."""
        found = []
        for part, phase, of_pass in dict.fromkeys((part, phase, of_pass) for part, phase, of_pass, _ in self._seconds):
            alone, overlapped = (self._seconds.get((part, phase, of_pass, is_alone), []) for is_alone in (True, False))
            found.append(
                PhaseTimes(
                    part=part,
                    phase=phase,
                    of_pass=of_pass,
                    count=len(alone) + len(overlapped),
                    alone_seconds=median(alone) if alone else None,
                    overlapped_seconds=median(overlapped) if overlapped else None,
                )
            )
        return tuple(found)


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


def _part(phases: Sequence[PhaseTimes], part: Part, alone: float, times: int) -> PartTimes:
    """Returns the times of one part of the model: all its phases, each as often as the part has it."""
    sums = dict.fromkeys(("forward", "backward_input", "backward_weight", "forward_exchange", "backward_exchange"), 0.0)
    for each in phases:
        if each.part != part:
            continue
        if each.is_exchange:
            name = "forward_exchange" if each.of_pass == "forward" else "backward_exchange"
            sums[name] += times * _exchange_seconds(each)
        else:
            sums[each.of_pass] += times * _compute_seconds(each, alone)
    return PartTimes(**sums)


def _compute_seconds(phase: PhaseTimes, alone: float) -> float:
    """Returns the seconds next to another operation."""
    if phase.overlapped_seconds is None:
        assert phase.alone_seconds is not None
        return phase.alone_seconds / alone
    return phase.overlapped_seconds


def _exchange_seconds(phase: PhaseTimes) -> float:
    """Returns the seconds of an exchange from its start until the rank has waited for it.

    Next to another operation, the rank computes before it waits, so the smaller of both is closer.
    """
    return min(seconds for seconds in (phase.alone_seconds, phase.overlapped_seconds) if seconds is not None)


def _latency(schedule: Schedule, measured: Measured) -> float:
    """Returns the median time from the start of a send until a waiting rank has the message.

    0 if no rank has waited for another one.
    """
    sent: dict[object, float] = {}
    waits: list[tuple[object, LaneSpan]] = []
    for spans in measured.ranks:
        for span in spans:
            if span.lane == "send" and (made := value_made(schedule, span.operation)) is not None:
                sent[made] = span.start_seconds
            if span.lane == "wait" and (needed := value_needed(schedule, span.operation)) is not None:
                waits.append((needed, span))
    found = list(_hops(sent, waits))
    return max(0.0, median(found)) if found else 0.0


def _hops(sent: dict[object, float], waits: Sequence[tuple[object, LaneSpan]]) -> Iterator[float]:
    for value, span in waits:
        start = sent.get(value)  # none between stages of one rank
        if start is not None and span.start_seconds < start:
            yield span.end_seconds - start
