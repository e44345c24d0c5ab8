"""Defines the data that is shown of one schedule, and the text that all pictures share."""

import math
from dataclasses import dataclass

from dualpipe.ir import Op, Schedule
from dualpipe.runtime.measured import Measured
from dualpipe.simulate.bounds import Bound, lower_bound
from dualpipe.simulate.costs import CostModel, Costs, uniform
from dualpipe.simulate.pace import Pace, pace_of
from dualpipe.simulate.timing import Simulation, simulate


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedSchedule:
    """Schedule with its timing and lower bound. If it was run, the costs are in seconds and it has spans."""

    schedule: Schedule
    costs: CostModel
    simulation: Simulation
    bound: Bound
    measured: Measured | None = None
    memory_cap: float | None = None

    @property
    def steady_state(self) -> Pace | None:
        """What repeats and what limits it, or None if there are too few micro-batches."""
        return pace_of(self.schedule, self.costs, self.simulation, self.memory_cap)

    @property
    def work(self) -> float:
        """Computation of the rank with the most computation."""
        ranks = self.schedule.ranks
        return max(
            (sum(self.costs.compute_of(op) for group in groups for op in group) for groups in ranks), default=0.0
        )

    @property
    def overhead(self) -> float:
        """Makespan minus `work`."""
        return self.simulation.makespan - self.work

    @property
    def exposed(self) -> float:
        """Exposed exchange of the rank with the most exposed exchange."""
        return max(self.simulation.exposed, default=0.0)

    @property
    def peak(self) -> float:
        """Largest peak of live activations of a rank; of model/P if the costs come from `costs.uniform`."""
        return max(self.simulation.peaks, default=0.0)

    @property
    def chunks(self) -> int:
        """Stages of a rank for one direction."""
        return self.schedule.num_stages // self.schedule.num_ranks

    @property
    def copies(self) -> int:
        """Number of times that the pipeline holds the model's weights: once for each direction."""
        return self.schedule.num_directions

    @property
    def memory(self) -> float:
        """Peak of live activations plus the copies of the weights, if the costs count weights."""
        return self.peak + self.copies * self.costs.weights

    @property
    def above_bound(self) -> float:
        """Makespan minus the lower bound."""
        return self.simulation.makespan - self.bound.value


@dataclass(frozen=True, slots=True, kw_only=True)
class UnavailableSchedule:
    """Kind of schedule that is not available, and the reason, as in `needs an even number of ranks`."""

    kind: str
    reason: str


def time_schedule(
    schedule: Schedule, costs: Costs | CostModel, memory_cap: float | None = None, measured: Measured | None = None
) -> TimedSchedule:
    """Simulates a valid schedule and computes its lower bound, in seconds if there was a run.

    Raises:
        ScheduleError: if ranks deadlock, or no schedule fits the cap.
    """
    model = uniform(costs, schedule.num_ranks, schedule.num_stages) if isinstance(costs, Costs) else costs
    return TimedSchedule(
        schedule=schedule,
        costs=model,
        simulation=simulate(schedule, model),
        bound=lower_bound(schedule, model, memory_cap),
        measured=measured,
        memory_cap=memory_cap,
    )


NAMES = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.BACKWARD_INPUT: "backward for inputs",
    Op.BACKWARD_WEIGHT: "backward for weights",
    Op.OFFLOAD: "offload",
    Op.RELOAD: "reload",
}


def number(value: float) -> str:
    """Formats a number with at most three significant digits, as in `24.6`; about zero is 0."""
    rounded = 0.0 if abs(value) < 1e-9 else float(f"{value:.3g}")
    return f"{rounded:.10g}"


def tick_text(value: float) -> str:
    """Formats a round time for an axis."""
    return f"{value:.6g}"


def spread(values: tuple[float, ...]) -> str:
    """Formats the value if all are equal, else the minimum and the maximum."""
    shown = list(dict.fromkeys(number(value) for value in sorted(values)))
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"


def percent(fraction: float) -> str:
    """Formats a fraction as a percentage with three significant digits, as in `9.09 %`."""
    return f"{number(100 * fraction)} %"


def round_up(value: float) -> float:
    """Rounds up to the next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def plain(text: str) -> str:
    """Escapes text to ASCII, for terminals and pipes of any encoding."""
    return text.encode("ascii", "backslashreplace").decode()


def needs_stage_label(schedule: Schedule, rank: int, direction: int) -> bool:
    """Returns whether a label needs the stage because the rank holds several for the direction."""
    return [held for held, _ in schedule.stages_of(rank)].count(direction) > 1


def size(schedule: Schedule) -> str:
    """Formats the size, as in `8 ranks, 20 micro-batches`."""
    ranks = schedule.num_ranks
    batches = schedule.num_micro_batches
    return f"{ranks} rank{'s' * (ranks != 1)}, {batches} micro-batch{'es' * (batches != 1)}"
