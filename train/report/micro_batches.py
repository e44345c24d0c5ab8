"""Reads recorded rows of micro-batches, and replays them with copies of experts. No torch here.

Shape legend: R ranks of an expert group, E experts.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from base.refusal import broken
from comm.balance.rows import BalanceCosts, BalanceMode, Ints, plan_rows
from comm.layout import Layout
from model.config import ModelConfig
from model.size import expert_maps
from train.config import TrainConfig
from train.files.json_lines import MICRO_BATCH_LOADS, read_lines
from train.files.run_files import RankFiles

SLOTS = 4
"""Copies that a rank holds at most."""
MODES: tuple[Literal["none"] | BalanceMode, ...] = ("none", "node", "exact")
_LABEL_NUMBERS = 4
_MOST_MICRO_BATCHES = 256
_SCALE_BYTES = 4 / 128
_GRADIENT_BYTES = 4
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedCopies:
    """The rows and copies of one micro-batch of one layer under one mode.

    `busiest` is the most copies that a rank sends or receives within its node, and `busiest_across` between nodes.
    `used_slots` is the most copies that a rank holds.
    """

    loads_R: Sequence[int]
    copies: int = 0
    busiest: int = 0
    busiest_across: int = 0
    used_slots: int = 0
    extra_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayedBatch:
    """One micro-batch of one layer under each mode."""

    nodes: Sequence[int]
    max_violation: float
    rows_between_nodes: int
    modes: Mapping[str, PlannedCopies]

    def fullest(self, mode: str) -> float:
        """Returns the rows of the fullest rank over the mean."""
        loads_R = self.modes[mode].loads_R
        return max(loads_R) * len(loads_R) / max(1, sum(loads_R))

    def fullest_node(self, mode: str) -> float:
        """Returns the rows of the fullest node over its ranks' share."""
        rows = np.bincount(self.nodes, weights=self.modes[mode].loads_R)
        return float((rows / np.bincount(self.nodes)).max() / max(1e-300, np.mean(self.modes[mode].loads_R)))

    def bars(self, mode: str) -> str:
        """Returns a bar for each rank, as high as its rows over those of the fullest rank without copies."""
        top = max(1, *self.modes["none"].loads_R)
        bars = [_BARS[min(8, -(-8 * rows // top))] for rows in self.modes[mode].loads_R]
        return " ".join("".join(bars[first:last]) for first, last in _spans(self.nodes))


def _spans(nodes: Sequence[int]) -> list[tuple[int, int]]:
    ends = [index for index in range(1, len(nodes)) if nodes[index] != nodes[index - 1]]
    return list(zip([0, *ends], [*ends, len(nodes)], strict=True))


def read_micro_batch_loads(folder: Path, config: TrainConfig) -> Iterator[tuple[int, Ints]]:
    """Yields layer and rows [R, E] of each micro-batch that a run recorded, by expert group and step.

    Raises:
        ConfigError: the run has recorded none, or the lines of two ranks of a group differ.
    """
    mesh = config.parallelism
    layout = Layout(mesh, config.cluster.ranks_per_node)
    for first in range(0, mesh.world_size, mesh.expert):
        ranks = [RankFiles(rank, mesh.world_size, layout.ranks_per_node) for rank in layout.expert_group(first)]
        paths = [files.folder(folder / MICRO_BATCH_LOADS) / f"{files.stem}.jsonl" for files in ranks]
        if missing := next((path for path in paths if not path.is_file()), None):
            rule = f"must be the folder of a run with {missing.relative_to(folder)}"
            near = "a run with track.micro_batch_loads_every_steps=10"
            raise broken("loads", rule, repr(str(folder)), near)
        # The last step of a run at work may not be in all files yet.
        for lines in zip(*map(read_lines, paths), strict=False):
            yield from _by_micro_batch(folder, lines, config.model.num_routed_experts)


def _by_micro_batch(folder: Path, lines: Sequence[dict[str, Any]], num_experts: int) -> Iterator[tuple[int, Ints]]:
    """Yields layer and rows of each micro-batch of a step from the lines of all ranks of a group."""
    try:
        rows_RBC = np.array([line["rows"] for line in lines], np.int64)
    except (KeyError, ValueError, TypeError, OverflowError):  # no numbers, or ranks with different micro-batches
        rows_RBC = np.zeros((0, 0, 0), np.int64)
    is_whole = rows_RBC.ndim == 3 and rows_RBC.shape[2] == _LABEL_NUMBERS + num_experts and rows_RBC.min(initial=0) >= 0
    labels_RBC = rows_RBC[..., :_LABEL_NUMBERS]
    if not is_whole or len({line["step"] for line in lines}) > 1 or (labels_RBC != labels_RBC[:1]).any():
        rule = f"must have the same steps and micro-batches in all ranks of a group, step {lines[0]['step']} has not"
        raise broken("loads", rule, repr(str(folder)), "the folder of a run as it was written")
    for index, (_, layer, *_) in enumerate(labels_RBC[0].tolist()):
        yield layer, rows_RBC[:, index, _LABEL_NUMBERS:]


def grouped_loads(loads: Iterable[tuple[int, Ints]], num_ranks: int) -> Iterator[Ints]:
    """Yields rows [R, E] for a number of ranks.

    Consecutive micro-batches of a layer are the sources of a larger group.

    Raises:
        ConfigError: `num_ranks` is not a multiple of the recorded number of source ranks.
    """
    waiting: dict[int, list[Ints]] = {}
    for layer, counts_RE in loads:
        if num_ranks % len(counts_RE):
            rule = f"must be a multiple of the {len(counts_RE)} source ranks of the loads"
            raise broken("parallelism.expert", rule, num_ranks, len(counts_RE))
        parts = waiting.setdefault(layer, [])
        parts.append(counts_RE)
        if len(parts) * len(counts_RE) == num_ranks:
            yield np.concatenate(waiting.pop(layer))


def balance_costs(config: TrainConfig, sent_share: float = 1.0) -> BalanceCosts:
    """Returns the bytes of a copy and of a row.

    A dispatcher sends `sent_share` of the rows that leave their node.
    """
    model = config.model
    is_fp8 = config.precision.kind == "fp8"
    wide = 2 * model.hidden_size
    row = (1 + _SCALE_BYTES) * model.hidden_size if is_fp8 or config.dispatch.payload == "fp8" else wide
    # Weights are sent in F and in B, and a gradient returns. Rows go and return in F and in B.
    weights, gradient = expert_bytes(model, is_fp8=is_fp8)
    return BalanceCosts(copy=2 * weights + gradient, row=max(1, round(2 * (row + wide) * sent_share)))


def expert_bytes(model: ModelConfig, *, is_fp8: bool) -> tuple[int, int]:
    """Returns the bytes of an expert's weights as they are sent, and of its float32 gradient."""
    weights = sum(outputs * inputs for outputs, inputs in expert_maps(model))
    return weights * (1 if is_fp8 else 2), weights * _GRADIENT_BYTES


def expert_nodes(config: TrainConfig) -> list[int]:
    """Returns the node of each rank of the first expert group."""
    layout = Layout(config.parallelism, config.cluster.ranks_per_node)
    return [layout.node_of(rank) for rank in layout.expert_group(0)]


def replay(loads: Iterable[Ints], nodes: Sequence[int], costs: BalanceCosts, rows: int = 0) -> list[ReplayedBatch]:
    """Plans copies for the last 256 micro-batches under every mode.

    Args:
        loads: rows [R, E] of each micro-batch.
        nodes: node of each rank.
        rows: rows of all ranks to which the counts are scaled; 0: as they are.
    """
    batches = []
    nodes_R = np.asarray(nodes)
    for counts_RE in deque((each for each in loads if each.any()), _MOST_MICRO_BATCHES):
        scaled_RE = np.rint(counts_RE * (rows / counts_RE.sum() if rows else 1)).astype(np.int64)
        num_local = scaled_RE.shape[1] // len(nodes)
        load_E = scaled_RE.sum(0)
        loads_R = load_E.reshape(len(nodes), num_local).sum(1).tolist()
        stay = sum(int(scaled_RE[rank, np.repeat(nodes_R == node, num_local)].sum()) for rank, node in enumerate(nodes))
        modes = {
            "none": PlannedCopies(loads_R=loads_R, copies=0, busiest=0, busiest_across=0, used_slots=0, extra_bytes=0)
        }
        for mode in ("node", "exact"):
            modes[mode] = _planned(scaled_RE, nodes, mode, costs)
        batches.append(
            ReplayedBatch(
                nodes=nodes,
                max_violation=float(load_E.max() / load_E.mean() - 1),
                rows_between_nodes=int(scaled_RE.sum()) - stay,
                modes=modes,
            )
        )
    return batches


def _planned(counts_RE: Ints, nodes: Sequence[int], mode: BalanceMode, costs: BalanceCosts) -> PlannedCopies:
    """Plans copies, and counts those that each rank sends and receives."""
    plan = plan_rows(counts_RE, nodes, slots=SLOTS, mode=mode, costs=costs)
    num_local = counts_RE.shape[1] // len(nodes)
    # Sent and received copies of each rank, within its node and between nodes.
    counts_R22 = np.zeros((len(nodes), 2, 2), np.int64)
    for rank, experts in enumerate(plan.slot_expert_RS):
        for home in (expert // num_local for expert in experts if expert >= 0):
            is_across = int(nodes[home] != nodes[rank])
            counts_R22[home, is_across, 0] += 1
            counts_R22[rank, is_across, 1] += 1
    busiest, busiest_across = counts_R22.max((0, 2)).tolist()
    return PlannedCopies(
        loads_R=plan.loads_R,
        copies=plan.num_copies,
        busiest=busiest,
        busiest_across=busiest_across,
        used_slots=int(counts_R22[:, :, 1].sum(1).max()),
        extra_bytes=plan.extra_bytes,
    )


def middle_batch(batches: Sequence[ReplayedBatch]) -> ReplayedBatch:
    """Returns the micro-batch with the median rows on its fullest rank without copies."""
    return sorted(batches, key=lambda batch: batch.fullest("none"))[len(batches) // 2]
