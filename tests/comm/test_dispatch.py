"""Every dispatcher that needs no GPU keeps the contract, on real ranks."""

from dataclasses import dataclass

import pytest
import torch
from torch import distributed

from comm.dispatch.all_to_all.plan import DispatchError
from comm.lane import ThreadLane
from tests.comm.backends import Backend, Setting, maker, watching
from tests.comm.contract import Bench, num_experts_for
from tests.comm.laws import LAWS, check_laws
from tests.ranks import run_ranks

_SETTINGS = {
    "local": Setting("local", (0,)),
    "all_to_all-1": Setting("all_to_all", (0,)),
    "all_to_all-2": Setting("all_to_all", (0, 0)),
    "all_to_all-2+2": Setting("all_to_all", (0, 0, 1, 1)),
    "two_hop-1": Setting("two_hop", (0,), chunks=2),
    "two_hop-2": Setting("two_hop", (0, 0)),
    "two_hop-1+1": Setting("two_hop", (0, 1), chunks=2),
    "two_hop-2+2": Setting("two_hop", (0, 0, 1, 1)),
    "two_hop-2+2-chunks": Setting("two_hop", (0, 0, 1, 1), chunks=3, partial_sums="float32"),
    "two_hop-2+2+2": Setting("two_hop", (0, 0, 1, 1, 2, 2), chunks=2),
    "two_hop-4+2": Setting("two_hop", (0, 0, 0, 0, 1, 1), chunks=2),
    "two_hop-1+2+2": Setting("two_hop", (0, 1, 1, 2, 2), chunks=2),
    "two_hop-3+1+2": Setting("two_hop", (0, 0, 0, 1, 2, 2)),
}


@dataclass(frozen=True)
class Findings:
    """Of one rank: failures by law, and the order of its operations by group."""

    failures: dict[str, str]
    orders: dict[str, str]


def _check(rank: int, world_size: int, setting: Setting) -> Findings:
    observers, world = watching(), distributed.group.WORLD
    assert world is not None
    make = maker(setting, num_experts_for(world_size), observers)
    with ThreadLane("comm") as lane:
        failures = check_laws(Bench(make, lane, world, setting.nodes, rank))
    return Findings(failures, observers.log.order_hashes())


_QUICK = ("local", "all_to_all-2", "all_to_all-2+2", "two_hop-1+1", "two_hop-2+2-chunks")


@pytest.fixture(
    scope="module",
    params=[name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow) for name in _SETTINGS],
)
def findings(request: pytest.FixtureRequest) -> list[Findings]:
    setting = _SETTINGS[request.param]
    return run_ranks(len(setting.nodes), _check, setting)


@pytest.mark.parametrize("law", list(LAWS))
def test_dispatcher_keeps_the_law(law: str, findings: list[Findings]) -> None:
    broken = [found.failures[law] for found in findings if law in found.failures]
    assert not broken, "\n".join(broken)


def test_dispatcher_has_one_order_of_operations_in_each_group(findings: list[Findings]) -> None:
    orders: dict[str, set[str]] = {}
    for found in findings:
        for group, order in found.orders.items():
            orders.setdefault(group, set()).add(order)
    assert len(findings) == 1 or orders
    assert all(len(found) == 1 for found in orders.values())


@pytest.mark.parametrize("backend", ["all_to_all", "two_hop"])
def test_dispatch_raises_in_wait_what_went_wrong_on_the_lane(backend: Backend) -> None:
    assert "index" in run_ranks(1, _fail_in_flight, backend)[0]


def _fail_in_flight(rank: int, world_size: int, backend: Backend) -> str:
    with ThreadLane("comm") as lane:
        dispatcher = maker(Setting(backend, (0,)), 24, watching())(lane)
        handle = dispatcher.plan(torch.tensor([[0, 24]]))
        work = dispatcher.dispatch(torch.ones(1, 4), torch.ones(1, 2), handle)
        try:
            work.wait()
        except (RuntimeError, IndexError) as error:
            return str(error)
    return ""


@pytest.mark.parametrize("backend", ["all_to_all", "two_hop"])
def test_dispatcher_refuses_experts_that_ranks_cannot_share(backend: Backend) -> None:
    assert all("must divide 5 routed experts, got 2 ranks" in message for message in run_ranks(2, _refuse, backend))


def _refuse(rank: int, world_size: int, backend: Backend) -> str:
    make = maker(Setting(backend, (0, 0)), 5, watching())
    with ThreadLane("comm") as lane:
        try:
            make(lane)
        except DispatchError as error:
            return str(error)
    return ""
