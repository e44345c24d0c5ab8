"""Predicts how many rows of a token cross nodes and ranks, for balanced experts. No torch here."""

from dataclasses import dataclass
from functools import lru_cache

import numpy
from numpy.typing import NDArray

from train.config import TrainConfig

_TOKENS = 8192
"""Number of tokens that are routed at random. The standard error of a row count is below 0.01."""
_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsPerToken:
    """Mean number of rows that one dispatch sends for a token.

    Attributes:
        across_nodes: to other nodes.
        within_node: to other ranks of the same node, including rows that are forwarded there.
    """

    across_nodes: float
    within_node: float


def rows_per_token(config: TrainConfig) -> RowsPerToken:
    """Returns the rows of a run's dispatcher for random scores."""
    model, parallelism = config.model, config.parallelism
    if parallelism.expert == 1 or model.num_dense_layers == model.num_layers:
        return RowsPerToken(across_nodes=0.0, within_node=0.0)
    groups = (model.num_expert_groups, model.num_limited_groups)
    sends_once = config.dispatch.kind in ("two_hop", "deepep")
    return _count_rows(
        model.num_routed_experts,
        model.num_experts_per_token,
        groups,
        parallelism.expert,
        config.cluster.ranks_per_node,
        sends_once=sends_once,
    )


@lru_cache(maxsize=1024)
def _count_rows(
    num_experts: int, num_chosen: int, groups: tuple[int, int], num_ranks: int, ranks_per_node: int, *, sends_once: bool
) -> RowsPerToken:
    """Routes random tokens and counts their rows.

    Args:
        num_experts: routed experts of a layer.
        num_chosen: experts of a token.
        groups: groups of experts, and how many of them a token may use.
        num_ranks: ranks that share the experts.
        sends_once: whether a token is sent to each node only once and forwarded there.
    """
    tokens = numpy.arange(_TOKENS)
    rank_TK = _route(num_experts, num_chosen, groups) // (num_experts // num_ranks)
    home_T = tokens % num_ranks
    node_R = numpy.arange(num_ranks) // ranks_per_node
    if not sends_once:
        is_away_TK = node_R[rank_TK] != node_R[home_T][:, None]
        is_near_TK = ~is_away_TK & (rank_TK != home_T[:, None])
        return RowsPerToken(across_nodes=_mean(is_away_TK), within_node=_mean(is_near_TK))
    # touched_TR is True if a token has experts on a rank, touched_TN if it has some on a node.
    touched_TR = numpy.zeros((_TOKENS, num_ranks), dtype=bool)
    numpy.put_along_axis(touched_TR, rank_TK, values=True, axis=1)
    num_nodes = node_R[-1] + 1
    touched_TN = numpy.stack([touched_TR[:, node_R == node].any(1) for node in range(num_nodes)], axis=1)
    touched_TN[tokens, node_R[home_T]] = False
    # A token reaches each node at the rank with the index of its home rank, and is forwarded to the others.
    entries_TN = numpy.arange(num_nodes) * ranks_per_node + (home_T % ranks_per_node)[:, None]
    touched_TR[tokens[:, None], numpy.minimum(entries_TN, num_ranks - 1)] = False
    return RowsPerToken(across_nodes=_mean(touched_TN), within_node=_mean(touched_TR))


def _mean(is_sent: NDArray[numpy.bool_]) -> float:
    """Returns the number of rows for each token."""
    return float(is_sent.sum(1).mean())


def _route(num_experts: int, num_chosen: int, groups: tuple[int, int]) -> NDArray[numpy.int64]:
    """Returns the experts of random tokens under the router's limit of groups."""
    num_groups, num_kept = groups
    scores_TE = 1 / (1 + numpy.exp(-numpy.random.default_rng(_SEED).standard_normal((_TOKENS, num_experts))))
    if num_kept < num_groups:
        # A group's score is the sum of its two best experts (arXiv:2412.19437, section 2.1.2).
        by_group = scores_TE.reshape(_TOKENS, num_groups, -1)
        best_two = numpy.sort(by_group, axis=2)[:, :, -2:].sum(2)
        dropped = numpy.argsort(best_two, axis=1)[:, : num_groups - num_kept]
        numpy.put_along_axis(by_group, dropped[:, :, None], values=-1.0, axis=1)
    chosen = numpy.argpartition(scores_TE, num_experts - num_chosen, axis=1)[:, num_experts - num_chosen :]
    return chosen.astype(numpy.int64)
