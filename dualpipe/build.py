"""Builds a schedule from the name of its kind, within a memory cap."""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from heapq import heappop, heappush
from pathlib import Path

from dualpipe.ir import Group, MemoryCapError, Op, Operation, Placement, Schedule, ScheduleError, from_json, to_json
from dualpipe.passes import offload
from dualpipe.registry import FALLBACK, SCHEDULES, ScheduleSpec, check_size, check_slices
from dualpipe.simulate.costs import CostModel, Costs, uniform
from dualpipe.simulate.simulate import activation_cap, peak_memory, simulate
from dualpipe.validate import validate

_EQUAL = Costs(forward=1.0, backward_input=1.0, backward_weight=1.0, exchange=0.0, latency=0.0)


def build(
    kind: str,
    num_ranks: int,
    num_micro_batches: int,
    costs: CostModel | None = None,
    memory_cap: float | None = None,
    cache_dir: Path | None = None,
) -> Schedule:
    """Builds the named schedule within the memory cap, with offload if the costs allow it.

    Args:
        num_micro_batches: micro-batches of one step, of both directions together.
        costs: costs of each stage, whose number determines the chunks; None: equal stages, F = I = W and no exchange.
        memory_cap: maximum of a rank's live activations and its copies of `costs.weights`, in the unit of
            `StageCosts.activation`; None for the schedule's own maximum.

    Raises:
        ScheduleError: if the schedule is not defined for the size or number of chunks, or does not fit the cap.
    """
    check_size(kind, num_ranks, num_micro_batches)
    spec = SCHEDULES.get(kind)
    costs = costs or uniform(_EQUAL, num_ranks, spec.num_stages(num_ranks))
    chunks, rest = divmod(len(costs.stages), num_ranks)
    assert not rest, f"{kind}: {len(costs.stages)} stages have costs, which {num_ranks} ranks cannot share"
    spec.chunk_choices(chunks)
    check_slices(kind, num_micro_batches, costs.slices)
    copies = len(spec.placement(num_ranks, chunks))
    room = activation_cap(memory_cap, copies, costs)
    activations = replace(costs, weights=0.0)

    def generate(cap: float | None) -> Schedule:
        return _generate(spec, num_ranks, num_micro_batches, activations.without_offload(), cap, cache_dir)

    try:
        return _fit(generate, activations, room)
    except MemoryCapError as error:
        if not costs.weights:
            raise
        raise MemoryCapError(
            f"{str(error).removeprefix('memory_cap: ')}; both without {copies} x {costs.weights:g} of weights",
            error.least + copies * costs.weights,
        ) from error


def _fit(generate: Callable[[float | None], Schedule], costs: CostModel, memory_cap: float | None) -> Schedule:
    """Makes the schedule within a cap on its activations, with offload if that is allowed and faster."""
    if memory_cap is None or not costs.can_offload:
        return generate(memory_cap)
    try:
        staying: Schedule | None = generate(memory_cap)
    except MemoryCapError:
        staying = None
    moving = offload(generate(None), costs, memory_cap)
    found = [schedule for schedule in (staying, moving) if schedule is not None]
    # If neither keeps the cap, the generator's error says which one it could keep without offload.
    return min(found, key=lambda schedule: simulate(schedule, costs).makespan) if found else generate(memory_cap)


def _generate(
    spec: ScheduleSpec,
    num_ranks: int,
    num_micro_batches: int,
    costs: CostModel,
    memory_cap: float | None,
    cache_dir: Path | None,
) -> Schedule:
    if spec.takes_costs:
        return load_or_make(spec.generate, num_ranks, num_micro_batches, costs, memory_cap, cache_dir)
    schedule = spec.generate(num_ranks, num_micro_batches, *([costs.slices] if spec.takes_slices else []))
    expected = spec.placement(num_ranks, len(costs.stages) // num_ranks)
    if schedule.placement != expected:
        raise ScheduleError(
            f"schedule '{spec.name}': places stages on ranks {schedule.placement}, its entry has {expected}"
        )
    _check_cap(schedule, costs, memory_cap)
    return schedule


def _check_cap(schedule: Schedule, costs: CostModel, memory_cap: float | None) -> None:
    peak = max(peak_memory(schedule, costs))
    if memory_cap is not None and peak > memory_cap + 1e-9:
        raise MemoryCapError(
            f"schedule '{schedule.kind}' on {schedule.num_ranks} ranks keeps {peak:g} live activations on a rank, "
            f"the cap is {memory_cap:g}; nearest: {peak:g}, or schedule={FALLBACK}",
            peak,
        )


Make = Callable[[int, int, CostModel, float | None], Schedule]


def schedules_folder(cache_dir: str) -> Path:
    """Returns the folder of schedules in a cache folder; `~` is expanded."""
    return Path(cache_dir).expanduser() / "schedules"


def load_or_make(
    make: Make,
    num_ranks: int,
    num_micro_batches: int,
    costs: CostModel,
    memory_cap: float | None,
    cache_dir: Path | None,
) -> Schedule:
    """Returns the schedule of `make`, from the cache if possible; a cached schedule is validated."""
    if cache_dir is None:
        return make(num_ranks, num_micro_batches, costs, memory_cap)
    inputs = json.dumps([make.__name__, num_ranks, num_micro_batches, asdict(costs), memory_cap])
    digest = hashlib.sha256((_program_digest(make) + inputs).encode()).hexdigest()[:24]
    path = cache_dir / f"{make.__name__}-{num_ranks}-{num_micro_batches}-{digest}.json"
    cached = _read(path)
    if cached is not None and (cached.num_ranks, cached.num_micro_batches) == (num_ranks, num_micro_batches):
        return cached
    schedule = make(num_ranks, num_micro_batches, costs, memory_cap)
    write_if_possible(path, to_json(schedule))
    return schedule


def _program_digest(make: Make) -> str:
    """Returns a digest of every file of the search, its presets and a plugin's file included."""
    package = Path(__file__).parent
    own = sys.modules[make.__module__].__file__
    files = {*package.rglob("*.py"), *package.rglob("*.json"), *([Path(own)] if own else [])}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> Schedule | None:
    try:
        schedule = from_json(path.read_text(encoding="utf-8"))
        validate(schedule)
    except (OSError, UnicodeDecodeError, ScheduleError):
        return None
    return schedule


def write_if_possible(path: Path, text: str) -> None:
    """Writes a file of a cache at once, or nothing if its folder cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()


KIND = "decode"
"""`Schedule.kind` of schedules that decode."""


def decode(placement: Placement, cohorts: int, rounds: int) -> Schedule:
    """Returns the schedule of a number of rounds of every cohort, in the order in which inputs arrive.

    Of several inputs, that of the latest stage is first: its tokens are needed soonest. A round reads prompts, or adds
    tokens to every sequence of the cohort.
    """
    for name, value in (("cohorts", cohorts), ("rounds", rounds)):
        if value < 1:
            raise ScheduleError(f"{name}: a schedule that decodes needs at least 1, has {value}; nearest: 1")
    num_ranks = 1 + max(max(row) for row in placement)
    ranks: list[list[Group]] = [[] for _ in range(num_ranks)]
    ready: list[list[tuple[int, int, int, int]]] = [[] for _ in range(num_ranks)]  # arrival, -stage, direction, m
    for direction, row in enumerate(placement):
        for cohort in range(cohorts):
            heappush(ready[row[0]], (0, 0, direction, cohort))
    time = 0
    while any(ready):
        made: list[tuple[int, tuple[int, int, int, int]]] = []
        for rank, waiting in enumerate(ready):
            if waiting:
                _, stage, direction, micro_batch = heappop(waiting)
                op = Operation(Op.FORWARD, direction, -stage, micro_batch)
                ranks[rank].append((op,))
                made += _next(placement, op, cohorts, rounds, time + 1)
        for rank, arrived in made:
            heappush(ready[rank], arrived)
        time += 1
    return Schedule(
        kind=KIND,
        num_ranks=num_ranks,
        num_micro_batches=len(placement) * cohorts * rounds,
        placement=placement,
        ranks=tuple(map(tuple, ranks)),
        cohorts=cohorts,
    )


def _next(
    placement: Placement, op: Operation, cohorts: int, rounds: int, time: int
) -> list[tuple[int, tuple[int, int, int, int]]]:
    row = placement[op.direction]
    stage = op.stage + 1
    micro_batch = op.micro_batch
    if stage == len(row):
        stage = 0
        micro_batch = micro_batch + cohorts
    if micro_batch >= cohorts * rounds:
        return []
    return [(row[stage], (time, -stage, op.direction, micro_batch))]
