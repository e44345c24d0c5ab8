"""DeepEP's dispatcher with an emulation of the package, and with the package on two GPUs."""

import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import distributed

from comm.config import ParallelismConfig
from comm.dispatch.all_to_all.plan import DispatchError
from comm.dispatch.deepep.dispatcher import DeepEPDispatcher
from comm.dispatch.deepep.package import BufferShape, DeepEPError, load_package
from comm.lane import InlineLane, Lane, StreamLane, ThreadLane
from comm.layout import Layout
from comm.protocol import Dispatcher
from tests.comm import deep_ep_emulation
from tests.comm.backends import MAX_CHOICES, MAX_TOKENS, watching
from tests.comm.contract import Bench, num_experts_for
from tests.comm.deep_ep_emulation import Emulation
from tests.comm.deepep_laws import LAWS, DeepEPBench
from tests.comm.laws import check_laws
from tests.ranks import run_ranks

HIDDEN = 256
SHAPE = BufferShape(max_tokens=MAX_TOKENS, hidden_size=HIDDEN, num_choices=MAX_CHOICES, timeout_seconds=20.5)


@dataclass(frozen=True)
class Machines:
    """Number of ranks, and of ranks per node."""

    num_ranks: int
    ranks_per_node: int
    ids_dtype: torch.dtype = torch.int64
    real: bool = False

    @property
    def layout(self) -> Layout:
        """Layout of the world."""
        mesh = ParallelismConfig(pipeline=1, data=self.num_ranks, expert=self.num_ranks)
        return Layout(mesh, self.ranks_per_node)


_MACHINES = {
    "1x1": Machines(1, 1),
    "2x1": Machines(2, 1, torch.int32),
    "1x4": Machines(4, 4, torch.int32),
    "2x2": Machines(4, 2),
}


def _check(rank: int, world_size: int, machines: Machines) -> dict[str, str]:
    """Returns failures by law: of DeepEP's laws and, with the package, also of the contract."""
    device = torch.device("cuda", rank) if machines.real else torch.device("cpu")
    if machines.real:
        torch.cuda.set_device(device)
    observers, layout, group = watching(), machines.layout, distributed.group.WORLD
    assert group is not None
    library = load_package() if machines.real else Emulation(machines.ranks_per_node, machines.ids_dtype)
    opened: list[DeepEPDispatcher] = []

    def make(lane: Lane, max_nodes: int | None = None) -> Dispatcher:
        num_experts = num_experts_for(world_size)
        opened.append(DeepEPDispatcher(group, num_experts, layout, lane, observers, SHAPE, max_nodes, library))
        return opened[-1]

    nodes = tuple(layout.node_of(member) for member in range(world_size))
    failures = {}
    with StreamLane(device) if machines.real else ThreadLane("comm") as lane:
        bench = Bench(make, lane, group, nodes, rank, (torch.bfloat16,), torch.float32, HIDDEN, device)
        deepep = DeepEPBench(bench, observers, library, lambda max_nodes: make(lane, max_nodes))
        for name, law in LAWS.items():
            try:
                law(deepep)
            except AssertionError:
                failures[name] = f"rank {rank}: {traceback.format_exc()}"
        if machines.real:
            failures |= check_laws(bench)
    for dispatcher in opened:
        dispatcher.close()
    return failures


@pytest.fixture(
    scope="module",
    params=[name if name == "2x1" else pytest.param(name, marks=pytest.mark.slow) for name in _MACHINES],
)
def failures(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    machines = _MACHINES[request.param]
    return run_ranks(machines.num_ranks, _check, machines)


@pytest.mark.parametrize("law", list(LAWS))
def test_deepep_with_an_emulation_keeps_its_laws(law: str, failures: list[dict[str, str]]) -> None:
    broken = [found[law] for found in failures if law in found]
    assert not broken, "\n".join(broken)


def _why_not_real() -> str:
    if importlib.util.find_spec("deep_ep") is None:
        return "the package deep_ep is not installed"
    return "" if torch.cuda.device_count() >= 2 else f"needs 2 GPUs, has {torch.cuda.device_count()}"


@pytest.mark.skipif(bool(_why_not_real()), reason=_why_not_real())
def test_deepep_keeps_the_laws() -> None:
    assert run_ranks(2, _check, Machines(2, 2, real=True), backend="nccl") == [{}, {}]


@pytest.mark.skipif(importlib.util.find_spec("deep_ep") is None, reason="the package deep_ep is not installed")
@pytest.mark.parametrize("method", ["__init__", "dispatch", "combine", "destroy", "get_theoretical_num_sms"])
def test_emulation_takes_the_parameters_of_the_package(method: str) -> None:
    package = importlib.import_module("deep_ep")
    real = inspect.signature(getattr(package.ElasticBuffer, method)).parameters
    emulated = inspect.signature(getattr(deep_ep_emulation.ElasticBuffer, method)).parameters
    public = [(name, each.default) for name, each in emulated.items() if not name.startswith("_")]
    assert public == [(name, each.default) for name, each in real.items()][: len(public)]


def _refuse(rank: int, world_size: int) -> dict[str, str]:
    observers, group = watching(), distributed.group.WORLD
    assert group is not None
    layout, lane, library = Machines(1, 1).layout, InlineLane(), Emulation(1)
    dispatcher = DeepEPDispatcher(group, 24, layout, lane, observers, SHAPE, library=library)
    handle = dispatcher.plan(torch.tensor([[0, 1]]))
    full, weights = torch.zeros(1, HIDDEN, dtype=torch.bfloat16), torch.zeros(1, 2)
    codes = torch.zeros(1, HIDDEN + 8, dtype=torch.uint8)
    attempts: dict[str, Callable[[], object]] = {
        "float rows": lambda: dispatcher.dispatch(full.float(), weights, handle),
        "narrow rows": lambda: dispatcher.combine_backward(full[:, 1:], handle),
        "odd codes": lambda: dispatcher.dispatch(codes[:, :-2], weights, handle),
        "no scales": lambda: dispatcher.dispatch(codes[:, :-8], weights, handle),
        "codes back": lambda: dispatcher.combine(codes, handle),
        "double weights": lambda: dispatcher.dispatch(full, weights.double(), handle),
        "double gradients": lambda: dispatcher.dispatch_backward(full, torch.zeros(1).double(), handle),
        "many tokens": lambda: dispatcher.plan(torch.zeros(MAX_TOKENS + 1, 2, dtype=torch.int64)),
        "many choices": lambda: dispatcher.plan(torch.zeros(1, 5, dtype=torch.int64)),
        "no package": lambda: DeepEPDispatcher(group, 24, layout, lane, observers, SHAPE),
    }
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except DeepEPError as error:
            messages[name] = str(error)
    return messages


def test_deepep_rejects_unsupported_rows_in_one_line() -> None:
    messages = run_ranks(1, _refuse)[0]
    parts = {
        "float rows": ("dispatch: ", "256 bfloat16, or 256 codes and float32 scales as uint8, has 256 torch.float32"),
        "narrow rows": ("combine backward: ", "has 255 torch.bfloat16; nearest valid"),
        "odd codes": ("dispatch: ", "has 262 torch.uint8"),
        "no scales": ("dispatch: ", "has 256 torch.uint8"),
        "codes back": ("combine: ", "rows of 256 bfloat16, has 264 torch.uint8"),
        "double weights": ("dispatch: ", "float32 weights, has torch.float64", "dispatch=two_hop"),
        "double gradients": ("dispatch backward: ", "has torch.float64"),
        "many tokens": ("dispatch: ", f"{MAX_TOKENS} tokens", f"has {MAX_TOKENS + 1} tokens with 2"),
        "many choices": ("dispatch: ", "4 experts each", "has 1 tokens with 5"),
    }
    if importlib.util.find_spec("deep_ep") is None:
        parts["no package"] = ("github.com/deepseek-ai/DeepEP", "dispatch=two_hop")
    assert set(parts) <= set(messages)
    for name, words in parts.items():
        assert all(word in messages[name] for word in words), messages[name]
        assert "\n" not in messages[name]


def _divide(rank: int, world_size: int) -> str:
    observers, group = watching(), distributed.group.WORLD
    assert group is not None
    with pytest.raises(DispatchError) as caught:
        DeepEPDispatcher(group, 5, Machines(2, 2).layout, InlineLane(), observers, SHAPE, library=Emulation(2))
    return str(caught.value)


def test_deepep_rejects_experts_that_ranks_cannot_share() -> None:
    for rank, message in enumerate(run_ranks(2, _divide)):
        assert "must divide 5 routed experts, has 2 ranks" in message, f"rank {rank}"
