"""Defines laws of DeepEP's dispatcher beyond the contract: codes, counts, one handle for a plan.

Rows and weights are small integers, so that every sum is exact in bfloat16.
Shape legend: T tokens, K experts per token, D hidden size, A arrived rows, B bytes of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from comm.dispatch.fp8 import Fp8Dispatcher
from comm.dispatch.node_cap import NodeCapError
from comm.dispatch.process_group import Observers
from comm.protocol import Dispatcher, Label
from tests.comm.contract import CASES, NUM_CHOICES, Bench
from tests.comm.deep_ep_emulation import Emulation


@dataclass(frozen=True)
class DeepEPBench:
    """Inputs of a law on one rank: a bench of the contract, and parts behind the dispatcher.

    `capped` builds a dispatcher on the bench's lane that verifies a node cap.
    """

    bench: Bench
    observers: Observers
    library: Any
    capped: Callable[[int], Dispatcher]


def law_codes_and_full_rows_mix_in_one_plan(deepep: DeepEPBench) -> None:
    """Checks that each dtype of rows uses a separate handle."""
    bench, dispatcher = deepep.bench, deepep.bench.dispatcher()
    width = bench.hidden_size + 8
    for case in CASES:
        full, codes = bench.mine(case), bench.mine(case, torch.int8, width)
        handle = dispatcher.plan(full.ids_TK)
        arrived = dispatcher.dispatch(codes.rows_TD.view(torch.uint8), full.weights_TK, handle).wait()
        rows_AD = bench.arriving(case)[0]
        summed_TD = dispatcher.combine(rows_AD, handle).wait()
        full_AD = dispatcher.combine_backward(full.rows_TD, handle).wait()
        bytes_AB = dispatcher.combine_backward(codes.rows_TD.view(torch.uint8), handle).wait()
        assert torch.equal(arrived.rows_AD.view(torch.int8), bench.arriving(case, torch.int8, width)[0]), case
        assert torch.equal(bytes_AB, arrived.rows_AD)
        assert torch.equal(full_AD, rows_AD)
        assert torch.equal(summed_TD, full.rows_TD * (full.ids_TK >= 0).sum(1, keepdim=True).bfloat16())


def law_quantized_rows_equal_those_of_the_wrapper(deepep: DeepEPBench) -> None:
    """Checks FP8 rows. Integers up to 8 are exact codes, so FP8 must not change results."""
    dispatcher = Fp8Dispatcher(deepep.bench.dispatcher())
    for case in ("uneven", "dropped"):
        mine = deepep.bench.mine(case)
        handle = dispatcher.plan(mine.ids_TK)
        arrived = dispatcher.dispatch(mine.rows_TD, mine.weights_TK, handle).wait()
        assert torch.equal(arrived.rows_AD, deepep.bench.arriving(case)[0])
        assert torch.equal(dispatcher.combine_backward(mine.rows_TD, handle).wait(), arrived.rows_AD)
        assert torch.equal(dispatcher.dispatch_again(mine.rows_TD, handle).wait(), arrived.rows_AD)


def law_one_layout_serves_a_plan(deepep: DeepEPBench) -> None:
    """Checks that DeepEP exchanges counts, with a host wait, once for a plan."""
    if not isinstance(deepep.library, Emulation):
        return
    dispatcher, mine = deepep.bench.dispatcher(), deepep.bench.mine("even")
    deepep.library.calls.clear()
    handle = dispatcher.plan(mine.ids_TK)
    arrived = dispatcher.dispatch(mine.rows_TD, mine.weights_TK, handle).wait()
    dispatcher.combine(arrived.rows_AD, handle).wait()
    dispatcher.combine_backward(mine.rows_TD, handle).wait()
    again_AD = dispatcher.dispatch_again(mine.rows_TD, handle).wait()
    dispatcher.dispatch_backward(arrived.rows_AD, arrived.weights_A, handle).wait()
    assert torch.equal(again_AD, arrived.rows_AD)
    assert deepep.library.calls == ["dispatch", "combine", "cached dispatch", "cached dispatch", "combine"]


def law_prediction_agrees_with_an_enumeration(deepep: DeepEPBench) -> None:
    """Checks predicted rows over all ranks. A row is sent once to each node and forwarded there."""
    bench, dispatcher, nodes = deepep.bench, deepep.bench.dispatcher(), deepep.bench.nodes
    mine = bench.mine("dropped")
    deepep.observers.traffic.take()
    handle = dispatcher.plan(mine.ids_TK, label=Label(layer=3, direction=0, micro_batch=1))
    arrived = dispatcher.dispatch(mine.rows_TD, mine.weights_TK, handle).wait()
    dispatcher.combine(arrived.rows_AD, handle).wait()
    found = deepep.observers.traffic.take().layers[3]
    rows = (found.predicted_rows_across_nodes, found.predicted_rows_within_node)
    num_bytes = found.predicted_bytes_across_nodes + found.predicted_bytes_within_node
    planned = (found.num_tokens, found.num_touched_nodes, found.min_rows_across_nodes)
    numbers = torch.tensor([*planned, *rows, num_bytes], device=bench.device)
    distributed.all_reduce(numbers, group=bench.group)
    tokens = touched = across = within = 0
    for source, home in enumerate(nodes):
        for ids in bench.routing("dropped", source).ids_TK.tolist():
            ranks = {expert // bench.num_local for expert in ids if expert >= 0}
            tokens, touched = tokens + 1, touched + len({nodes[rank] for rank in ranks})
            across += len({nodes[rank] for rank in ranks} - {home})
            within += sum(rank % nodes.count(home) != source % nodes.count(home) for rank in ranks)
    bytes_per_row = 2 * bench.hidden_size + 8 * NUM_CHOICES
    rows_both_ways = [2 * across, 2 * across, 2 * within]
    assert numbers.tolist() == [tokens, touched, *rows_both_ways, 2 * (across + within) * bytes_per_row]


def law_the_cap_is_verified_on_all_ranks(deepep: DeepEPBench) -> None:
    bench = deepep.bench
    if len(set(bench.nodes)) == 1:
        return
    dispatcher, mine = deepep.capped(1), bench.mine("one_node")
    wide_TK = mine.ids_TK.clone()
    if bench.place == 0:
        wide_TK[1] = torch.arange(NUM_CHOICES) * (bench.num_experts // NUM_CHOICES)
    messages = []
    for ids_TK in (mine.ids_TK, wide_TK):
        handle = dispatcher.plan(ids_TK)
        try:
            dispatcher.dispatch(mine.rows_TD, mine.weights_TK, handle).wait()
        except NodeCapError as error:
            messages.append(str(error))
    assert len(messages) == 1
    assert ("token 1 (2 nodes)" if bench.place == 0 else "rank 0 has 1 token") in messages[0]


LAWS: dict[str, Callable[[DeepEPBench], None]] = {
    name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")
}
