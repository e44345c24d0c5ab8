"""A token over the cap ends the plan on all ranks, and the next plan works."""

import pytest
import torch

from comm.dispatch.node_cap import NodeCapError
from comm.lane import ThreadLane
from comm.protocol import Label
from tests.comm.backends import Setting, maker, watching
from tests.ranks import run_ranks

_NODES = (0, 1, 1, 2)  # of one expert each
_FEW, _MANY = [0, 1], [0, 1, 3]
_LABEL = Label(layer=2, direction=1, micro_batch=5)


def _plan_thrice(rank: int, world_size: int, setting: Setting) -> list[str]:
    """What each of three plans ended with: nobody over the cap, rank 1, then ranks 0 and 3."""
    over = {1: {1: [0, 2]}, 2: {0: [1], 3: [0, 1, 2]}}
    ends = []
    with ThreadLane("comm") as lane:
        dispatcher = maker(setting, len(_NODES), watching())(lane)
        for number in range(3):
            tokens = over.get(number, {}).get(rank, [])
            # An id of -1 touches no node; without it these tokens would touch as many as the others.
            ids_TK = torch.tensor([_MANY if token in tokens else [*_FEW, -1] for token in range(3)])
            handle = dispatcher.plan(ids_TK, None, _LABEL)
            try:
                dispatcher.dispatch(torch.ones(3, 4), torch.ones(3, 3), handle).wait()
                ends.append("")
            except NodeCapError as error:
                ends.append(str(error))
    return ends


@pytest.mark.parametrize("backend", ["all_to_all", "two_hop"])
def test_token_over_the_cap_ends_its_plan_on_all_ranks(backend: str) -> None:
    setting = Setting("two_hop" if backend == "two_hop" else "all_to_all", _NODES, chunks=2, max_nodes=2)
    first, second, third = zip(*run_ranks(len(_NODES), _plan_thrice, setting), strict=True)
    assert set(first) == {""}
    of = f"dispatch of {_LABEL}: "
    assert second[1] == (
        f"rank 1: {of}tokens 0 (3 nodes), 2 (3 nodes) touch more than dispatch.max_nodes=2 nodes; "
        "nearest valid: dispatch.max_nodes=3, or dispatch.node_cap=clip"
    )
    for rank in (0, 2, 3):
        assert second[rank] == (
            f"rank {rank}: {of}rank 1 has 2 tokens that touch more than dispatch.max_nodes=2 nodes; "
            "its own message names them"
        )
    assert third[0].startswith(f"rank 0: {of}token 1 (3 nodes) touches more")
    assert third[3].startswith(f"rank 3: {of}tokens 0 (3 nodes), 1 (3 nodes), 2 (3 nodes) touch more")
    for rank in (1, 2):
        assert third[rank] == (
            f"rank {rank}: {of}rank 0 has 1 token that touches more than dispatch.max_nodes=2 nodes; "
            "its own message names them, and 1 more rank has some"
        )
