"""Refuses stages of `torch.distributed.pipelining` that torch cannot run right under a schedule.

Undocumented names of torch in use: `_checkpoint_hook` of `torch.utils.checkpoint`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel
from torch.utils import checkpoint

from dualpipe.ir import ScheduleError

_LEAST_TORCH = (2, 12)
_REUSES_WEIGHTS = (2, 13)  # before it, W counts a weight twice that a stage uses twice (pytorch 180952)
StageKey = tuple[int, int]
"""Direction and stage."""


def check_torch_version() -> None:
    """Rejects versions of torch whose pipelining lacks what `DualPipeStep` uses."""
    if _version() < _LEAST_TORCH:
        raise ScheduleError(f"torch: must be at least 2.12, is {torch.__version__}; nearest: 2.12")


def _version() -> tuple[int, ...]:
    return tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))


def check_stages(held: Sequence[StageKey], stages: Mapping[StageKey, Any]) -> None:
    """Rejects stages that are missing on this rank, and two modules for both directions of one stage."""
    for key in held:
        if key not in stages:
            have = ", ".join(map(str, stages)) or "none"
            raise ScheduleError(f"stages: must have (direction, stage) {key} on this rank, has {have}; nearest: {held}")
    for number in {stage for _, stage in held}:
        copies = [stages[key] for key in held if key[1] == number]
        modules = {id(stage.submod if isinstance(stage, PipelineStage) else stage) for stage in copies}
        if len(modules) > 1:
            raise ScheduleError(
                f"stages: both directions of stage {number} are on this rank and must be one module, are two; "
                "nearest: the same module twice"
            )


def check_module(module: Any, key: StageKey) -> None:
    """Rejects wrappers with which torch's I and W give wrong gradients or fail."""
    for part in module.modules():
        if isinstance(part, DistributedDataParallel):
            _refuse(
                key, "must not be in DistributedDataParallel, which reduces no gradients after I and W (pytorch 144530)"
            )
        if isinstance(part, OptimizedModule):
            _refuse(key, "must not be compiled, since torch.compile gives up buffers between I and W")


def _count_uses(key: StageKey, module: Any) -> list[Any]:
    """Rejects forwards of a stage that use a weight twice. Returns the handles of its hooks."""
    rule = "must use each weight once before torch 2.13, whose W counts it twice (pytorch 180952)"
    used: set[int] = set()

    def count(weights: Sequence[int]) -> None:
        if used.intersection(weights):
            _refuse(key, rule)
        used.update(weights)

    handles = [module.register_forward_pre_hook(lambda *_: used.clear())]
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            _refuse(key, rule)
        weights = [id(weight) for weight in part.parameters(recurse=False)]
        handles.append(part.register_forward_pre_hook(lambda *_, weights=weights: count(weights)))
    return handles


@contextmanager
def watch_modules(stages: Mapping[StageKey, PipelineStage]) -> Iterator[None]:
    """Rejects stages that checkpoint in a forward, and before torch 2.13 those that reuse a weight."""
    running: list[StageKey] = []
    handles = []

    def refuse_checkpoint(*_: Any, **__: Any) -> NoReturn:
        _refuse(running[-1], "must not be checkpointed, since torch recomputes it in I and again for weights in W")

    for key, stage in {id(stage.submod): (key, stage) for key, stage in stages.items()}.values():
        handles.append(stage.submod.register_forward_pre_hook(lambda *_, key=key: running.append(key)))
        handles += _count_uses(key, stage.submod) if _version() < _REUSES_WEIGHTS else []
    # What every way to checkpoint calls in a forward.
    places: Any = ((checkpoint._checkpoint_hook, "__init__"), (checkpoint.CheckpointFunction, "forward"))
    originals = [vars(owner)[name] for owner, name in places]
    for owner, name in places:
        setattr(owner, name, refuse_checkpoint if name == "__init__" else staticmethod(refuse_checkpoint))
    try:
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)
        for handle in handles:
            handle.remove()


def _refuse(key: StageKey, rule: str) -> NoReturn:
    raise ScheduleError(
        f"stages: stage {key[1]} {rule}; nearest: full backwards, as merge_backwards(schedule) has them"
    )
