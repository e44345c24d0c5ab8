"""Frozen networks with which a run compares its own: references and teachers.

Each is a second replica under the same schedule. So what it computes for a micro-batch is on the rank that needs it,
and does not travel. Logits of a teacher are never stored: the kernel computes them again from its states, chunk by
chunk.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from dualpipe.ir import Schedule
from model.objective import Objective
from model.objectives.distillation import TEACHER_STATES, Distillation, KeepStates
from model.objectives.pairs import REFERENCE
from model.objectives.policy import TokenLogProbs
from model.transformer import named_tensors
from train.checkpoint.sources import open_source
from train.config import TrainConfig
from train.core.learner import NetworkComparison
from train.core.replica import BatchReader, Replica, open_replica
from train.core.world import ReplicaConfig
from train.predict.cut import run_cut
from train.tasks.distill import DistillConfig
from train.tasks.registry import TASKS


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenNetwork(NetworkComparison):
    """A frozen replica without MTP modules."""

    replica: Replica

    def with_schedule(self, schedule: Schedule) -> Self:
        """Implements `NetworkComparison.with_schedule`."""
        return replace(self, replica=self.replica.with_schedule(schedule, is_proven=True))

    def close(self) -> None:
        """Implements `NetworkComparison.close`."""
        self.replica.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference(FrozenNetwork):
    """The model that a run started from; every `every_steps`, if not None, the present weights replace it."""

    temperature: float = 1.0
    every_steps: int | None = None

    @property
    def extras(self) -> "dict[str, Reference]":
        """Implements `NetworkComparison.extras`."""
        return {"reference": self}

    @property
    def network(self) -> Replica | None:
        """Implements `NetworkComparison.network`."""
        return self.replica

    def add(self, batches: BatchReader, objective: Objective) -> Objective:
        """Adds the targets' log-probabilities, [B, T]."""
        batches.add_extras(REFERENCE, self.replica.record(batches, TokenLogProbs(temperature=self.temperature)))
        return objective

    def follow(self, policy: Replica) -> None:
        """Implements `NetworkComparison.follow`."""
        weights = named_tensors(policy.model)
        for name, tensor in self.state().items():
            tensor.copy_(weights[name])

    def refresh(self, policy: Replica, num_done: int) -> None:
        """Implements `NetworkComparison.refresh`."""
        if self.every_steps is not None and num_done % self.every_steps == 0:
            self.follow(policy)

    def state(self) -> Mapping[str, Tensor]:
        """Returns this rank's weights, to save or to fill in place."""
        return named_tensors(self.replica.network)

    def loaded(self) -> None:
        """Does nothing, because nothing is derived from the weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher(FrozenNetwork):
    """A network that a student imitates. It is loaded again from where the configuration says."""

    def add(self, batches: BatchReader, objective: Objective) -> Objective:
        """Adds the states of the main head to micro-batches, and the head to the objective.

        States are [B, T, S] with the teacher's hidden size S. Only ranks that compute losses hold the head.
        """
        batches.add_extras(TEACHER_STATES, self.replica.record(batches, KeepStates()))
        assert isinstance(objective, Distillation)
        head = self.replica.network.lm_head
        return objective if head is None else replace(objective, teacher_head_VS=head.weight.detach())


def open_comparison(config: TrainConfig, policy: Replica) -> NetworkComparison:
    """Opens a run's frozen network, with the policy's weights or a teacher's. All ranks call it."""
    task = config.task
    spec = TASKS.get(task.kind)
    if spec.has_reference(task):
        shape = replace(policy.config, model=replace(policy.config.model, mtp_depth=0))
        reference = Reference(
            replica=open_replica(policy.world, shape, policy.schedule, policy.cut, is_proven=True),
            temperature=1.0 if config.rollout is None else config.rollout.temperature,
            every_steps=spec.reference_interval(task),
        )
        reference.follow(policy)
        return reference
    run = spec.teacher_run(config)
    if run is None or not isinstance(task, DistillConfig):
        return NetworkComparison()
    source = open_source(task.teacher, "task.teacher", drop_mtp=True)
    cut = run_cut(run, policy.schedule.placement)
    replica = open_replica(policy.world, ReplicaConfig.of_run(run), policy.schedule, cut, is_proven=True)
    source.fill(named_tensors(replica.network))
    return Teacher(replica=replica)
