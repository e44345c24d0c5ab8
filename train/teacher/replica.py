"""Runs a teacher's network in the student's pipeline, forward only.

A micro-batch's states are computed on the rank that computes its loss. They do not travel, and logits are never stored:
the kernel computes them again from the states, chunk by chunk. Shape legend: S hidden size of the teacher.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from dualpipe.ir import Schedule
from model.objective import BALANCE, LossSums, Objective
from model.objectives.distillation import Distillation, KeepStates
from model.transformer import named_tensors
from train.checkpoint.sources import open_source
from train.config import TrainConfig
from train.network import ReplicaConfig
from train.replica import Batches, Replica, open_replica
from train.schedule.cut import run_cut
from train.tasks.distill import DistillConfig
from train.tasks.registry import TASKS


@dataclass(frozen=True, slots=True)
class Teacher:
    """A frozen network under the student's schedule, without MTP modules.

    Attributes:
        replica: its network.
    """

    replica: Replica

    def states(self, batches: Batches) -> dict[tuple[int, int], Tensor]:
        """Returns the input of the main head, [B, T, S], of the micro-batches whose losses are on this rank.

        All ranks call it.

        Returns:
            States by (direction, micro-batch).
        """
        sums = LossSums((BALANCE,), {})
        self.replica.forward(batches, KeepStates(), sums)
        # Records of steps count the traffic of the student.
        self.replica.observers.traffic.take()
        self.replica.observers.clips.take()
        return sums.log_probs or {}

    def bind(self, objective: Objective) -> Objective:
        """Returns a step's objective with the teacher's head, on ranks that hold it."""
        assert isinstance(objective, Distillation)
        head = self.replica.network.lm_head
        return objective if head is None else replace(objective, teacher_head_VS=head.weight.detach())

    def with_schedule(self, schedule: Schedule) -> "Teacher":
        """Returns the same weights under another schedule, which the student's replica has validated."""
        return Teacher(self.replica.with_schedule(schedule, is_proven=True))

    def close(self) -> None:
        """Closes the replica. All ranks call it at the same point."""
        self.replica.close()


def open_teacher(config: TrainConfig, student: Replica) -> Teacher | None:
    """Opens the teacher of a run that has one in its pipeline, and loads its weights. All ranks call it.

    Args:
        student: the replica that the run trains.

    Raises:
        CheckpointError, HfError: a tensor's content cannot be read.
    """
    task = config.task
    own = TASKS.get(task.kind).teacher_run(config)
    if own is None or not isinstance(task, DistillConfig):
        return None
    source = open_source(task.teacher, "task.teacher", drop_mtp=True)
    cut = run_cut(own, student.schedule.placement)
    replica = open_replica(student.world, ReplicaConfig.of_run(own), student.schedule, cut, is_proven=True)
    source.fill(named_tensors(replica.network))
    return Teacher(replica)
