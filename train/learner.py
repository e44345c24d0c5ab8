"""Updates a replica: gradients, optimizer and average, with one learner for each size of a ramp."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from comm.dispatch.build import open_lane
from data.batch_sizes import BatchSizes
from dualpipe.ir import Schedule
from dualpipe.runtime.program import first_use_order, reduction_order
from model.gradients import GradientStore
from train.config import EmaConfig
from train.optim.config import OptimConfig
from train.optim.ema import ParameterEma
from train.optim.parameters import ReductionGroups, StageOrders, Unit, group_parameters, split_into_units
from train.optim.staged import Background, StagedAdamW, build_optimizer
from train.post.frozen import NetworkComparison, Reference
from train.replica import Replica
from train.tasks.hook import TaskHook
from train.world import World

_NO_NETWORK = NetworkComparison()
_DATA_ALONE = TaskHook()


@dataclass(frozen=True, kw_only=True, slots=True)
class Learner:
    """A replica that is trained, with its average and the frozen network that its task compares."""

    replica: Replica
    config: OptimConfig
    store: GradientStore
    optimizer: StagedAdamW
    ema: ParameterEma | None
    comparison: NetworkComparison
    hook: TaskHook
    ramp: Mapping[int, Schedule] = field(default_factory=dict)

    @property
    def world(self) -> World:
        """The process that holds the replica."""
        return self.replica.world

    @property
    def extras(self) -> dict[str, ParameterEma | Reference]:
        """Further state of a checkpoint besides weights and optimizer state, by the prefix of its names."""
        average = {} if self.ema is None else {"ema": self.ema}
        return {**average, **self.comparison.extras}

    def update_average(self) -> None:
        """Starts to update the moving average, if the run keeps one, after all updates of the weights."""
        if self.ema is not None:
            self.replica.weight_updates.wait_all()
            self.ema.update()

    def close(self) -> None:
        """Closes optimizer, moving average and replica. All ranks call it at the same point."""
        self.optimizer.close()
        if self.ema is not None:
            self.ema.close()
        self.hook.close()  # it may use the frozen network
        self.comparison.close()
        self.replica.close()


def open_learner(
    replica: Replica,
    optim: OptimConfig,
    ema: EmaConfig,
    comparison: NetworkComparison = _NO_NETWORK,
    hook: TaskHook = _DATA_ALONE,
) -> Learner:
    """Builds the gradient store, the optimizer and, if configured, the moving average. All ranks call it."""
    model, world, store = replica.model, replica.world, GradientStore(replica.model.parameters())
    lane = open_lane(world.device, "reduction")
    background = Background(lane=lane, updates=replica.weight_updates, log=world.log)
    return Learner(
        replica=replica,
        config=optim,
        store=store,
        optimizer=build_optimizer(_units(replica), store, world.groups.world, optim, background),
        ema=None if ema.decay is None else ParameterEma(model, ema.decay),
        comparison=comparison,
        hook=hook,
    )


class LearnersByBatchSize:
    """One learner for each batch size; its programs run the number of micro-batches of that size.

    The learners share everything except schedules and programs. Programs are compiled once, at the start.
    """

    last: Learner

    def __init__(
        self, learner: Learner, sizes: BatchSizes, ramp: Mapping[int, Schedule], *, is_proven: bool = False
    ) -> None:
        """Compiles the programs of the ramp.

        Raises:
            ScheduleError: a schedule is not valid, or places stages or messages on other ranks than the learner's.
        """
        self.last = replace(learner, ramp=ramp)
        self._sizes = sizes
        self._sized = {
            sequences: _with_schedule(learner, schedule, is_proven=is_proven) for sequences, schedule in ramp.items()
        }
        assert set(sizes.sizes) <= {*self._sized, learner.replica.global_sequences}
        assert all(sized.replica.global_sequences == sequences for sequences, sized in self._sized.items())

    def for_step(self, step: int) -> Learner:
        """Returns the learner for a step, counted from 0."""
        return self._sized.get(self._sizes.sequences(step), self.last)


def _with_schedule(learner: Learner, schedule: Schedule, *, is_proven: bool) -> Learner:
    replica = learner.replica.with_schedule(schedule, is_proven=is_proven)
    return replace(learner, replica=replica, comparison=learner.comparison.with_schedule(schedule))


def _units(replica: Replica) -> list[Unit]:
    groups, schedule = replica.world.groups, replica.schedule
    return split_into_units(
        group_parameters(replica.model),
        ReductionGroups(dense=groups.stage, experts=groups.expert_data, expert=groups.expert),
        {number: stage.parameters() for number, stage in replica.stages.items()},
        StageOrders(reduction=reduction_order(schedule), first_use=first_use_order(schedule)),
        None if groups.embedding is groups.stage else groups.embedding,
    )
