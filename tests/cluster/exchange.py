"""Times exchanges between nodes and counts bytes on the links: `python -m tests.cluster.exchange`.

Shape legend: T tokens of a rank, K experts per token, E experts, D hidden size.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from comm.config import AllToAllDispatchConfig, DispatchConfig, ParallelismConfig, TwoHopDispatchConfig
from comm.dispatch.build import DispatcherParts, build_dispatcher
from comm.dispatch.process_group import Observers
from comm.dispatch.registry import TokenSizes
from comm.dispatch.traffic import LayerTraffic, Traffic
from comm.groups import make_group
from comm.lane import ThreadLane
from comm.layout import Layout
from comm.protocol import Dispatcher
from comm.watchdog.collective_log import CollectiveLog
from kernels.router.reference import limit_groups
from tests.cluster.namespaces import Cluster, Counted, Links, missing, open_cluster, read_counted
from tests.cluster.ranks_in_nodes import begin_together, run_in_nodes
from tests.comm.forecast import Forecast, forecast

_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Micro-batches of all ranks: the gate of arXiv:2412.19437 chooses experts from random scores."""

    num_nodes: int = 4
    ranks_per_node: int = 2
    num_experts: int = 64
    num_choices: int = 8
    hidden: int = 1024
    tokens_per_rank: int = 256

    @property
    def layout(self) -> Layout:
        """Layout with one expert group over all nodes."""
        size = self.num_nodes * self.ranks_per_node
        return Layout(ParallelismConfig(pipeline=1, data=size, expert=size), self.ranks_per_node)

    def ids(self, rank: int, max_nodes: int) -> Tensor:
        """Returns the experts of a rank's tokens, TK, on at most `max_nodes` nodes each."""
        generator = torch.Generator().manual_seed(rank)
        scores_TE = torch.rand(self.tokens_per_rank, self.num_experts, generator=generator)
        mask_TE = limit_groups(scores_TE, self.num_nodes, max_nodes, self.num_choices // max_nodes)
        return scores_TE.masked_fill(~mask_TE, -torch.inf).topk(self.num_choices, -1).indices

    def forecast(self, max_nodes: int) -> Forecast:
        ranks = range(self.layout.world_size)
        ids = [self.ids(rank, max_nodes) for rank in ranks]
        return forecast(ids, self.num_experts, [self.layout.node_of(rank) for rank in ranks])


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """Dispatcher configuration that exchanges a problem's tokens."""

    name: str
    config: DispatchConfig
    max_nodes: int


@dataclass(frozen=True, slots=True)
class RankLeg:
    """Dispatch or combine on one rank.

    It has the seconds from the common start, and the bytes on its node's eth0 until all ranks had finished.
    """

    seconds: float
    eth0: Counted


@dataclass(frozen=True, slots=True)
class RankRound:
    """Round of one contender on one rank. `traffic` has the dispatcher's counts."""

    dispatch: RankLeg
    combine: RankLeg
    traffic: LayerTraffic


@dataclass(frozen=True, kw_only=True, slots=True)
class Leg:
    """Dispatch or combine of all ranks, as medians over rounds.

    The floor is the time of the busiest link direction.
    """

    seconds: float
    floor_seconds: float
    bytes_on_links: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Measurements of one contender.

    Rows and bytes between nodes are the dispatchers' counts over all ranks.
    """

    dispatch: Leg
    combine: Leg
    num_rows: int
    counted_bytes: int
    predicted_bytes: int

    @property
    def seconds(self) -> float:
        """Seconds of dispatch and combine."""
        return self.dispatch.seconds + self.combine.seconds

    @property
    def floor_seconds(self) -> float:
        """Seconds of dispatch and combine."""
        return self.dispatch.floor_seconds + self.combine.floor_seconds

    @property
    def bytes_on_links(self) -> float:
        """Bytes on the links in both directions, with all headers."""
        return self.dispatch.bytes_on_links + self.combine.bytes_on_links


def naive() -> Contender:
    """Returns the contender with one copy per expert and no cap."""
    config = AllToAllDispatchConfig(kind="all_to_all", payload="full", max_nodes=4, node_cap="verify")
    return Contender(name="naive", config=config, max_nodes=4)


def two_hop(chunks: int) -> Contender:
    """Returns the contender with one copy for each of at most two nodes, in `chunks` chunks."""
    config = TwoHopDispatchConfig(
        kind="two_hop", payload="full", max_nodes=2, node_cap="verify", chunks=chunks, partial_sums="rows"
    )
    return Contender(name=f"two hops, {chunks} chunks", config=config, max_nodes=2)


def measure(
    cluster: Cluster, problem: Problem, contenders: Sequence[Contender], num_rounds: int
) -> dict[str, Measured]:
    """Runs A B C A B C ... on the same ranks, after one unmeasured round."""
    ranks = run_in_nodes(cluster, problem.ranks_per_node, _measure_rank, problem, contenders, num_rounds)
    rate = cluster.links.bytes_per_second("eth0")
    return {contender.name: _summary([of[contender.name] for of in ranks], problem, rate) for contender in contenders}


def _summary(ranks: Sequence[list[RankRound]], problem: Problem, bytes_per_second: float) -> Measured:
    legs = {
        name: _leg(
            [[getattr(round_, name) for round_ in of] for of in zip(*ranks, strict=True)], problem, bytes_per_second
        )
        for name in ("dispatch", "combine")
    }
    traffic = [rounds[0].traffic for rounds in ranks]
    assert all(round_.traffic == rounds[0].traffic for rounds in ranks for round_ in rounds)
    return Measured(
        dispatch=legs["dispatch"],
        combine=legs["combine"],
        num_rows=sum(of.num_rows_across_nodes for of in traffic),
        counted_bytes=sum(of.num_bytes_across_nodes for of in traffic),
        predicted_bytes=sum(of.predicted_bytes_across_nodes for of in traffic),
    )


def _leg(rounds: Sequence[Sequence[RankLeg]], problem: Problem, bytes_per_second: float) -> Leg:
    nodes = [[leg.eth0 for leg in round_[:: problem.ranks_per_node]] for round_ in rounds]
    fullest = (max(max(of.sent_bytes, of.received_bytes) for of in counted) for counted in nodes)
    return Leg(
        seconds=statistics.median(max(leg.seconds for leg in round_) for round_ in rounds),
        floor_seconds=statistics.median(fullest) / bytes_per_second,
        bytes_on_links=statistics.median(sum(of.sent_bytes for of in counted) for counted in nodes),
    )


def _measure_rank(
    rank: int, world_size: int, problem: Problem, contenders: Sequence[Contender], num_rounds: int
) -> dict[str, list[RankRound]]:
    layout = problem.layout
    group = make_group(tuple(range(world_size)), _TIMEOUT_SECONDS)
    assert group is not None
    observers = Observers(Traffic(), CollectiveLog())
    rows_TD = torch.randn(problem.tokens_per_rank, problem.hidden, generator=torch.Generator().manual_seed(rank))
    rounds: dict[str, list[RankRound]] = {contender.name: [] for contender in contenders}
    with ThreadLane("comm") as lane:
        parts = DispatcherParts(
            num_experts=problem.num_experts,
            layout=layout,
            group=group,
            lane=lane,
            observers=observers,
            timeout_seconds=_TIMEOUT_SECONDS,
            tokens=TokenSizes(
                max_tokens=problem.tokens_per_rank, hidden_size=problem.hidden, num_choices=problem.num_choices
            ),
        )
        dispatchers = [build_dispatcher(contender.config, parts) for contender in contenders]
        for _ in range(1 + num_rounds):
            for contender, dispatcher in zip(contenders, dispatchers, strict=True):
                ids_TK = problem.ids(rank, contender.max_nodes)
                legs = _exchange(dispatcher, rows_TD.bfloat16(), ids_TK)
                rounds[contender.name].append(RankRound(*legs, observers.traffic.take().total))
    return {name: of[1:] for name, of in rounds.items()}


def _exchange(dispatcher: Dispatcher, rows_TD: Tensor, ids_TK: Tensor) -> tuple[RankLeg, RankLeg]:
    """Runs plan, dispatch and combine with experts that return their input."""
    weights_TK = torch.ones(ids_TK.shape)
    handle = None

    def dispatch() -> Tensor:
        nonlocal handle
        handle = dispatcher.plan(ids_TK)
        return dispatcher.dispatch(rows_TD, weights_TK, handle).wait().rows_AD

    arrived_AD, there = _timed(dispatch)
    assert handle is not None
    given = handle
    combined_TD, back = _timed(lambda: dispatcher.combine(arrived_AD, given).wait())
    # Sums of eight equal rows, for any contender.
    torch.testing.assert_close(combined_TD, ids_TK.shape[1] * rows_TD)
    return there, back


def _timed(function: Callable[[], Tensor]) -> tuple[Tensor, RankLeg]:
    before = read_counted("eth0")
    start = begin_together()
    result = function()
    seconds = time.monotonic() - start
    distributed.barrier()
    return result, RankLeg(seconds, read_counted("eth0") - before)


def text(problem: Problem, links: Links, found: dict[str, Measured]) -> str:
    """Formats the measurements as a table."""
    lines = [
        f"Exchange: {problem.num_nodes} nodes x {problem.ranks_per_node} ranks, {links.eth0_megabits:g} Mbit/s between "
        f"nodes, {links.lo_megabits:g} within, {problem.num_experts} experts, top-{problem.num_choices}, "
        f"hidden {problem.hidden}, {problem.tokens_per_rank} tokens a rank, bf16",
        f"{'':22}{'predicted MB':>13}{'on links MB':>12}{'ratio':>8}{'dispatch ms':>13}{'combine ms':>12}"
        f"{'/ floor':>9}{'bytes / first':>15}{'time / first':>14}",
    ]
    first = next(iter(found.values()))
    for name, of in found.items():
        lines.append(
            f"{name:22}{of.predicted_bytes / 1e6:13.2f}{of.bytes_on_links / 1e6:12.2f}"
            f"{of.bytes_on_links / of.predicted_bytes:8.4f}{of.dispatch.seconds * 1e3:13.1f}"
            f"{of.combine.seconds * 1e3:12.1f}{of.seconds / of.floor_seconds:9.3f}"
            f"{of.bytes_on_links / first.bytes_on_links:15.3f}{of.seconds / first.seconds:14.3f}"
        )
    lines.append(f"{'target, in chunks':22}{'':25}{'<= 1.015':>8}{'':25}{'<= 1.35':>9}{'<= 0.26':>15}{'<= 0.35':>14}")
    return "\n".join(lines)


def exchange_text() -> str:
    """Measures, as root, and returns the table."""
    problem = Problem()
    with open_cluster(problem.num_nodes) as cluster:
        found = measure(cluster, problem, [naive(), two_hop(1), two_hop(4)], num_rounds=11)
    return text(problem, cluster.links, found)


def main() -> None:
    reason = missing()
    if reason is not None:
        sys.exit(f"exchange: left out: {reason}")
    print(exchange_text())


if __name__ == "__main__":
    main()
