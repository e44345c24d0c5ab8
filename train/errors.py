"""Defines the errors that end a step, a run or a command on all ranks."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRefusal:
    """The reason why the guard refuses a step, equal on all ranks.

    `ranks` are those with their own non-finite losses or gradients; if all are finite, the rank with the largest
    gradients; none if the reason is the same on all ranks.
    `last_good` is the number of updates after which the weights were still good; None: the batch is the reason.
    With `ends_run`, neither another batch nor other weights would help.
    """

    step: int
    reason: str
    values: Mapping[str, float] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()
    last_good: int | None = None
    ends_run: bool = False


class RefusedStepError(RuntimeError):
    """The guard refuses a step. Raised on every rank; nothing was updated."""

    def __init__(self, refusal: StepRefusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


class StoppedError(RuntimeError):
    """The guard ends the run. Raised on every rank."""


class UnscoredError(StoppedError):
    """The answers of a rollout cannot be scored. Raised on every rank."""


class UnsavedError(OSError):
    """The run's folder did not take a checkpoint. Raised on every rank at the same point."""


class RescuedError(RuntimeError):
    """The run ends because its folder takes no checkpoint. The text says where the state is."""


class CallbackError(RuntimeError):
    """A callback failed. Raised on every rank at the same point; the text says which and why."""


class DeadRankError(RuntimeError):
    """A rank of a command on this machine died."""


class PreemptedError(RuntimeError):
    """The run is preempted. Raised on every rank at the same point, where each can leave."""
