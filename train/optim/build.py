"""Builds the optimizer that a run configures."""

from collections.abc import Sequence
from typing import assert_never

from torch import distributed as dist

from model.gradients import GradientStore
from train.optim.config import OptimConfig
from train.optim.parameters import Unit
from train.optim.replicated import ReplicatedAdamW
from train.optim.staged import Background, StagedAdamW, UnitOptimizer
from train.optim.zero1 import Zero1AdamW


def build_optimizer(
    units: Sequence[Unit], store: GradientStore, world: dist.ProcessGroup, config: OptimConfig, background: Background
) -> StagedAdamW:
    """Builds the optimizer of a rank. All ranks call it.

    Args:
        units: the rank's parameters, in the order of their reductions.
        config: of the optimizer; its `sharding` selects the optimizer of each unit.
        background: what reductions and updates run on.
    """
    return StagedAdamW([(unit, _build_unit(unit, store, config)) for unit in units], store, world, background)


def _build_unit(unit: Unit, store: GradientStore, config: OptimConfig) -> UnitOptimizer:
    match config.sharding:
        case "zero1":
            return Zero1AdamW(unit, store, config)
        case "replicated":
            return ReplicatedAdamW(unit, store, config)
        case _ as other:
            assert_never(other)
