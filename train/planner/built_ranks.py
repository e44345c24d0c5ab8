"""Builds one rank of every kind in a job without its devices, and counts what it holds.

A plan counts parameters and bytes by arithmetic (`train.memory`). This module checks that against the real model,
process groups and optimizer, with torch's fake process group and tensors without memory. No torch in this process.
"""

import multiprocessing
import pickle
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kernels.registry import load_plugins, loaded_plugins
from train.config import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltRank:
    """Counts of a rank that was built, of the network that is trained. All data replicas hold as much.

    Attributes:
        rank: global rank that was built.
        pipeline_rank: its index within the pipeline.
        pipeline_ranks: indices of all pipeline ranks with the same stages, including its own.
        parameters: number of parameters.
        weights: bytes of weights, router biases and loads, and rotation tables.
        gradients: bytes of summed gradients.
        optimizer: bytes of its shard of master weights and moments, without the padding of shards.
    """

    rank: int
    pipeline_rank: int
    pipeline_ranks: tuple[int, ...]
    parameters: int
    weights: int
    gradients: int
    optimizer: int


def build_ranks(config: TrainConfig) -> tuple[BuiltRank, ...]:
    """Builds one rank for every distinct set of stages, the first of those that hold it.

    Works in a process that ends with the call, because a process can have one `torch.distributed` only.

    Args:
        config: of the run, with the cut that it uses, as `train.memory.fitted_config` returns it.

    Returns:
        The ranks, by pipeline rank.

    Raises:
        ScheduleError: the schedule cannot be built.
        CutError: the model has fewer layers than stages.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        # Plugins may define classes of the configuration, so they are loaded before it is unpickled.
        return pool.submit(_build, loaded_plugins(), pickle.dumps(config)).result()


def _build(plugins: Sequence[Path], pickled_config: bytes) -> tuple[BuiltRank, ...]:
    """Builds the ranks in this process."""
    from train.planner.fake_world import build_distinct_ranks

    load_plugins(plugins)
    config = pickle.loads(pickled_config)
    assert isinstance(config, TrainConfig)
    return build_distinct_ranks(config)
