"""Offload changes no bit, frees the device's memory, and moves nothing that is shared."""

import gc
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from comm.host_copies import ThreadHostCopies
from model.config import RECOMPUTED, Recomputed
from model.gradients import GradientStore
from model.objective import LossSums, MicroBatch, loss_names
from model.offload import movable_storages
from model.phases.compute import ComputePhase
from model.stage import Stage, StageRun
from model.transformer import Transformer
from tests.model.live_memory import LiveMemory
from tests.model.test_phases import CONFIG, OBJECTIVE, make_batch, make_model

RECOMPUTATIONS: list[frozenset[Recomputed]] = [frozenset(), frozenset({"mla_up"}), frozenset(RECOMPUTED)]


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


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("recomputed", RECOMPUTATIONS)
def test_offload_changes_no_bit_of_the_gradients(
    recomputed: frozenset[Recomputed], is_packed: bool, link: ThreadHostCopies
) -> None:
    batches = [make_batch(64, is_packed), make_batch(48, is_packed)]
    expected = gradients(make_model(recomputed), batches, None)
    assert any(gradient.any() for gradient in expected)
    for made, plainly in zip(gradients(make_model(recomputed), batches, link), expected, strict=True):
        assert torch.equal(made, plainly)


@pytest.mark.parametrize("recomputed", RECOMPUTATIONS)
def test_release_frees_nearly_all_that_a_forward_keeps(
    recomputed: frozenset[Recomputed], link: ThreadHostCopies
) -> None:
    """Only indices, scalars and one number per row stay. The worker's host copies are not counted."""
    model, batch = make_model(recomputed), make_batch(256, is_packed=True)
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


@pytest.mark.parametrize("recomputed", RECOMPUTATIONS)
def test_two_micro_batches_keep_no_memory_in_common(recomputed: frozenset[Recomputed]) -> None:
    """What a micro-batch moves would be missing in another: weights, tables of rotations, masks, quantized weights."""
    model = make_model(recomputed)
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
