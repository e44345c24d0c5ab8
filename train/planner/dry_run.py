"""Compares built ranks with the arithmetic of a plan. No torch in this process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.size import held_parameters, stage_shapes
from train.config import TrainConfig
from train.memory.predict import planning_sizes
from train.memory.static import count_replicas, static_bytes
from train.planner.built_ranks import BuiltRank, build_ranks
from train.schedule.cut import run_cut
from train.schedule.nominal import planning_schedule

_MOST_PADDING = 12 * 12
"""ZeRO-1 rounds the shard of a parameter group up to a whole element, of 12 bytes; a rank has at most 12 groups."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankCounts:
    """What one rank holds of the network that is trained."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int

    def differences(self, expected: "RankCounts") -> tuple[str, ...]:
        """Returns what differs, each as text with both numbers."""
        pairs = {
            "parameters": (self.parameters, expected.parameters, 0),
            "bytes of weights": (self.weights, expected.weights, 0),
            "bytes of gradients": (self.gradients, expected.gradients, 0),
            "bytes of optimizer": (self.optimizer, expected.optimizer, _MOST_PADDING),
        }
        return tuple(
            f"{name}: built {built:,}, by arithmetic {counted:,}"
            for name, (built, counted, padding) in pairs.items()
            if abs(built - counted) > padding
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RankComparison:
    """One kind of rank.

    Attributes:
        pipeline_ranks: indices within the pipeline of all ranks with these stages.
        built: what the first of them holds.
        differences: from arithmetic; empty if they are equal.
    """

    pipeline_ranks: tuple[int, ...]
    built: RankCounts
    differences: tuple[str, ...]


def compare_built_ranks(config: TrainConfig) -> tuple[RankComparison, ...]:
    """Builds one rank of each kind and compares what it holds with arithmetic.

    Args:
        config: of the run, with the cut that it uses.

    Raises:
        ScheduleError: the schedule cannot be built.
        CutError: the model has fewer layers than stages.
    """
    counted = _count_by_arithmetic(config)
    return tuple(_compare(built, counted) for built in build_ranks(config))


def built_lines(compared: Sequence[RankComparison]) -> list[str]:
    """Returns a header and one line for each kind of rank."""
    rows = [["built ranks", "parameters", "weights (B)", "gradients (B)", "optimizer (B)", "arithmetic"]]
    for each in compared:
        built = each.built
        numbers = (built.parameters, built.weights, built.gradients, built.optimizer)
        verdict = "differs" if each.differences else "equal"
        rows.append([_ranks(each.pipeline_ranks), *(f"{number:,}" for number in numbers), verdict])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def built_json(compared: Sequence[RankComparison]) -> list[dict[str, Any]]:
    """Returns the kinds of ranks as plain values."""
    return [
        {
            "pipeline_ranks": list(each.pipeline_ranks),
            "parameters": each.built.parameters,
            "weights_bytes": each.built.weights,
            "gradients_bytes": each.built.gradients,
            "optimiser_bytes": each.built.optimizer,
            "equal": not each.differences,
            "differences": list(each.differences),
        }
        for each in compared
    ]


def _compare(built: BuiltRank, counted: Mapping[int, RankCounts]) -> RankComparison:
    held = RankCounts(
        parameters=built.parameters, weights=built.weights, gradients=built.gradients, optimizer=built.optimizer
    )
    # All ranks of a kind must be as arithmetic says, not only the one that was built.
    found = dict.fromkeys(text for rank in built.pipeline_ranks for text in held.differences(counted[rank]))
    return RankComparison(pipeline_ranks=built.pipeline_ranks, built=held, differences=tuple(found))


def _count_by_arithmetic(config: TrainConfig) -> dict[int, RankCounts]:
    """Returns what each pipeline rank holds of the network that is trained, without second networks."""
    schedule = planning_schedule(config, config.num_micro_batches)
    shapes, sizes, counts = stage_shapes(run_cut(config, schedule.placement)), planning_sizes(config), {}
    for rank in range(schedule.num_ranks):
        stages = sorted({stage for _, stage in schedule.stages_of(rank)})
        held = held_parameters(config.model, [shapes[stage] for stage in stages], sizes.num_local_experts)
        weights, gradients, optimizer = static_bytes(config, held, sizes, count_replicas(config, schedule, rank))
        counts[rank] = RankCounts(parameters=held.total, weights=weights, gradients=gradients, optimizer=optimizer)
    return counts


def _ranks(ranks: Sequence[int]) -> str:
    shown = ",".join(map(str, ranks))
    return shown if len(shown) <= 24 else f"{ranks[0]}..{ranks[-1]} ({len(ranks)})"
