"""What is shown of one schedule: its timing, what is proven about it, and the words that all pictures share."""

import math
from dataclasses import dataclass

from dualpipe.ir import Op, Schedule
from dualpipe.runtime.measured import Measured
from dualpipe.simulate.bounds import Bound, lower_bound
from dualpipe.simulate.costs import CostModel, Costs, uniform
from dualpipe.simulate.simulate import Simulation, simulate


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedSchedule:
    """A schedule, its timing under `costs`, the bound that no schedule beats there, and a run's time if there is one.

    Where there is a run, the unit of the costs is a second.
    """

    schedule: Schedule
    costs: CostModel
    simulation: Simulation
    bound: Bound
    measured: Measured | None = None

    @property
    def work(self) -> float:
        """Computation of the rank that has most of it."""
        ranks = self.schedule.ranks
        return max(
            (sum(self.costs.compute_of(op) for group in groups for op in group) for groups in ranks), default=0.0
        )

    @property
    def overhead(self) -> float:
        """What the makespan has above that work."""
        return self.simulation.makespan - self.work

    @property
    def exposed(self) -> float:
        """Exposed exchange of the rank that has most of it."""
        return max(self.simulation.exposed, default=0.0)

    @property
    def peak(self) -> float:
        """Peak live activations of the rank that keeps most, of model/P where the costs come from `costs.uniform`."""
        return max(self.simulation.peaks, default=0.0)

    @property
    def above_bound(self) -> float:
        """The makespan less the bound."""
        return self.simulation.makespan - self.bound.value


@dataclass(frozen=True, slots=True, kw_only=True)
class UnavailableSchedule:
    """A kind of schedule that cannot be shown, and why, as in `needs an even number of ranks`."""

    kind: str
    reason: str


def time_schedule(
    schedule: Schedule, costs: Costs | CostModel, memory_cap: float | None = None, measured: Measured | None = None
) -> TimedSchedule:
    """Times a valid schedule and bounds it.

    Args:
        schedule: a valid one that trains.
        costs: of each stage, or of model/P where all stages are equal; in seconds where there is a run.
        memory_cap: what limits every schedule that it is compared with, see `bounds.lower_bound`.
        measured: a run of it.

    Raises:
        ScheduleError: the ranks wait for each other, or no schedule keeps the cap.
    """
    model = uniform(costs, schedule.num_ranks, schedule.num_stages) if isinstance(costs, Costs) else costs
    return TimedSchedule(
        schedule=schedule,
        costs=model,
        simulation=simulate(schedule, model),
        bound=lower_bound(schedule, model, memory_cap),
        measured=measured,
    )


NAMES = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.BACKWARD_INPUT: "backward for inputs",
    Op.BACKWARD_WEIGHT: "backward for weights",
}


def number(value: float) -> str:
    """Returns at most three significant digits, as in `24.6`; sums of rounded times that miss zero by an ulp are 0."""
    rounded = 0.0 if abs(value) < 1e-9 else float(f"{value:.3g}")
    return f"{rounded:.10g}"


def tick_text(value: float) -> str:
    """Returns the text of a round time on an axis."""
    return f"{value:.6g}"


def spread(values: tuple[float, ...]) -> str:
    """Returns the one value, or the least and the largest."""
    shown = list(dict.fromkeys(number(value) for value in sorted(values)))
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"


def percent(fraction: float) -> str:
    """Returns a percentage with three significant digits, as in `9.09 %`."""
    return f"{number(100 * fraction)} %"


def round_up(value: float) -> float:
    """Returns the least of 1, 2, 5 times a power of ten that is not below the value."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def plain(text: str) -> str:
    """Returns ASCII for terminals and pipes of any encoding."""
    return text.encode("ascii", "backslashreplace").decode()


def needs_stage_label(schedule: Schedule, rank: int, direction: int) -> bool:
    """Returns whether a label needs the stage: the rank holds several for the direction."""
    return [held for held, _ in schedule.stages_of(rank)].count(direction) > 1


def size(schedule: Schedule) -> str:
    """As in `8 ranks, 20 micro-batches`."""
    ranks, batches = schedule.num_ranks, schedule.num_micro_batches
    return f"{ranks} rank{'s' * (ranks != 1)}, {batches} micro-batch{'es' * (batches != 1)}"
