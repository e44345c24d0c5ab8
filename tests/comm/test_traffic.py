"""Predicted and counted rows and bytes of every exchange equal an enumeration token by token.

Shape legend: T tokens, K experts per token, D hidden size."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, distributed

from bench.forecast import Gate, forecast_text, gate_forecast
from comm.dispatch.traffic import LayerTraffic, Spread, Traffic
from comm.lane import ThreadLane
from comm.protocol import Label
from tests.comm.backends import Setting, maker, watching
from tests.comm.contract import Bench, num_experts_for
from tests.comm.forecast import Forecast, SentRows
from tests.ranks import run_ranks

_CASES = ("uneven", "one_rank", "one_node", "dropped", "no_token")
_LABEL = Label(layer=3, direction=0, micro_batch=1)

_SETTINGS = {
    "all_to_all-2+2": Setting("all_to_all", (0, 0, 1, 1)),
    "two_hop-2+2-chunks": Setting("two_hop", (0, 0, 1, 1), {"chunks": 3, "partial_sums": "float32"}),
    "two_hop-3+1+2": Setting("two_hop", (0, 0, 0, 1, 2, 2)),
}

# Bytes of a row in each direction; with one weight (8 bytes of float64), or with the weights of three choices (24) and
# their ids (6, rounded up to 8) behind a row, which is then rounded up to 16, as is the whole.
_ROW = {"dispatch again": 10, "combine backward": 10}

_BYTES = {
    "all_to_all": {"dispatch": 32, "combine": 10, "dispatch backward": 32} | _ROW,
    "two_hop": {"dispatch": 48, "combine": 10, "dispatch backward": 48} | _ROW,
    "two_hop float32": {"dispatch": 48, "combine": 20, "dispatch backward": 64} | _ROW,
}


@dataclass(frozen=True)
class Counted:
    """Counts of one rank and case: of the plan, then of each exchange."""

    ids_TK: Tensor
    plan: LayerTraffic
    exchanges: dict[str, LayerTraffic]


def _exchange_all(rank: int, world_size: int, setting: Setting) -> list[Counted]:
    observers, world = watching(), distributed.group.WORLD
    assert world is not None
    make, found = maker(setting, num_experts_for(world_size), observers), []

    def take() -> LayerTraffic:
        layers = dict(observers.traffic.take().layers)
        counted = layers.pop(_LABEL.layer)
        assert not layers
        return counted

    with ThreadLane("comm") as lane:
        bench = Bench(make, lane, world, setting.nodes, rank)
        dispatcher = bench.dispatcher()
        for case in _CASES:
            mine = bench.mine(case, torch.bfloat16)
            handle = dispatcher.plan(mine.ids_TK, None, _LABEL)
            arrived = dispatcher.dispatch(mine.rows_TD, mine.weights_TK, handle).wait()
            exchanges = {"dispatch": take()}
            dispatcher.combine(arrived.rows_AD, handle).wait()
            exchanges["combine"] = take()
            dispatcher.dispatch_backward(arrived.rows_AD, arrived.weights_A, handle).wait()
            exchanges["dispatch backward"] = take()
            dispatcher.combine_backward(mine.rows_TD, handle).wait()
            exchanges["combine backward"] = take()
            dispatcher.dispatch_again(mine.rows_TD, handle).wait()
            exchanges["dispatch again"] = take()
            plan = LayerTraffic(
                num_tokens=exchanges["dispatch"].num_tokens, num_touched_nodes=exchanges["dispatch"].num_touched_nodes
            )
            found.append(Counted(mine.ids_TK, plan, exchanges))
    return found


@pytest.fixture(scope="module", params=list(_SETTINGS))
def counted(request: pytest.FixtureRequest) -> tuple[Setting, list[list[Counted]]]:
    setting = _SETTINGS[request.param]
    by_rank = run_ranks(len(setting.nodes), _exchange_all, setting)
    return setting, [list(of) for of in zip(*by_rank, strict=True)]


def _ranks_of(setting: Setting, ids: list[int]) -> list[int]:
    num_local = num_experts_for(len(setting.nodes)) // len(setting.nodes)
    return [expert // num_local for expert in ids if expert >= 0]


def _links(setting: Setting, ids_by_rank: list[Tensor]) -> Counter[tuple[int, int]]:
    """Returns the rows of a dispatch by (sender, receiver), separately for each hop.

    A relay has the sender's index within its node, modulo the ranks of the relay's node.
    """
    links: Counter[tuple[int, int]] = Counter()
    for source, ids_TK in enumerate(ids_by_rank):
        index = setting.nodes[:source].count(setting.nodes[source])
        for ids in ids_TK.tolist():
            ranks = _ranks_of(setting, ids)
            if setting.kind == "all_to_all":
                links.update((source, rank) for rank in ranks)
                continue
            for node in {setting.nodes[rank] for rank in ranks}:
                there = [rank for rank, home in enumerate(setting.nodes) if home == node]
                relay = there[index % len(there)]
                links[source, relay] += relay != source
                links.update((relay, rank) for rank in set(ranks) if setting.nodes[rank] == node)
    return links


def _spread(setting: Setting, links: Counter[tuple[int, int]], rank: int, back: bool) -> Spread:
    kept = within = across = 0
    for (sender, receiver), rows in links.items():
        if back:
            sender, receiver = receiver, sender
        if sender == rank:
            kept += rows if receiver == rank else 0
            within += rows if receiver != rank and setting.nodes[receiver] == setting.nodes[rank] else 0
            across += rows if setting.nodes[receiver] != setting.nodes[rank] else 0
    return Spread(on_member=kept, within_node=within, across_nodes=across)


@pytest.mark.slow
def test_exchanges_send_the_rows_that_loops_over_tokens_enumerate(counted: tuple[Setting, list[list[Counted]]]) -> None:
    setting, cases = counted
    wide = " float32" if setting.fields.get("partial_sums") == "float32" else ""
    for ranks in cases:
        links = _links(setting, [of.ids_TK for of in ranks])
        for rank, of in enumerate(ranks):
            for name, got in of.exchanges.items():
                rows = _spread(setting, links, rank, back=name in ("combine", "dispatch backward"))
                width = _BYTES[setting.kind + wide][name]
                assert got.num_rows_on_rank == rows.on_member
                assert (got.num_rows_within_node, got.num_rows_across_nodes) == (rows.within_node, rows.across_nodes)
                assert got.num_bytes_within_node == rows.within_node * width
                assert got.num_bytes_across_nodes == rows.across_nodes * width


def test_exchanges_send_what_their_plan_predicts(counted: tuple[Setting, list[list[Counted]]]) -> None:
    for ranks in counted[1]:
        for of in ranks:
            for got in of.exchanges.values():
                assert got.predicted_rows_within_node == got.num_rows_within_node
                assert got.predicted_rows_across_nodes == got.num_rows_across_nodes
                assert got.predicted_bytes_within_node == got.num_bytes_within_node
                assert got.predicted_bytes_across_nodes == got.num_bytes_across_nodes


def test_plans_count_tokens_nodes_and_the_rows_that_must_cross(counted: tuple[Setting, list[list[Counted]]]) -> None:
    setting, cases = counted
    for ranks in cases:
        for rank, of in enumerate(ranks):
            touched = [{setting.nodes[there] for there in _ranks_of(setting, ids)} for ids in of.ids_TK.tolist()]
            assert of.plan == LayerTraffic(num_tokens=len(touched), num_touched_nodes=sum(map(len, touched)))
            least = sum(len(nodes - {setting.nodes[rank]}) for nodes in touched)
            assert {got.min_rows_across_nodes for got in of.exchanges.values()} == {least}


def test_two_hops_cross_nodes_as_rarely_as_possible(counted: tuple[Setting, list[list[Counted]]]) -> None:
    setting, cases = counted
    exchanges = [[of.exchanges[name] for of in ranks] for ranks in cases for name in ranks[0].exchanges]
    totals = [sum(of, LayerTraffic()) for of in exchanges]
    assert any(total.num_rows_across_nodes for total in totals)
    if setting.kind == "two_hop":
        assert [total.num_rows_across_nodes for total in totals] == [total.min_rows_across_nodes for total in totals]
        assert {total.lower_bound_share for total in totals} == {1.0}
    else:
        assert any(total.lower_bound_share < 0.9 for total in totals)


def test_traffic_sums_by_layer_and_is_empty_after_take() -> None:
    traffic = Traffic()
    rows = Spread(on_member=1, within_node=2, across_nodes=3)
    for layer in (0, 0, None):
        traffic.add_plan(layer, 4, 6)
        traffic.add_predicted(layer, rows, 10, 5)
        traffic.add_sent(layer, rows, rows.times(10), rows.times(7))
    traffic.add_message(100, across_nodes=True)
    traffic.add_message(1, across_nodes=False)
    taken = traffic.take()
    assert set(taken.layers) == {0, None}
    assert taken.layers[0] == taken.layers[None] + taken.layers[None]
    assert taken.layers[0].nodes_per_token == 1.5
    assert taken.layers[None].num_bytes_from_nodes == 21
    assert taken.layers[None].lower_bound_share == 5 / 3
    assert (taken.num_bytes_within_node, taken.num_bytes_across_nodes) == (3 * 20 + 1, 3 * 30 + 100)
    empty = traffic.take()
    assert not empty.layers
    assert (empty.total, empty.num_bytes_across_nodes) == (LayerTraffic(), 0)


def _per_token(made: Forecast, rows: SentRows) -> float:
    return rows.num_across_nodes / made.num_tokens


def _gate(num_nodes: int, num_limited_groups: int) -> Gate:
    return Gate(num_experts=256, num_experts_per_token=8, num_groups=num_nodes, num_limited_groups=num_limited_groups)


def test_two_hops_under_cap_4_on_8_nodes_send_3_47_rows_per_token_which_is_the_minimum() -> None:
    """The standard deviation of the mean of 65536 tokens is below 0.003."""
    made = gate_forecast(_gate(8, 4), ranks_per_node=8, num_tokens=1024)
    assert _per_token(made, made.between_nodes) == pytest.approx(3.47, abs=0.02)
    assert made.between_nodes.num_across_nodes == made.min_rows_across_nodes
    assert _per_token(made, made.per_expert) == pytest.approx(8 * 7 / 8, abs=0.02)
    assert _per_token(made, made.per_rank) == pytest.approx(6.549, abs=0.02)
    assert made.num_touched_nodes / made.num_tokens == pytest.approx(3.965, abs=0.005)


def test_forecast_text_prints_the_figures() -> None:
    lines = forecast_text(num_tokens=64, num_draws=1).splitlines()
    start = lines.index("8 nodes x 8 ranks, cap 4")
    assert float(lines[start + 1].split()[4]) == pytest.approx(7.0, abs=0.1)
    assert float(lines[start + 2].split()[2]) == pytest.approx(3.47, abs=0.1)
    assert len(lines) == 2 + 4 * 3 + 4
