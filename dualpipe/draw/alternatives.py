"""Times the other registered schedules under the costs that a run measured."""

import math
from collections.abc import Callable, Mapping

from dualpipe.build import build
from dualpipe.draw.entry import TimedSchedule, UnavailableSchedule, time_schedule
from dualpipe.ir import Schedule, ScheduleError
from dualpipe.registry import candidates
from dualpipe.simulate.costs import CostModel, resampled
from dualpipe.simulate.simulate import simulate

_MOST_SEARCHED = 256
"""Maximum of stages times micro-batches for which a run waits for a searched schedule: about 1 s."""

_ROUNDING = 1e-9


class Alternatives:
    """Other schedules of a run's size. Each is made once and timed under the costs of every picture."""

    def __init__(
        self,
        excluded: Mapping[str, str],
        change: Callable[[Schedule], Schedule] | None = None,
        most_stages: int | None = None,
    ) -> None:
        """Stores kinds that the model cannot use with reasons, and the maximum number of stages.

        Args:
            change: function by which the run changes its own schedule before timing, or None.
        """
        self._excluded = excluded
        self._change = change
        self._most_stages = math.inf if most_stages is None else most_stages
        self._made: dict[str, Schedule | UnavailableSchedule] = {}

    def timed(self, schedule: Schedule, costs: CostModel) -> list[TimedSchedule | UnavailableSchedule]:
        """Times every other kind under the costs of the run's stages, or says why it is not available.

        A kind keeps the number of chunks that is best under the costs of the first call.
        """
        rows: list[TimedSchedule | UnavailableSchedule] = []
        for kind in candidates():
            if kind == schedule.kind:
                continue
            made = self._made.get(kind)
            if made is None:
                made = self._made[kind] = self._make(kind, schedule, costs)
            if isinstance(made, Schedule):
                rows.append(time_schedule(made, resampled(costs, made.num_stages)))
            else:
                rows.append(made)
        return rows

    def _make(self, kind: str, schedule: Schedule, costs: CostModel) -> Schedule | UnavailableSchedule:
        num_ranks, num_micro_batches, spec = schedule.num_ranks, schedule.num_micro_batches, candidates()[kind]
        if kind in self._excluded:
            return UnavailableSchedule(kind=kind, reason=self._excluded[kind])
        hint = f"num_ranks={num_ranks} num_micro_batches={num_micro_batches}"
        reason = f"its search takes too long during a run; see python -m launch.schedule {hint}"
        best: Schedule | None = None
        shortest = math.inf
        for chunks in spec.chunk_choices(None):
            num_stages = spec.num_stages(num_ranks, chunks)
            if spec.takes_costs and num_stages * num_micro_batches > _MOST_SEARCHED:
                break
            if chunks > spec.chunks[0] and num_stages > self._most_stages:
                break
            try:
                own_costs = resampled(costs, num_stages)
                made = build(kind, num_ranks, num_micro_batches, own_costs)
            except ScheduleError as error:
                reason = str(error)
                continue
            made = made if self._change is None else self._change(made)
            makespan = simulate(made, own_costs).makespan
            if makespan < shortest * (1 - _ROUNDING):
                best, shortest = made, makespan
        return best or UnavailableSchedule(kind=kind, reason=reason)


def by_makespan(rows: list[TimedSchedule | UnavailableSchedule]) -> list[TimedSchedule | UnavailableSchedule]:
    """Returns the rows sorted by makespan, unavailable schedules last."""
    timed = [row for row in rows if isinstance(row, TimedSchedule)]
    others = [row for row in rows if isinstance(row, UnavailableSchedule)]
    return [*sorted(timed, key=lambda row: (row.simulation.makespan, row.peak)), *others]
