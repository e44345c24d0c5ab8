"""Phases equal the whole model, and offload changes no bit and frees memory."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from comm.dispatch.local import LocalDispatcher
from comm.lane import ThreadHostCopies
from comm.protocol import Label
from kernels.attention.documents import Documents
from model.config import RECOMPUTED, Computing, Products, Recomputed
from model.linear import GradientStore
from model.objective import CrossEntropy, LossSums, MicroBatch, loss_names
from model.phases import Computed, ComputePhase, DispatchPhase, movable_storages
from model.stage import BalanceLoss, Phase, Stage, StageRun, block_phases
from model.transformer import Transformer, initialize_weights
from model.values import ExpertOutput, Gradients, Hidden, HiddenGradients
from tests.covering import exhaustive
from tests.model.live_memory import LiveMemory, saved_memory
from tests.model.test_stage import run_phases, run_weights
from tests.tiny import MODEL

SUBSETS: list[frozenset[Recomputed]] = [
    frozenset(chosen) for number in range(4) for chosen in combinations(RECOMPUTED, number)
]

CONFIG = replace(MODEL, num_layers=2)
OBJECTIVE = CrossEntropy(factors=(0.1, 0.05), balance=0.05)


def make_model(
    recomputed: frozenset[Recomputed], dtype: torch.dtype = torch.float32, products: Products = "own"
) -> Transformer:
    dispatcher = LocalDispatcher(CONFIG.num_routed_experts)
    computing = Computing(recomputed=recomputed, products=products)
    model = Transformer(CONFIG, dispatcher, dtype, computing=computing)
    initialize_weights(model, 3)
    return model


def make_batch(size: int = 16, is_packed: bool = False) -> MicroBatch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(CONFIG.vocab_size, (2, size + 2), generator=generator)
    positions = torch.arange(size).remainder(5).expand(2, size)
    return MicroBatch(
        inputs_BT=(tokens[:, :size], tokens[:, 1 : size + 1]),
        targets_BT=(tokens[:, 1 : size + 1], tokens[:, 2:]),
        documents=Documents.from_positions(positions) if is_packed else None,
    )


def eager_gradients(model: Transformer, batch: MicroBatch) -> list[Tensor]:
    model.loss(batch, OBJECTIVE, LossSums(loss_names(1))).backward()
    return [weight.grad for weight in model.parameters() if weight.grad is not None]


def run_stage(model: Transformer, batch: MicroBatch, store: GradientStore, seen: Callable[[str], None]) -> None:
    """Runs the whole model as one stage: forward, backward and weights, phase by phase."""
    stage = Stage(model, range(model.config.num_layers), first=True, last=True)
    run = stage.start(batch, OBJECTIVE, LossSums(loss_names(1)), store)
    run_phases(run, stage, backward=False)
    seen("forward")
    run_phases(run, stage, backward=True)
    seen("backward")
    run_weights(run, stage)
    seen("weights")


def phased_gradients(model: Transformer, batch: MicroBatch) -> list[Tensor]:
    store = GradientStore(model.parameters())
    run_stage(model, batch, store, lambda moment: None)
    return [store.gradient(weight) for weight in model.parameters()]


@pytest.mark.parametrize("gradients", [eager_gradients, phased_gradients])
def test_recomputation_changes_no_bit_of_the_gradients(
    gradients: Callable[[Transformer, MicroBatch], list[Tensor]],
) -> None:
    batch = make_batch(is_packed=gradients is phased_gradients)
    expected = gradients(make_model(frozenset()), batch)
    assert len(expected) > 40
    for recomputed in SUBSETS[1:]:
        for made, plainly in zip(gradients(make_model(recomputed), batch), expected, strict=True):
            assert torch.equal(made, plainly), recomputed


def saved_bytes(recomputed: frozenset[Recomputed]) -> int:
    model, batch = make_model(recomputed), make_batch(64)
    with saved_memory() as saved:
        model.loss(batch, OBJECTIVE, LossSums(loss_names(1)))
    return saved.num_bytes


def test_each_kind_of_recomputation_saves_memory() -> None:
    """Each saves at least the size of the largest tensor that is no longer kept, in each of three layers."""
    rows, heads = 2 * 64, CONFIG.num_heads
    least = {
        "norm": 3 * 4 * rows * (CONFIG.kv_lora_rank + CONFIG.q_lora_rank),  # type: ignore[operator]
        "mla_up": 3 * 4 * rows * heads * (2 * CONFIG.qk_head_dim + CONFIG.v_head_dim),
        "swiglu": 3 * 4 * rows * CONFIG.expert_intermediate_size,
    }
    found = {recomputed: saved_bytes(recomputed) for recomputed in SUBSETS}
    for recomputed, size in found.items():
        for name in RECOMPUTED:
            if name not in recomputed:
                assert found[recomputed | {name}] <= size - least[name], (name, recomputed)


@pytest.mark.slow
@pytest.mark.usefixtures("_garbage_collection_disabled")
@pytest.mark.parametrize(
    ("recomputed", "dtype", "products"),
    [
        (SUBSETS[0], torch.float32, "own"),
        (SUBSETS[-1], torch.bfloat16, "fp8"),
        *exhaustive((SUBSETS[-1], torch.bfloat16, "own")),
    ],
)
def test_nothing_stays_of_a_pass_that_is_done_or_given_up(
    recomputed: frozenset[Recomputed], dtype: torch.dtype, products: Products
) -> None:
    """A pass through all phases, one under ordinary autograd and one that ends after its forward leave gradients."""
    model, batch = make_model(recomputed, dtype, products), make_batch()
    store = GradientStore(model.parameters())
    with LiveMemory():  # what torch and the model make once and keep is made here, also what the mode itself loads
        run_stage(model, batch, store, lambda moment: None)
    gc.collect()
    kept: dict[str, int] = {}
    with LiveMemory() as memory:
        run_stage(model, batch, store, lambda moment: kept.update({moment: memory.live_bytes()}))
    assert memory.num_made > 400
    assert kept["forward"] > 0
    assert [storage.nbytes() for storage in memory.live()] == []
    assert all(weight.grad is None for weight in model.parameters())
    other = make_model(recomputed, dtype, products)
    other.loss(batch, OBJECTIVE, LossSums(loss_names(1)))
    with LiveMemory() as memory:
        other.loss(batch, OBJECTIVE, LossSums(loss_names(1))).backward()
    for weight in other.parameters():
        weight.grad = None
    assert [storage.nbytes() for storage in memory.live()] == []
    with LiveMemory() as memory:
        other.loss(batch, OBJECTIVE, LossSums(loss_names(1)))
    assert [storage.nbytes() for storage in memory.live()] == []


@dataclass(frozen=True, slots=True)
class PairGradients(Gradients):
    left: Tensor | None
    right: Tensor | None


@dataclass(frozen=True, slots=True)
class Pair:
    left: Tensor
    right: Tensor
    gradients: ClassVar[type[Gradients]] = PairGradients

    def tensors(self) -> tuple[Tensor, ...]:
        return self.left, self.right

    def with_tensors(self, tensors: Iterable[Tensor]) -> "Pair":
        return Pair(*tensors)


@pytest.mark.usefixtures("_garbage_collection_disabled")
def test_a_phase_keeps_no_input_that_its_backward_does_not_read() -> None:
    store = GradientStore([])
    read, unread = torch.randn(3, 4), torch.randn(3, 4)
    phase: ComputePhase[Pair, Hidden] = ComputePhase(
        lambda pair, sink: Computed(Hidden(pair.left.square() + pair.right)), store
    )
    with LiveMemory() as memory:
        given = read.clone(), unread.clone()
        out = phase.forward(Pair(*given))
        expected_in = [given[0].untyped_storage().nbytes()]
        del given, out
        alive = memory.live()
        assert [storage.nbytes() for storage in alive if storage.nbytes() > 4] == expected_in
        del alive
    left, right = phase.backward(HiddenGradients(torch.ones(3, 4))).tensors()
    assert left is not None
    assert right is not None
    torch.testing.assert_close(left, 2 * read)
    torch.testing.assert_close(right, torch.ones(3, 4))


def phases_of(model: Transformer, layer: int) -> list[Phase]:
    store = GradientStore(model.parameters())
    balance = BalanceLoss(1.0, LossSums(loss_names(1)))
    return block_phases(model.block(layer), model.dispatcher, store, balance, Label(layer, 0, 0))


@pytest.mark.usefixtures("_garbage_collection_disabled")
def test_sent_rows_are_freed_after_shared_experts_have_read_them() -> None:
    """The residual is kept, from which a backward recomputes the norm; the norm, which was sent, is not kept."""
    model = make_model(SUBSETS[-1])
    phases = phases_of(model, 1)
    hidden = torch.randn(2, 16, CONFIG.hidden_size)
    attend, dispatch, experts = phases[:3]
    assert isinstance(attend, ComputePhase)
    assert isinstance(dispatch, DispatchPhase)
    assert isinstance(experts, ComputePhase)
    other = phases_of(model, 1)[0]
    assert isinstance(other, ComputePhase)
    other.forward(Hidden(hidden))
    routed = attend.forward(Hidden(hidden))
    rows = torch.multiprocessing.reductions.StorageWeakRef(routed.rows.values.untyped_storage())
    received = dispatch.forward(routed).wait()
    del routed
    assert not rows.expired()
    made = experts.forward(received)
    del received
    assert rows.expired()
    assert isinstance(made, ExpertOutput)


def test_a_phase_whose_output_gets_no_gradient_gives_none() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    store = GradientStore([weight])
    phase: ComputePhase[Pair, Pair] = ComputePhase(
        lambda pair, sink: Computed(Pair(pair.left * weight, pair.right * 2)), store
    )
    phase.forward(Pair(torch.ones(4), torch.ones(4)))
    first, second = phase.backward(PairGradients(torch.full((4,), 3.0), None)).tensors()
    assert first is not None
    assert second is None
    phase.weight()
    assert torch.equal(store.gradient(weight), torch.full((4,), 3.0))


@pytest.fixture
def link() -> Iterator[ThreadHostCopies]:
    with ThreadHostCopies() as copies:
        yield copies


def start(model: Transformer, batch: MicroBatch, store: GradientStore, link: ThreadHostCopies | None) -> StageRun:
    stage = Stage(model, range(CONFIG.num_layers), first=True, last=True)
    return stage.start(batch, OBJECTIVE, LossSums(loss_names(1)), store, link=link)


def run(model: Transformer, micro_batch: StageRun, order: Sequence[str]) -> None:
    lanes = Stage(model, range(CONFIG.num_layers), first=True, last=True).lanes
    phases = list(enumerate(lanes))
    for part in order:
        if part in ("forward", "backward"):
            for phase, lane in phases if part == "forward" else reversed(phases):
                getattr(micro_batch, part)(phase)
                if lane == "comm":
                    micro_batch.wait()
        elif part == "weight":
            for phase, lane in phases:
                if lane == "compute":
                    micro_batch.weight(phase)
        else:
            getattr(micro_batch, part)()


def gradients(model: Transformer, batches: Sequence[MicroBatch], link: ThreadHostCopies | None) -> list[Tensor]:
    """Returns the gradients of two micro-batches, both of which are away at the same time if there is a link."""
    store = GradientStore(model.parameters())
    runs = [start(model, batch, store, link) for batch in batches]
    for each in runs:
        run(model, each, ["forward"] if link is None else ["forward", "offload", "release"])
    for each in runs:
        run(model, each, ["backward", "weight"] if link is None else ["reload", "restore", "backward", "weight"])
    return store.gradients()


@pytest.mark.parametrize(("recomputed", "is_packed"), [(SUBSETS[0], False), (SUBSETS[-1], True)])
def test_offload_changes_no_bit_of_the_gradients(
    recomputed: frozenset[Recomputed], is_packed: bool, link: ThreadHostCopies
) -> None:
    batches = [make_batch(64, is_packed), make_batch(48, is_packed)]
    expected = gradients(make_model(recomputed), batches, None)
    assert any(gradient.any() for gradient in expected)
    for made, plainly in zip(gradients(make_model(recomputed), batches, link), expected, strict=True):
        assert torch.equal(made, plainly)


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [SUBSETS[0], SUBSETS[-1]])
def test_release_frees_nearly_all_that_a_forward_keeps(
    recomputed: frozenset[Recomputed], link: ThreadHostCopies
) -> None:
    """Only indices, scalars and one number per row stay. The worker's host copies are not counted."""
    model, batch = make_model(recomputed), make_batch(128, is_packed=True)
    store = GradientStore(model.parameters())
    run(model, start(model, batch, store, None), ["forward"])  # makes rotations and masks
    gc.collect()
    with LiveMemory() as memory:
        micro_batch = start(model, batch, store, link)
        run(model, micro_batch, ["forward"])
        kept = memory.live_bytes()
        run(model, micro_batch, ["offload"])
        assert memory.live_bytes() == kept
        run(model, micro_batch, ["release"])
        assert memory.live_bytes() < 0.05 * kept, [storage.nbytes() for storage in memory.live()[:10]]
        run(model, micro_batch, ["reload"])
        assert memory.live_bytes() == kept
        run(model, micro_batch, ["restore", "backward", "weight"])
        del micro_batch
        gc.collect()
        assert memory.live_bytes() == 0


def test_two_micro_batches_keep_no_memory_in_common() -> None:
    """What a micro-batch moves would be missing in another: weights, tables of rotations, masks, quantized weights."""
    model = make_model(SUBSETS[0])
    store = GradientStore(model.parameters())
    found = []
    for batch in (make_batch(64), make_batch(64, is_packed=True)):
        micro_batch = start(model, batch, store, None)
        run(model, micro_batch, ["forward"])
        stage = Stage(model, range(CONFIG.num_layers), first=True, last=True)
        kept = [each for phase in micro_batch._phases if isinstance(phase, ComputePhase) for each in phase.kept()]
        found.append((micro_batch, movable_storages(kept, stage._shared(batch))))
    first, second = ({storage.data_ptr() for storage in storages} for _, storages in found)
    assert len(first) > 20
    assert not first & second
