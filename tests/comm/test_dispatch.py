"""Every registered dispatcher keeps the contract on real ranks, with emulations of missing packages."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import distributed

from comm.dispatch.all_to_all.plan import DispatchError
from comm.dispatch.registry import DISPATCHERS
from comm.lane import ThreadLane
from comm.protocol import Dispatcher
from kernels.registry import load_plugins
from tests.comm.backends import Setting, capped_kinds, emulated, maker, watching
from tests.comm.contract import Bench, num_experts_for
from tests.comm.laws import LAWS, check_laws
from tests.ranks import run_ranks


@dataclass(frozen=True)
class Findings:
    """Failures of one rank by law, and the order of its collectives by group."""

    failures: dict[str, str]
    orders: dict[str, str]


def _settings() -> Iterator[object]:
    for kind, entry in DISPATCHERS.items():
        for name, each in entry.contract.settings.items():
            marks = [pytest.mark.slow] if each.is_slow else []
            yield pytest.param(Setting(kind, each.nodes, each.fields), id=f"{kind}-{name}", marks=marks)


def check_contract(rank: int, world_size: int, setting: Setting, plugins: tuple[str, ...]) -> Findings:
    """Checks all laws on one rank.

    Args:
        rank: rank of this process.
        world_size: number of ranks of the expert group.
        setting: setting of the dispatcher.
        plugins: files that register dispatchers.
    """
    load_plugins(plugins)
    observers, world, contract = watching(), distributed.group.WORLD, setting.entry.contract
    assert world is not None
    opened: list[Dispatcher] = []
    with emulated(setting):
        make = maker(setting, num_experts_for(world_size), observers)
        with ThreadLane("comm") as lane:
            bench = Bench(
                make=lambda lane: opened.append(make(lane)) or opened[-1],  # type: ignore[func-returns-value]
                lane=lane,
                group=world,
                nodes=setting.nodes,
                place=rank,
                row_types=tuple(getattr(torch, name) for name in contract.row_types),
                weights_type=getattr(torch, contract.weights_type),
                hidden_size=contract.hidden_size,
            )
            failures = check_laws(bench)
        for dispatcher in opened:
            dispatcher.close()
    return Findings(failures, observers.log.order_hashes())


def plugin_files(config: pytest.Config) -> tuple[str, ...]:
    """Returns the files that this run of pytest was given, which ranks must load too."""
    return tuple(str(Path(file).resolve()) for file in config.getoption("plugin_files"))


@pytest.fixture(scope="module", params=_settings())
def findings(request: pytest.FixtureRequest) -> list[Findings]:
    setting: Setting = request.param
    return run_ranks(len(setting.nodes), check_contract, setting, plugin_files(request.config))


@pytest.mark.parametrize("law", list(LAWS))
def test_dispatcher_keeps_the_law(law: str, findings: list[Findings]) -> None:
    broken = [found.failures[law] for found in findings if law in found.failures]
    assert not broken, "\n".join(broken)


def test_dispatcher_has_one_order_of_collectives_in_each_group(findings: list[Findings]) -> None:
    orders: dict[str, dict[int, str]] = {}
    for rank, found in enumerate(findings):
        for group, order in found.orders.items():
            orders.setdefault(group, {})[rank] = order
    assert len(findings) == 1 or orders
    assert {group: found for group, found in orders.items() if len(set(found.values())) > 1} == {}


@pytest.mark.parametrize("kind", capped_kinds())
def test_dispatch_raises_errors_of_the_lane_in_wait(kind: str, request: pytest.FixtureRequest) -> None:
    assert "index" in run_ranks(1, _fail_in_flight, kind, plugin_files(request.config))[0]


def _fail_in_flight(rank: int, world_size: int, kind: str, plugins: tuple[str, ...]) -> str:
    load_plugins(plugins)
    with ThreadLane("comm") as lane:
        dispatcher = maker(Setting(kind, (0,)), 24, watching())(lane)
        handle = dispatcher.plan(torch.tensor([[0, 24]]))
        work = dispatcher.dispatch(torch.ones(1, 4), torch.ones(1, 2), handle)
        try:
            work.wait()
        except (RuntimeError, IndexError) as error:
            return str(error)
    return ""


@pytest.mark.parametrize("kind", capped_kinds())
def test_dispatcher_rejects_experts_that_ranks_cannot_share(kind: str, request: pytest.FixtureRequest) -> None:
    for rank, message in enumerate(run_ranks(2, _refuse, kind, plugin_files(request.config))):
        assert "must divide 5 routed experts, has 2 ranks" in message, f"rank {rank}"


def _refuse(rank: int, world_size: int, kind: str, plugins: tuple[str, ...]) -> str:
    load_plugins(plugins)
    make = maker(Setting(kind, (0, 0)), 5, watching())
    with ThreadLane("comm") as lane:
        try:
            make(lane)
        except DispatchError as error:
            return str(error)
    return ""
