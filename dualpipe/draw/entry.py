"""What is shown of one schedule: the schedule, its timing and what is proven about it."""

from dataclasses import dataclass

from dualpipe.ir import Schedule
from dualpipe.runtime.measured import Measured
from dualpipe.simulate.bounds import Bound, lower_bound
from dualpipe.simulate.costs import CostModel, Costs, uniform
from dualpipe.simulate.simulate import Simulation, simulate


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
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
class Absent:
    """A kind of schedule that cannot be shown, and why, as in `needs an even number of ranks`."""

    kind: str
    reason: str


def entry(
    schedule: Schedule, costs: Costs | CostModel, memory_cap: float | None = None, measured: Measured | None = None
) -> Entry:
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
    return Entry(
        schedule=schedule,
        costs=model,
        simulation=simulate(schedule, model),
        bound=lower_bound(schedule, model, memory_cap),
        measured=measured,
    )
