"""A layer that is recomputed gives the same bits, keeps what is declared, and leaves nothing."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from comm.dispatch.local import LocalDispatcher
from comm.protocol import Dispatcher
from model.attention.core import _Kernel
from model.config import LAYER, RECOMPUTED, Computing, ModelConfig, Products, Recomputed
from model.linear import GradientStore
from model.objective import CrossEntropy, LossSums, MicroBatch, loss_names
from model.router import RecordedRoutes, ReplayedRoutes, Routes
from model.stage import Stage
from model.transformer import Transformer, initialize_weights, routers
from tests.model.fp8_models import Away
from tests.model.live_memory import LiveMemory
from tests.model.test_phases import make_batch
from tests.model.test_stage import run_phases, run_weights
from tests.tiny import MODEL

CONFIG = replace(MODEL, num_layers=3)
OBJECTIVE = CrossEntropy(factors=(0.1, 0.05), balance=0.05)
LAYERS: tuple[Recomputed, ...] = (LAYER,)
CASES: dict[str, tuple[torch.dtype, Products]] = {
    "float64": (torch.float64, "own"),
    "float32": (torch.float32, "own"),
    "bf16": (torch.bfloat16, "own"),
    "fp8": (torch.bfloat16, "fp8"),
    "fp8, powers of two": (torch.bfloat16, "fp8_power_of_two"),
}


def make_model(
    recomputed: tuple[Recomputed, ...],
    case: str = "float32",
    config: ModelConfig = CONFIG,
    dispatcher: Dispatcher | None = None,
) -> Transformer:
    dtype, products = CASES[case]
    computing = Computing(recomputed=frozenset(recomputed), products=products)
    model = Transformer(config, dispatcher or LocalDispatcher(config.num_routed_experts), dtype, computing=computing)
    initialize_weights(model, 3)
    return model


def run(model: Transformer, batch: MicroBatch, store: GradientStore, routes: Routes | None = None) -> Iterator[Tensor]:
    """Runs forward, backward and weights of the whole model; yields nothing after the forward, then the sums."""
    stage = Stage(model, range(model.config.num_layers), first=True, last=True)
    sums = LossSums(loss_names(1))
    one = stage.start(batch, OBJECTIVE, sums, store, routes=routes)
    run_phases(one, stage, backward=False)
    yield torch.empty(0)
    run_phases(one, stage, backward=True)
    run_weights(one, stage)
    yield sums.settle()


def results(model: Transformer, batch: MicroBatch, routes: Routes | None = None) -> list[Tensor]:
    """Returns the sums of losses, all gradients and the routers' loads of one micro-batch."""
    store = GradientStore(model.parameters())
    *_, sums = run(model, batch, store, routes)
    loads = [router.load for router in routers(model).values()]
    return [sums, *(store.gradient(weight) for weight in model.parameters()), *loads]


def assert_same(made: list[Tensor], expected: list[Tensor]) -> None:
    assert len(made) == len(expected) > 40
    for index, (ours, theirs) in enumerate(zip(made, expected, strict=True)):
        assert torch.equal(ours, theirs), index


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_recomputed_layer_changes_no_bit(case: str) -> None:
    batch = make_batch(is_packed=True)
    expected = results(make_model(RECOMPUTED, case), batch)
    assert_same(results(make_model(LAYERS, case), batch), expected)


class Counted(Away):
    def __init__(self, inner: Dispatcher) -> None:
        super().__init__(inner)
        self.calls: Counter[str] = Counter()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if callable(found) and not name.startswith("_"):
            self.calls[name] += 1
        return found


def test_a_recomputed_layer_plans_combines_and_attends_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only dispatch of rows is repeated. Kernels of attention run once for each layer."""
    dispatcher = Counted(LocalDispatcher(CONFIG.num_routed_experts))
    num_attended = 0
    attend = _Kernel.attend

    def counted(kernel: _Kernel, *heads: Tensor) -> Tensor:
        nonlocal num_attended
        num_attended += 1
        return attend(kernel, *heads)

    monkeypatch.setattr(_Kernel, "attend", counted)
    results(make_model(LAYERS, dispatcher=dispatcher), make_batch())
    num_moe = CONFIG.num_layers - CONFIG.num_dense_layers + CONFIG.mtp_depth
    each = ("plan", "dispatch", "combine", "combine_backward", "dispatch_again", "dispatch_backward")
    assert dispatcher.calls == Counter(dict.fromkeys(each, num_moe))
    assert num_attended == CONFIG.num_layers + CONFIG.mtp_depth


def test_a_recomputed_layer_replays_the_same_choices() -> None:
    """Forced experts are also those of the recomputation, and are checked on the host once."""
    case, batch, recorded, again = "fp8", make_batch(), RecordedRoutes(), RecordedRoutes()
    results(make_model(RECOMPUTED, case), batch, recorded)
    expected = results(make_model(LAYERS, case), batch, again)
    assert recorded.ids.keys() == again.ids.keys()
    assert all(torch.equal(ids, again.ids[label]) for label, ids in recorded.ids.items())
    # Other choices than the router's: the next expert of each.
    forced = {label: (ids.to(torch.int64) + 1) % CONFIG.num_routed_experts for label, ids in recorded.ids.items()}
    made = [results(make_model(kind, case), batch, ReplayedRoutes(forced)) for kind in (LAYERS, RECOMPUTED)]
    assert_same(*made)
    assert not torch.equal(made[0][0], expected[0])


@pytest.mark.slow
@pytest.mark.usefixtures("_garbage_collection_disabled")
def test_a_recomputed_layer_leaves_nothing() -> None:
    """Neither a whole pass nor one that ends after its forward leaves a tensor; less is kept than without."""
    kept = {}
    for kind in (LAYERS, RECOMPUTED):
        model, batch = make_model(kind), make_batch()
        store = GradientStore(model.parameters())
        # What is made once and stays is made here. The first use of a dispatch mode keeps frames in a cycle.
        with LiveMemory():
            results(model, batch)
        with LiveMemory() as memory:
            passes = run(model, batch, store)
            next(passes)
            kept[kind] = memory.live_bytes()
            *_, sums = passes
            del passes, sums
        assert [storage.nbytes() for storage in memory.live()] == []
        with LiveMemory() as memory:
            passes = run(model, batch, store)
            next(passes)
            del passes
        assert [storage.nbytes() for storage in memory.live()] == []
    assert kept[LAYERS] < 0.8 * kept[RECOMPUTED]
