"""Builds one rank of every kind in a job without its devices, and counts what it holds.

A plan counts parameters and optimizer state by arithmetic (`train.memory`). This module checks that against the real
model, process groups and optimizer, with torch's fake process group and tensors without memory. No torch in this
process.
"""

import multiprocessing
import pickle
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.registry import load_plugins, loaded_plugins
from model.size import held_parameters, stage_shapes
from train.config import TrainConfig
from train.memory.predict import planning_sizes
from train.memory.rank_bytes import count_replicas, static_bytes
from train.schedule.cut import run_cut
from train.schedule.timing import planning_schedule

_MOST_PADDING = 12 * 12
"""ZeRO-1 rounds the shard of a parameter group up to a whole element, of 12 bytes; a rank has at most 12 groups."""
_COUNTED = {
    "parameters": "parameters",
    "weights_bytes": "bytes of weights",
    "gradients_bytes": "bytes of gradients",
    "optimiser_bytes": "bytes of optimizer",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltRank:
    """Counts of a rank that was built, of the network that is trained. All data replicas hold as much.

    Counts are without the padding of the optimizer's shards. `pipeline_ranks` are all those with the same stages.
    """

    rank: int
    pipeline_rank: int
    pipeline_ranks: tuple[int, ...]
    parameters: int
    weights: int
    gradients: int
    optimizer: int


def compare_built_ranks(config: TrainConfig) -> list[dict[str, Any]]:
    """Builds one rank of each kind and compares what it holds with arithmetic."""
    counted = _count_by_arithmetic(config)
    return [compared_kind(built, counted) for built in build_ranks(config)]


def compared_kind(built: BuiltRank, counted: Mapping[int, Mapping[str, int]]) -> dict[str, Any]:
    """Returns a built rank next to what arithmetic counts for each pipeline rank of its kind."""
    sizes = (built.parameters, built.weights, built.gradients, built.optimizer)
    values = dict(zip(_COUNTED, sizes, strict=True))
    # All ranks of a kind must be as arithmetic says, not only the one that was built.
    differences = dict.fromkeys(
        f"{name}: built {values[key]:,}, by arithmetic {counted[rank][key]:,}"
        for rank in built.pipeline_ranks
        for key, name in _COUNTED.items()
        if abs(values[key] - counted[rank][key]) > (_MOST_PADDING if key == "optimiser_bytes" else 0)
    )
    shown = {"equal": not differences, "differences": list(differences)}
    return {"pipeline_ranks": list(built.pipeline_ranks), **values, **shown}


def _count_by_arithmetic(config: TrainConfig) -> dict[int, dict[str, int]]:
    """Returns what each pipeline rank holds of the network that is trained, without second networks."""
    schedule = planning_schedule(config, config.num_micro_batches)
    shapes = stage_shapes(run_cut(config, schedule.placement))
    sizes = planning_sizes(config)
    counts = {}
    for rank in range(schedule.num_ranks):
        stages = sorted({stage for _, stage in schedule.stages_of(rank)})
        held = held_parameters(config.model, [shapes[stage] for stage in stages], sizes.num_local_experts)
        static = static_bytes(config, held, sizes, count_replicas(config, schedule, rank))
        counts[rank] = dict(zip(_COUNTED, (held.total, *static), strict=True))
    return counts


def build_ranks(config: TrainConfig) -> tuple[BuiltRank, ...]:
    """Builds the first rank of every distinct set of stages, in a process that ends with the call.

    A process can have only one `torch.distributed`. `config` has the cut that the run uses.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        # Plugins may define classes of the configuration, so they are loaded before it is unpickled.
        return pool.submit(_build, loaded_plugins(), pickle.dumps(config)).result()


def _build(plugins: Sequence[Path], pickled_config: bytes) -> tuple[BuiltRank, ...]:
    from train.planner.fake_world import build_distinct_ranks

    load_plugins(plugins)
    config = pickle.loads(pickled_config)
    assert isinstance(config, TrainConfig)
    return tuple(BuiltRank(**counts) for counts in build_distinct_ranks(config))
