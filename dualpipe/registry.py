"""Registers kinds of schedules by name, with their size limits, placement and generator.

It also defines the configuration that selects a kind, and that of the costs of `launch.schedule`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

from base.ranges import Between, NonNegativeFloat, PositiveInt
from base.registry import Registry, list_modules
from dualpipe.costs import CostModel, Costs, StageCosts, resampled, uniform
from dualpipe.ir import MOST_LINK_DEPTH, Placement, Schedule, ScheduleError, straight_placement

FALLBACK = "dualpipe_split"
"""`dualpipe_interleaved` with one chunk, which accepts all numbers of ranks and micro-batches. Errors suggest it."""

AUTO_CHUNKS = 4
"""Maximum number of chunks that is tried if none is configured."""

_FIRST = ("dualpipe_interleaved", "dualpipe", "zero_bubble", "one_f_one_b")


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeLimit:
    """Reason why a schedule is not defined for a size. `rule` is as in `needs an even number of ranks`."""

    about: Literal["num_ranks", "num_micro_batches"]
    rule: str
    nearest: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleFormula:
    """Published idle time of every rank, from P and the costs of model/P, for 2P or more micro-batches."""

    text: str
    assumes: str
    value: Callable[[int, Costs], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSpec:
    """Registered kind of schedule.

    Attributes:
        generate: function of the numbers of ranks and micro-batches (all directions together) that returns a valid
            schedule. If `takes_costs` is set, it also takes a `CostModel`, whose stages determine the chunks, and a
            memory cap or None, and it raises MemoryCapError if it cannot keep the cap. Its results are then cached.
            Otherwise, if `takes_slices` is set, it also takes the number of slices.
        placement: function of the numbers of ranks and chunks.
        chunks: numbers of stages that a rank can hold for one direction.
        limit: function of the numbers of ranks and micro-batches that returns why there is no such schedule, or None.
        is_fixed: whether `generate` takes costs only for the number of stages, and has one order for all of them.
        grows: whether the peak of live activations still grows after three micro-batches per rank. If so, memory is
            predicted with all micro-batches.
    """

    name: str
    summary: str
    generate: Callable[..., Schedule]
    placement: Callable[[int, int], Placement] = straight_placement
    chunks: range = range(1, 2)
    limit: Callable[[int, int], SizeLimit | None] = lambda num_ranks, num_micro_batches: None
    takes_costs: bool = False
    takes_slices: bool = False
    may_be_chosen: bool = True
    is_fixed: bool = False
    grows: bool = False
    idle: IdleFormula | None = None

    def num_stages(self, num_ranks: int, chunks: int | None = None) -> int:
        """Returns the number of stages; `chunks` is the smallest possible number by default."""
        return num_ranks * (chunks or self.chunks[0])

    def chunk_choices(self, chunks: int | None) -> tuple[int, ...]:
        """Returns the numbers of chunks to try: the configured one if it is valid, or several."""
        if chunks is None:
            return tuple(number for number in self.chunks if number <= max(AUTO_CHUNKS, self.chunks[0]))
        if chunks not in self.chunks:
            nearest = min(self.chunks, key=lambda number: abs(number - chunks))
            raise ScheduleError(
                f"schedule.chunks: schedule '{self.name}' holds {_range_text(self.chunks)} stages per rank and "
                f"direction, is {chunks}; nearest: {nearest}, or null"
            )
        return (chunks,)

    def is_bidirectional(self) -> bool:
        """Returns whether micro-batches enter at both ends."""
        return len(self.placement(2, self.chunks[0])) > 1


def _range_text(numbers: range) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


SCHEDULES = Registry[ScheduleSpec]("schedule.kind", list_modules("dualpipe.generate", _FIRST), also=("auto",))


def candidates() -> dict[str, ScheduleSpec]:
    """Returns the kinds that `schedule=auto` may choose."""
    return {kind: spec for kind, spec in SCHEDULES.items() if spec.may_be_chosen}


def is_closed_form(kind: str, chunks: int | None, slices: int) -> bool:
    """Returns whether a kind that takes costs has known orders, so that none is searched without a cap."""
    is_fallback = SCHEDULES.current_name(kind) == SCHEDULES.current_name(FALLBACK)
    return is_fallback and slices == 1 and (kind == FALLBACK or chunks == 1)


def check_size(
    kind: str,
    num_ranks: int,
    num_micro_batches: int,
    *,
    ranks_key: str = "num_ranks",
    micro_batches_key: str = "num_micro_batches",
) -> None:
    """Checks that a schedule is defined for these numbers, without making it; errors name the keys.

    Raises:
        UnknownNameError: if there is no such kind.
        ScheduleError: if the schedule is not defined. The message names key, rule, value and nearest valid values.
    """
    spec = SCHEDULES.get(kind)
    if num_ranks < 1:
        raise ScheduleError(f"{ranks_key}: a pipeline needs at least 1 rank, has {num_ranks}; nearest: 1")
    if num_micro_batches < 1:
        raise ScheduleError(
            f"{micro_batches_key}: a step needs at least 1 micro-batch, has {num_micro_batches}; nearest: 1"
        )
    limit = spec.limit(num_ranks, num_micro_batches)
    if limit is not None:
        is_ranks = limit.about == "num_ranks"
        key, value = (ranks_key, num_ranks) if is_ranks else (micro_batches_key, num_micro_batches)
        nearest = " or ".join(map(str, limit.nearest))
        advice = f"{nearest}, or schedule={FALLBACK}" if nearest else f"schedule={FALLBACK}"
        raise ScheduleError(f"{key}: schedule '{kind}' {limit.rule}, has {value}; nearest: {advice}")


def check_slices(kind: str, num_micro_batches: int, slices: int) -> None:
    """Checks that a kind, or one that `auto` finds, can run slices; each counts as a micro-batch."""
    if slices > 1 and kind != "auto" and not SCHEDULES.get(kind).takes_slices:
        sliced = " or ".join(name for name, spec in SCHEDULES.items() if spec.takes_slices)
        raise ScheduleError(
            f"schedule.slices: schedule '{kind}' runs whole sequences, is {slices}; nearest: 1, or schedule={sliced}"
        )
    if num_micro_batches % slices:
        below = num_micro_batches - num_micro_batches % slices
        nearest = " or ".join(str(count) for count in (below, below + slices) if count)
        raise ScheduleError(
            f"num_micro_batches: must be a multiple of schedule.slices={slices}, because each slice counts as one, "
            f"is {num_micro_batches}; nearest: {nearest}"
        )


def kind_for_size(
    kind: str, num_ranks: int, num_micro_batches: int, chunks: int, *, micro_batches_key: str = "num_micro_batches"
) -> str:
    """Returns the kind or, where it is not defined, one with the same placement: `FALLBACK` if possible."""
    wanted = SCHEDULES.get(kind)
    if wanted.limit(num_ranks, num_micro_batches) is not None:
        placement = wanted.placement(num_ranks, chunks)
        for name, spec in {FALLBACK: SCHEDULES.get(FALLBACK), **candidates()}.items():
            is_defined = chunks in spec.chunks and spec.limit(num_ranks, num_micro_batches) is None
            if is_defined and spec.placement(num_ranks, chunks) == placement:
                return name
    check_size(kind, num_ranks, num_micro_batches, micro_batches_key=micro_batches_key)
    return kind


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Which schedule a run uses, and how the members of a group run; `conf/schedule` explains the keys."""

    kind: Annotated[str, SCHEDULES]
    chunks: PositiveInt | None
    pairing: Literal["overlapped", "sequential"]
    slices: PositiveInt = 1
    slice_by: Literal["work", "length"] = "work"
    link_depth: Annotated[int, Between(1, MOST_LINK_DEPTH)] = 1


_STAGE_KEYS = tuple(field.name for field in fields(StageCosts))


@dataclass(frozen=True, slots=True)
class StageEntry:
    """Costs of one stage: `factor` times an equal stage's, or some of them by name."""

    factor: float
    values: tuple[tuple[str, float], ...] = ()

    def __repr__(self) -> str:
        return repr(self.to_plain())

    @classmethod
    def from_plain(cls, value: object) -> "StageEntry":
        """Reads a number or a mapping, or raises a `ScheduleError`."""
        if not isinstance(value, Mapping):
            return cls(factor=_number(value, "must be a number, or costs by name,"))
        for key in value:
            if key not in _STAGE_KEYS:
                raise ScheduleError(f"{key} is no cost of a stage; nearest: {', '.join(_STAGE_KEYS)}")
        named = tuple((str(key), _number(item, f"{key} must be a number")) for key, item in value.items())
        return cls(factor=1.0, values=named)

    def to_plain(self) -> float | dict[str, float]:
        """Returns the form that `from_plain` reads."""
        return dict(self.values) if self.values else self.factor

    def costs(self, equal: StageCosts) -> StageCosts:
        """Returns the stage's costs, given those of an equal share of the model."""
        equal_costs = {name: getattr(equal, name) for name in _STAGE_KEYS}
        scaled = {name: self.factor * value for name, value in equal_costs.items() if value is not None}
        return StageCosts(**(scaled | dict(self.values)))


def _number(value: object, rule: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ScheduleError(f"{rule} of at least 0, is {value!r}")
    return float(value)


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class ModelCosts(Costs):
    """Costs of a model on a pipeline, for any number of stages; no entries mean equal stages.

    Attributes:
        stages: an entry for each stage, which may be passed as a list in the form that `StageEntry.from_plain` reads.
        weights: memory of one copy of a rank's weights, gradients and optimizer state, in activations of model/P.
    """

    stages: tuple[StageEntry, ...] = ()
    weights: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        Costs.__post_init__(self)
        if isinstance(self.stages, str) or not isinstance(self.stages, Sequence):
            raise ScheduleError(f"costs.stages: must be a list of entries, is {self.stages!r}; nearest: []")
        entries = []
        for index, entry in enumerate(self.stages):
            try:
                entries.append(entry if isinstance(entry, StageEntry) else StageEntry.from_plain(entry))
            except ScheduleError as error:
                raise ScheduleError(f"costs.stages[{index}]: {error}") from error
        object.__setattr__(self, "stages", tuple(entries))

    def of_stages(self, num_ranks: int, num_stages: int) -> CostModel:
        """Returns the costs of every stage; unless there is an entry for each, a fraction of the entries'."""
        entries = self.stages
        if len(entries) % num_ranks:
            below = len(entries) - len(entries) % num_ranks
            nearest = " or ".join(str(count) for count in (below, below + num_ranks) if count)
            raise ScheduleError(
                f"costs.stages: must have an entry for each stage, a multiple of num_ranks={num_ranks}, has "
                f"{len(entries)}; nearest: {nearest}, or []"
            )
        equal = uniform(self, num_ranks, len(entries) or num_stages)
        stages = (
            tuple(entry.costs(stage) for entry, stage in zip(entries, equal.stages, strict=True)) if entries else ()
        )
        return resampled(replace(equal, stages=stages or equal.stages, weights=self.weights), num_stages)
