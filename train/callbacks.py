"""Calls functions of the user: callbacks on rank 0, and metrics that plugins add. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.refusal import ConfigError
from base.registry import Registry
from train.errors import CallbackError

if TYPE_CHECKING:
    from train.core.world import World

Metric = Callable[[Mapping[str, Any]], float]
"""Takes the record of a step, as in `metrics.jsonl`, and returns one more value of it."""
METRICS: Registry[Metric] = Registry("metrics")
"""Metrics of plugin files by their key in `metrics.jsonl`."""


def add_metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a step's record with the metrics of plugins. Raises ConfigError if a name is taken."""
    if taken := [name for name in METRICS.names() if name in record]:
        raise ConfigError(f"metrics: {taken[0]!r} is a key of a step's record already; choose another name")
    return {**record, **{name: metric(record) for name, metric in METRICS.items()}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Callbacks:
    """Functions that rank 0 calls while the other ranks wait, at most for `cluster.timeout_seconds`.

    If one of them raises, the run ends with a `CallbackError` on all ranks. Checkpoints that are being written are
    completed first.

    Attributes:
        on_step: receives the record of each step that updated the weights, as in `metrics.jsonl`.
        on_validation: receives the number of steps done and the loss of held-out sequences in nats per token. In
            a run that learns from rewards, it is pass@1 on held-out problems, or their reward if nothing checks them.
        on_checkpoint: receives the step and the folder of each checkpoint, once it is complete.
    """

    on_step: Callable[[Mapping[str, Any]], object] | None = None
    on_validation: Callable[[int, float], object] | None = None
    on_checkpoint: Callable[[int, Path], object] | None = None


def call_on_first_rank(world: "World", name: str, calls: Callable[[], object] | None) -> None:
    """Calls a function on rank 0 while the other ranks wait. All ranks call it."""
    from torch import distributed as dist

    if calls is None:
        return
    problem = [""]
    cause = None
    with world.phase(f"callback {name}"):
        if world.rank == 0:
            try:
                calls()
            except Exception as error:
                problem = [f"{type(error).__name__}: {error}"]
                cause = error
        dist.broadcast_object_list(problem, src=0, group=world.groups.world)
    if problem[0]:
        raise CallbackError(f"{name}: {problem[0]}") from cause
