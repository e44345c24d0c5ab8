"""Functions that a run calls while it trains, on rank 0."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import CallbackError

if TYPE_CHECKING:
    from train.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class Callbacks:
    """Functions that rank 0 calls; the other ranks wait for it meanwhile, at most for `cluster.timeout_seconds`.

    If one raises, the run ends with a `CallbackError` on all ranks. Checkpoints that are being written are finished.

    Attributes:
        on_step: gets the record of each step that was done, as in `metrics.jsonl`.
        on_validation: gets the number of steps done and the loss of held-out sequences in nats per token.
        on_checkpoint: gets the step and the folder of each checkpoint, once it is whole.
    """

    on_step: Callable[[Mapping[str, Any]], object] | None = None
    on_validation: Callable[[int, float], object] | None = None
    on_checkpoint: Callable[[int, Path], object] | None = None


def call_on_first_rank(world: "World", name: str, calls: Callable[[], object] | None) -> None:
    """Calls a function on rank 0 while the others wait. All ranks call it, with None if there is nothing to call.

    Args:
        world: of this process.
        name: of the callback, for the error.
        calls: the callback with its arguments; its result is not used.

    Raises:
        CallbackError: on every rank, if it raised on rank 0.
    """
    from torch import distributed as dist

    if calls is None:
        return
    problem, cause = [""], None
    with world.phase(f"callback {name}"):
        if world.rank == 0:
            try:
                calls()
            except Exception as error:
                problem, cause = [f"{type(error).__name__}: {error}"], error
        dist.broadcast_object_list(problem, src=0, group=world.groups.world)
    if problem[0]:
        raise CallbackError(f"{name}: {problem[0]}") from cause
