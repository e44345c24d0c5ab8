"""Predicts rows, imbalance and times of a routing on a cluster for several dispatchers.

Shape legend: T tokens of a rank, K experts per token, E experts.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.quantize.layout import num_tiles
from kernels.router.reference import limit_groups
from tests.comm.forecast import Forecast, SentRows, forecast

_HIDDEN = 7168
_BYTES_PER_ROW = {"FP8": _HIDDEN + 4 * num_tiles(_HIDDEN), "BF16": 2 * _HIDDEN}
_ACROSS_BYTES_PER_SECOND = 50e9
_WITHIN_BYTES_PER_SECOND = 160e9
_SKEW = 0.6


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """DeepSeek-V3's gate with random scores (arXiv:2412.19437, section 2.1.2).

    Experts form one group per node, and a token's experts lie in `num_limited_groups` groups. Scores are sigmoids of
    standard normal numbers plus, for each expert, a normal number with standard deviation `skew`.
    """

    num_experts: int
    num_experts_per_token: int
    num_groups: int
    num_limited_groups: int
    skew: float = 0.0

    def choose(self, num_ranks: int, num_tokens: int, seed: int) -> Iterator[Tensor]:
        """Chooses the experts of each rank's tokens, TK."""
        generator = torch.Generator().manual_seed(seed)
        popularity_E = torch.randn(self.num_experts, generator=generator) * self.skew
        for _ in range(num_ranks):
            scores_TE = (torch.randn(num_tokens, self.num_experts, generator=generator) + popularity_E).sigmoid()
            if self.num_limited_groups < self.num_groups:
                num_per_group = self.num_experts_per_token // self.num_limited_groups
                kept_TE = limit_groups(scores_TE, self.num_groups, self.num_limited_groups, num_per_group)
                scores_TE = scores_TE.masked_fill(~kept_TE, -torch.inf)
            yield scores_TE.topk(self.num_experts_per_token, -1, sorted=False).indices


def gate_forecast(gate: Gate, ranks_per_node: int, num_tokens: int, seed: int = 0) -> Forecast:
    """Returns the forecast with one node per group of the gate and `num_tokens` tokens on every rank."""
    nodes = [node for node in range(gate.num_groups) for _ in range(ranks_per_node)]
    return forecast(list(gate.choose(len(nodes), num_tokens, seed)), gate.num_experts, nodes)


def skewed_imbalance(gate: Gate, ranks_per_node: int, num_draws: int = 9) -> tuple[float, float]:
    """Returns the median receive imbalance of one copy per expert and of two hops, at skew 0.6."""
    skewed = replace(gate, skew=_SKEW)
    draws = [gate_forecast(skewed, ranks_per_node, num_tokens=256, seed=seed) for seed in range(num_draws)]
    return (
        statistics.median(draw.per_expert.receive_imbalance for draw in draws),
        statistics.median(draw.between_nodes.receive_imbalance for draw in draws),
    )


def forecast_text(num_tokens: int = 4096, num_draws: int = 9) -> str:
    """Returns tables for 8 nodes of 8 ranks and for 4 nodes of 2 ranks, with and without a cap."""
    lines = [
        f"Exchange, forecast and not run: V3's gate over random scores, 8 of 256 experts, {num_tokens} tokens a rank",
        f"{'':26}{'rows':>8}{'least':>8}{'nodes':>7}{'imbalance':>11}{'skewed':>8}{'FP8 ms':>15}{'BF16 ms':>15}",
    ]
    for num_nodes, ranks_per_node, limit in ((8, 8, 8), (8, 8, 4), (4, 2, 4), (4, 2, 2)):
        gate = Gate(num_experts=256, num_experts_per_token=8, num_groups=num_nodes, num_limited_groups=limit)
        made = gate_forecast(gate, ranks_per_node, num_tokens)
        naive_skewed, two_hop_skewed = skewed_imbalance(gate, ranks_per_node, num_draws)
        cap = f"cap {limit}" if limit < num_nodes else "no cap"
        lines += [
            f"{num_nodes} nodes x {ranks_per_node} ranks, {cap}",
            _row("a copy per expert", made, made.per_expert, made.per_expert, naive_skewed),
            _row("two hops", made, made.between_nodes, made.within_node, two_hop_skewed),
        ]
    lines += [
        "rows: between nodes, per token. least: the minimum for any dispatcher. nodes: touched by a token.",
        "imbalance: rows that a rank receives from other nodes, most over mean of the ranks; skewed: where experts'",
        f"popularity deviates by {_SKEW}, median of {num_draws} draws. ms: between nodes + within, busiest rank, rows",
        f"of {_HIDDEN}, {_ACROSS_BYTES_PER_SECOND / 1e9:g} and {_WITHIN_BYTES_PER_SECOND / 1e9:g} GB/s.",
    ]
    return "\n".join(lines)


def _row(name: str, made: Forecast, across: SentRows, within: SentRows, skewed: float) -> str:
    seconds = [
        f"{across.seconds_across_nodes(size, _ACROSS_BYTES_PER_SECOND) * 1e3:8.2f} +"
        f"{within.seconds_within_node(size, _WITHIN_BYTES_PER_SECOND) * 1e3:5.2f}"
        for size in _BYTES_PER_ROW.values()
    ]
    return (
        f"  {name:24}{across.num_across_nodes / made.num_tokens:8.3f}"
        f"{made.min_rows_across_nodes / made.num_tokens:8.3f}"
        f"{made.num_touched_nodes / made.num_tokens:7.3f}{across.receive_imbalance:11.2f}{skewed:8.2f}"
        f"{seconds[0]}{seconds[1]}"
    )
