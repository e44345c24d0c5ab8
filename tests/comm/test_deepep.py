"""DeepEP's dispatcher with an emulation of the package, its requirements, and with the package on two GPUs."""

import importlib
import importlib.util
import inspect
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

from comm.config import ParallelismConfig
from comm.dispatch.build import Fp8Dispatcher
from comm.dispatch.deepep.dispatcher import DeepEPDispatcher, DeepEPRoute, ExpertBuffer
from comm.dispatch.deepep.package import BufferShape, DeepEPError, check_available, load_package
from comm.dispatch.node_cap import NodeCapError
from comm.dispatch.process_group import Observers
from comm.lane import Lane, StreamLane, ThreadLane
from comm.layout import Layout
from comm.protocol import Dispatcher, Label
from tests.comm import deep_ep_emulation
from tests.comm.backends import MAX_CHOICES, MAX_TOKENS, watching
from tests.comm.contract import CASES, NUM_CHOICES, Bench, num_experts_for
from tests.comm.deep_ep_emulation import Emulation
from tests.comm.laws import check_laws
from tests.covering import exhaustive
from tests.inline_lane import InlineLane
from tests.ranks import run_ranks


def test_package_check_needs_no_torch() -> None:
    code = """
        import importlib.util, sys
        from comm.dispatch.deepep.package import DeepEPError, check_available
        importlib.util.find_spec = lambda name: None
        try:
            check_available()
        except DeepEPError as error:
            print(error, "torch" in sys.modules)
    """
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", textwrap.dedent(code)]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert "deepep needs the package deep_ep (github.com/deepseek-ai/DeepEP) and CUDA" in found.stdout, found.stderr
    assert found.stdout.endswith("nearest valid: dispatch=two_hop False\n")


def test_package_that_is_too_old_or_broken_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_available()
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(__version__="1.2.1"))
    with pytest.raises(DeepEPError, match=r"deep_ep 1\.2\.1 has no ElasticBuffer.*dispatch=two_hop"):
        load_package()

    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(ElasticBuffer=None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    with pytest.raises(DeepEPError, match=r"needs NCCL 2\.30\.4 or later, and torch has loaded 2\.28\.9; nearest"):
        load_package()

    def fail(name: str) -> None:
        raise ImportError("libnccl.so.2: cannot open")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(DeepEPError, match=r"does not load \(libnccl"):
        load_package()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 7000}, "multiple of 256, has 7000; nearest valid: 6912 or 7168"),
        ({"hidden_size": 128}, "has 128; nearest valid: 256,"),
        ({"num_choices": 33}, "1 to 32 experts per token, has 33; nearest valid: 32"),
        ({"max_tokens": 0}, "at least 1 token, has 0"),
    ],
)
def test_unsupported_shape_is_rejected(change: dict[str, int], message: str) -> None:
    sizes: dict[str, Any] = {"max_tokens": 8, "hidden_size": 256, "num_choices": 2, "timeout_seconds": 1.0}
    with pytest.raises(DeepEPError, match=message):
        BufferShape(**(sizes | change))


def test_route_sorts_received_rows_by_expert_source_and_token() -> None:
    """Three rows of sources 7, 2 and 5 with two choices each; experts 0 and 1 are local."""
    handle = SimpleNamespace(
        num_recv_tokens_per_expert_list=[2, 2], recv_src_metadata=torch.tensor([[7, 0], [2, 0], [5, 0]])
    )
    route = DeepEPRoute.of(handle, torch.tensor([[1, 0], [-1, 1], [0, -1]]), 8)
    assert route.counts == (2, 2)
    assert route.order.tokens_A.tolist() == [2, 0, 1, 0]
    assert route.order.places_TK.tolist() == [[3, 1], [-1, 2], [0, -1]]
    rows_RD = torch.tensor([[10.0], [20.0], [30.0]])
    assert route.copy_rows(rows_RD).flatten().tolist() == [30, 10, 20, 10]
    assert route.order.sum_rows(torch.tensor([[1.0], [2.0], [4.0], [8.0]])).flatten().tolist() == [10, 4, 1]
    weights_RK = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert route.order.copy_weights(weights_RK).tolist() == [5, 2, 4, 1]
    assert route.order.restore_weights(torch.tensor([5.0, 2.0, 4.0, 1.0])).tolist() == [[1, 2], [0, 4], [5, 0]]


@pytest.mark.parametrize(("num_sms", "used"), [(1, 2), (20, 20), (21, 20)])
def test_buffer_occupies_the_sms_that_products_leave(num_sms: int, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    class Buffer:
        def __init__(self, group: object, **sizes: object) -> None:
            self.get_logical_domain_size = lambda: (1, 1)

        def combine(self, rows: object, handle: object, *, topk_weights: object, num_sms: int) -> tuple[object, ...]:
            sent.append(num_sms)
            return rows, topk_weights, None

    monkeypatch.setattr(distributed, "get_backend", lambda group: "gloo")
    monkeypatch.setattr(distributed, "all_reduce", lambda *tensors, group: None)
    library: Any = SimpleNamespace(ElasticBuffer=Buffer, topk_idx_t=torch.int64)
    shape = BufferShape(max_tokens=8, hidden_size=256, num_choices=2, timeout_seconds=1.0, num_sms=num_sms)
    group: Any = None
    ExpertBuffer(library, group, 8, shape).combine(torch.zeros(1, 256), None, None)
    assert sent == [used]


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
    params=["2x1", pytest.param("2x2", marks=pytest.mark.slow), *exhaustive("1x1", "1x4")],
)
def failures(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    machines = _MACHINES[request.param]
    return run_ranks(machines.num_ranks, _check, machines)


@pytest.mark.slow
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
@pytest.mark.parametrize("method", ["__init__", "dispatch", "combine", "destroy"])
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
        "no scales": lambda: dispatcher.dispatch(codes[:, :-8], weights, handle),
        "codes back": lambda: dispatcher.combine(codes, handle),
        "double weights": lambda: dispatcher.dispatch(full, weights.double(), handle),
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
        "no scales": ("dispatch: ", "has 256 torch.uint8"),
        "codes back": ("combine: ", "rows of 256 bfloat16, has 264 torch.uint8"),
        "double weights": ("dispatch: ", "float32 weights, has torch.float64", "dispatch=two_hop"),
        "many tokens": ("dispatch: ", f"{MAX_TOKENS} tokens", f"has {MAX_TOKENS + 1} tokens with 2"),
        "many choices": ("dispatch: ", "4 experts each", "has 1 tokens with 5"),
    }
    if importlib.util.find_spec("deep_ep") is None:
        parts["no package"] = ("github.com/deepseek-ai/DeepEP", "dispatch=two_hop")
    assert set(parts) <= set(messages)
    for name, words in parts.items():
        assert all(word in messages[name] for word in words), messages[name]
        assert "\n" not in messages[name]
