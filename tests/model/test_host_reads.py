"""The model itself never waits for its device: the one host read of a layer is the dispatcher's."""

import torch

from model.gradients import GradientStore
from model.objective import LossSums, loss_names
from model.stage import Stage
from tests.host_reads import Reads
from tests.model.test_stage import make_batch, make_model, make_objective
from tests.tiny import MODEL


def test_computations_of_a_step_read_nothing_from_the_device() -> None:
    model, reads = make_model(MODEL), Reads()
    stage, store = Stage(model, range(MODEL.num_layers), first=True, last=True), GradientStore(model.parameters())
    run = stage.start(make_batch(MODEL, 3), make_objective(MODEL), LossSums(loss_names(MODEL.mtp_depth)), store)

    def computed(phase: int, lane: str, way: str) -> None:
        if lane == "compute":
            with reads:
                getattr(run, way)(phase)
        else:
            getattr(run, way)(phase)
            run.wait()

    lanes = list(enumerate(stage.lanes))
    for phase, lane in lanes:
        computed(phase, lane, "forward")
    for phase, lane in reversed(lanes):
        computed(phase, lane, "backward")
    for phase, lane in lanes:
        if lane == "compute":
            computed(phase, lane, "weight")
    assert reads.num_seen > 1000
    assert reads.found == []


def test_a_read_is_found() -> None:
    with Reads() as reads:
        torch.bincount(torch.tensor([1, 2]))
        float(torch.ones(1))
    assert reads.found == ["bincount", "_local_scalar_dense"]
