"""Every registered dispatcher keeps the contract on real ranks, with emulations of missing packages."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed

import kernels.permute.reference
from base.registry import load_plugins
from comm.dispatch.all_to_all import DispatchError
from comm.dispatch.build import Fp8Dispatcher
from comm.dispatch.local import LocalDispatcher
from comm.dispatch.process_group import Observers
from comm.dispatch.registry import DISPATCHERS
from comm.dispatch.traffic import Traffic
from comm.lane import ThreadLane
from comm.protocol import Dispatcher
from comm.watchdog.collective_log import Collective
from tests import ROOT
from tests.comm.backends import Setting, capped_kinds, emulated, maker, watching
from tests.comm.contract import Bench, num_experts_for
from tests.comm.laws import LAWS, check_laws
from tests.commands import run_command
from tests.host_reads import Reads
from tests.inline_lane import InlineLane
from tests.ranks import run_ranks
from verify.nccl.calls import Call, CallLog, Calls, log_calls, with_host_reads

RARE = """
    two_hop-1 two_hop-2 two_hop-2+2 two_hop-2+2+2 two_hop-4+2 two_hop-1+2+2 all_to_all-1 deepep-1 deepep-1+1 deepep-4
"""
"""Settings of which `make test` runs a like one: one node, equal nodes, unequal nodes."""


@dataclass(frozen=True)
class Findings:
    """Failures of one rank by law, the order of its collectives by group, and its calls without and with FP8."""

    failures: dict[str, str]
    orders: dict[str, str]
    calls: list[Calls]


def _settings() -> Iterator[object]:
    for kind, entry in DISPATCHERS.items():
        for name, each in entry.contract.settings.items():
            marks = [pytest.mark.slow] if each.is_slow else []
            marks += [pytest.mark.exhaustive] if f"{kind}-{name}" in RARE.split() else []
            yield pytest.param(Setting(kind, each.nodes, each.fields), id=f"{kind}-{name}", marks=marks)


def check_contract(rank: int, world_size: int, setting: Setting, plugins: tuple[str, ...]) -> Findings:
    load_plugins(plugins)
    observers, world, contract = watching(), distributed.group.WORLD, setting.entry.contract
    assert world is not None
    opened: list[Dispatcher] = []
    with emulated(setting):
        make = maker(setting, num_experts_for(world_size), observers)
        with ThreadLane("comm") as lane:
            bench = Bench(
                make=lambda lane: opened.append(make(lane)) or opened[-1],
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
        calls = [_calls(setting, rank, wrap) for wrap in (lambda dispatcher: dispatcher, Fp8Dispatcher)]
    return Findings(failures, observers.log.order_hashes(), calls)


class _ReadLog(CallLog):
    """Log that outside of waits also lists reads by the host."""

    def __init__(self) -> None:
        super().__init__()
        self._is_waiting = False

    @contextmanager
    def awaiting(self, collective: Collective) -> Iterator[None]:
        self._is_waiting = True
        with super().awaiting(collective):
            yield
        self._is_waiting = False

    def read(self) -> None:
        if not self._is_waiting:
            self.calls.append(Call("read"))


def _calls(setting: Setting, rank: int, wrap: Callable[[Dispatcher], Dispatcher]) -> Calls:
    """Returns what one plan and all methods of a dispatcher do."""
    log = _ReadLog()
    lane = InlineLane()
    dispatcher = wrap(maker(setting, num_experts_for(len(setting.nodes)), Observers(Traffic(), log))(lane))
    ids_TK = torch.tensor([[0, 1], [num_experts_for(len(setting.nodes)) - 1, 2]])
    rows_TD = torch.ones(2, 256, dtype=torch.bfloat16)
    to_list = Tensor.tolist
    with mock.patch.object(Tensor, "tolist", lambda tensor: (log.read(), to_list(tensor))[1]):
        calls = log_calls(dispatcher, log, lane, ids_TK, rows_TD)
    dispatcher.close()
    return calls


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


def test_host_reads_of_a_dispatcher_are_those_of_the_model(findings: list[Findings]) -> None:
    """The model of NCCL's rules adds reads to the logged collectives. Quantizing rows adds no call."""
    for rank, found in enumerate(findings):
        plain, quantized = found.calls
        assert plain == quantized, f"rank {rank}"
        collectives = {method: tuple(call for call in calls if call.group) for method, calls in plain.items()}
        modelled = [call for calls in with_host_reads(collectives).values() for call in calls if call.action != "hold"]
        assert [call for calls in plain.values() for call in calls] == modelled, f"rank {rank}"


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


def _permute(rows_ND: Tensor, source_A: Tensor, out_AD: Tensor | None = None) -> Tensor:
    """Permutes rows like the GPU kernel, which does not read the indices on the host."""
    rows_AD = rows_ND.index_select(0, source_A.clamp(min=0)).masked_fill(source_A[:, None] < 0, 0)
    return rows_AD if out_AD is None else out_AD.copy_(rows_AD)


def _unpermute(rows_AD: Tensor, places_TK: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    rows_KND = torch.stack([_permute(rows_AD, places_N) for places_N in places_TK.unbind(1)])
    return rows_KND.sum(0).to(dtype or rows_AD.dtype)


def _count_reads(rank: int, world_size: int, setting: Setting) -> tuple[list[str], list[int]]:
    """Counts the reads in the exchanges of one handle, and the numbers that plans read."""
    kernels.permute.reference.permute, kernels.permute.reference.unpermute = _permute, _unpermute
    read: list[int] = []
    tolist = torch.Tensor.tolist

    def counted(tensor: Any) -> Any:
        read.append(tensor.numel())
        return tolist(tensor)

    generator = torch.Generator().manual_seed(rank)
    ids_TK = torch.rand(20, 12, generator=generator).topk(4, -1).indices.masked_fill(torch.rand(20, 4) < 0.2, -1)
    rows_TD, weights_TK = torch.rand(20, 6, generator=generator), torch.rand(20, 4, generator=generator)
    dispatcher = maker(setting, 12, watching())(InlineLane())
    reads = Reads()
    setattr(Tensor, "tolist", counted)  # noqa: B010
    with reads:
        handle = dispatcher.plan(ids_TK)
        arrived = dispatcher.dispatch(rows_TD, weights_TK, handle).wait()
        dispatcher.combine(arrived.rows_AD, handle).wait()
        dispatcher.combine_backward(rows_TD, handle).wait()
        dispatcher.dispatch_backward(arrived.rows_AD, arrived.weights_A, handle).wait()
    assert reads.num_seen > 100
    return reads.found, read


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["all_to_all", "two_hop"])
def test_exchange_reads_from_the_device_once(backend: str) -> None:
    for found, read in run_ranks(3, _count_reads, Setting(backend, (0, 1, 1), {"chunks": 2}, max_nodes=2)):
        assert found == []
        assert len(read) == 1


def test_local_plan_waits_for_its_counts_at_the_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, the host does not wait for work that is queued between the plan and the exchange."""

    class OnCuda(Tensor):
        is_cuda = True

    waits: list[str] = []
    copied = SimpleNamespace(synchronize=lambda: waits.append("counts"))
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(record_event=lambda: copied))
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    ids_TK = torch.tensor([[2, -1], [0, 4], [4, 2]])
    rows_TD, weights_TK = torch.rand(3, 6), torch.rand(3, 2)
    dispatcher = LocalDispatcher(5)
    expected = dispatcher.dispatch(rows_TD, weights_TK, dispatcher.plan(ids_TK)).wait()
    handle = dispatcher.plan(ids_TK.as_subclass(OnCuda))
    assert handle.num_tokens == 3
    assert waits == []
    arrived = dispatcher.dispatch(rows_TD, weights_TK, handle).wait()
    dispatcher.combine(arrived.rows_AD, handle).wait()
    assert waits == ["counts"]
    assert arrived.counts == expected.counts == (1, 0, 2, 0, 2)
    assert torch.equal(arrived.rows_AD, expected.rows_AD)


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    """Writes the wrapper of docs/extend.md and its YAML file."""
    page = (ROOT / "docs" / "extend.md").read_text("utf-8")
    blocks = [block for block in re.findall(r"```(?:python|yaml)\n(.*?)```", page, re.DOTALL) if "counting" in block]
    path, values = tmp_path / "counting.py", tmp_path / "conf" / "dispatch" / "counting.yaml"
    values.parent.mkdir(parents=True)
    path.write_text(blocks[0], "utf-8")
    values.write_text(blocks[1], "utf-8")
    return path


def test_reading_dispatchers_needs_no_torch() -> None:
    code = (
        "import sys; from comm.dispatch.registry import DISPATCHERS; print(DISPATCHERS.names(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split(")")[1].strip() == "False"


@pytest.mark.long
@pytest.mark.parametrize(("change", "num_broken"), [("", 0), (" * 2", len(LAWS))], ids=["right", "wrong"])
def test_contract_suite_runs_over_a_dispatcher_from_a_file_outside(
    change: str, num_broken: int, counting: Path
) -> None:
    """A correct wrapper keeps all laws on two ranks; one that doubles rows breaks each of them."""
    text = counting.read_text("utf-8")
    counting.write_text(text.replace("inner.dispatch(rows_TD", f"inner.dispatch(rows_TD{change}"), "utf-8")
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--plugins={counting}"]
    tests = ["tests/comm/test_dispatch.py", "-m", "not slow", "-k", "counting"]
    done = run_command(["python", "-m", "pytest", *options, *tests], timeout=300)
    assert done.returncode == (1 if num_broken else 0), done.stdout + done.stderr
    counts = done.stdout.splitlines()[-1]
    assert int(counts.split(" passed")[0].split()[-1]) == len(LAWS) + 4 - num_broken, done.stdout


@pytest.mark.exhaustive
def test_run_takes_a_dispatcher_from_a_file_outside(counting: Path) -> None:
    command = ["python", "-m", "launch.train", f"plugins=[{counting}]", "dispatch=counting", "config_only=true"]
    done = run_command([*command, "dispatch.print_every=7"], timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kind: counting" in done.stdout
    assert "print_every: 7" in done.stdout
