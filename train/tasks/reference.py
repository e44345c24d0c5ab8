"""A frozen second set of weights, which scores tokens before the training pass of a batch.

It is a second replica under the same schedule. So a micro-batch's log-probabilities are computed on the rank that needs
them, and they do not travel.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from dualpipe.ir import Schedule
from model.objective import BALANCE, LossSums
from model.objectives.preference import TokenLogProbs
from model.transformer import named_tensors
from train.config import TaskConfig
from train.replica import Batches, Replica, open_replica
from train.tasks.registry import TASKS


@dataclass(frozen=True, slots=True)
class Reference:
    """The model that a run started from, without MTP modules. Its weights are part of a checkpoint.

    Attributes:
        replica: the frozen network.
    """

    replica: Replica

    def follow(self, policy: Replica) -> None:
        """Copies the present weights of the policy."""
        weights = named_tensors(policy.model)
        for name, tensor in named_tensors(self.replica.network).items():
            tensor.copy_(weights[name])

    def log_probs(self, batches: Batches, temperature: float = 1.0) -> dict[tuple[int, int], Tensor]:
        """Returns the targets' log-probabilities, [B, T], of the micro-batches whose losses are on this rank.

        All ranks call it.

        Returns:
            Log-probabilities by (direction, micro-batch).
        """
        sums = LossSums((BALANCE,), {})
        self.replica.forward(batches, TokenLogProbs(temperature=temperature), sums)
        # Records of steps count the traffic of the policy.
        self.replica.observers.traffic.take()
        self.replica.observers.clips.take()
        return sums.log_probs or {}

    def with_schedule(self, schedule: Schedule) -> "Reference":
        """Returns the same weights under another schedule, which the policy's replica has validated."""
        return Reference(self.replica.with_schedule(schedule, is_proven=True))

    def state(self) -> Mapping[str, Tensor]:
        """Returns this rank's weights, to save or to fill in place."""
        return named_tensors(self.replica.network)

    def loaded(self) -> None:
        """Does nothing, because nothing is derived from the weights."""

    def close(self) -> None:
        """Closes the replica. All ranks call it at the same point."""
        self.replica.close()


def refresh_reference(reference: object, task: TaskConfig, policy: Replica, num_done: int) -> None:
    """Copies the present weights into a reference, if the task does so after this many steps.

    All ranks call it.
    """
    interval = TASKS.get(task.kind).reference_interval(task)
    if interval is not None and isinstance(reference, Reference) and num_done % interval == 0:
        reference.follow(policy)


def open_reference(task: TaskConfig, policy: Replica) -> Reference | None:
    """Opens the reference of a task that needs one, with the policy's weights. All ranks call it.

    Args:
        policy: the replica that the run trains.
    """
    if not TASKS.get(task.kind).has_reference(task):
        return None
    config = replace(policy.config, model=replace(policy.config.model, mtp_depth=0))
    reference = Reference(open_replica(policy.world, config, policy.schedule, policy.cut, is_proven=True))
    reference.follow(policy)
    return reference
