"""Stages against the plain model, also with another form of attention, and no wait for the device."""

from dataclasses import replace

import pytest
import torch

from comm.dispatch.local import LocalDispatcher
from kernels.attention.documents import Documents
from model.config import ModelConfig, cut_layers
from model.linear import GradientStore
from model.objective import CrossEntropy, LossSums, MicroBatch, Objective, loss_names
from model.stage import Stage, StageRun
from model.transformer import Transformer, initialize_weights, routers, whole
from tests.host_reads import Reads
from tests.tiny import MODEL


def make_model(config: ModelConfig, seed: int = 0) -> Transformer:
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.float64, whole(config))
    initialize_weights(model, seed)
    generator = torch.Generator().manual_seed(11)
    for router in routers(model).values():
        router.e_score_correction_bias.copy_(torch.randn(config.num_routed_experts, generator=generator) * 0.1)
    return model


def make_batch(config: ModelConfig, seed: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (2, 12 + config.mtp_depth + 1), generator=generator)
    targets = [tokens[:, depth + 1 : depth + 13].clone() for depth in range(config.mtp_depth + 1)]
    for target in targets:
        target[torch.rand(target.shape, generator=generator) < 0.2] = -100
    inputs = tuple(tokens[:, depth : depth + 12] for depth in range(config.mtp_depth + 1))
    return MicroBatch(inputs_BT=inputs, targets_BT=tuple(targets))


def make_objective(config: ModelConfig) -> CrossEntropy:
    return CrossEntropy(factors=tuple(0.1 / (depth + 1) for depth in range(config.mtp_depth + 1)), balance=0.05)


def run_phases(run: StageRun, stage: Stage, backward: bool) -> None:
    phases = list(enumerate(stage.lanes))
    for phase, lane in reversed(phases) if backward else phases:
        (run.backward if backward else run.forward)(phase)
        if lane == "comm":
            run.wait()


def run_weights(run: StageRun, stage: Stage) -> None:
    for phase, lane in enumerate(stage.lanes):
        if lane == "compute":
            run.weight(phase)


def phased(
    model: Transformer,
    num_stages: int,
    batch: MicroBatch,
    store: GradientStore | None,
    objective: Objective | None = None,
) -> LossSums:
    config, objective = model.config, objective or make_objective(model.config)
    sums = LossSums(loss_names(config.mtp_depth))
    cut = cut_layers(config.num_layers, num_stages, config.mtp_depth)
    last = num_stages - 1
    stages = [Stage(model, layers, first=index == 0, last=index == last) for index, layers in enumerate(cut)]
    # Those in the middle need the batch for its documents alone.
    given = [batch if index in (0, last) or batch.documents is not None else None for index in range(num_stages)]
    runs = [stage.start(each, objective, sums, store) for each, stage in zip(given, stages, strict=True)]
    for index, (run, stage) in enumerate(zip(runs, stages, strict=True)):
        if index:
            run.set_input(runs[index - 1].output())
        run_phases(run, stage, backward=False)
    if store is None:
        return sums
    for index in range(last, -1, -1):
        if index < last:
            runs[index].set_output_gradient(runs[index + 1].input_gradient())
        run_phases(runs[index], stages[index], backward=True)
    for run, stage in zip(runs, stages, strict=True):
        run_weights(run, stage)
    return sums


CONFIGS = [
    MODEL,
    replace(MODEL, mtp_depth=2, mtp_hidden="pre_norm", q_lora_rank=None),
    replace(MODEL, mtp_depth=0, num_shared_experts=0, num_dense_layers=0),
]


@pytest.mark.covering(1)
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("config", CONFIGS)
def test_phased_equals_plain(config: ModelConfig, num_stages: int, is_packed: bool) -> None:
    documents = Documents.from_positions(torch.arange(12).remainder(5).expand(2, 12)) if is_packed else None
    plain, cut = make_model(config), make_model(config)
    store = GradientStore(cut.parameters())
    plain_sums = LossSums(loss_names(config.mtp_depth))
    made = torch.zeros(config.mtp_depth + 2, dtype=torch.float64)
    for seed in range(2):
        batch = replace(make_batch(config, seed), documents=documents)
        plain.loss(batch, make_objective(config), plain_sums).backward()
        made = made + phased(cut, num_stages, batch, store).settle()
    expected = plain_sums.settle()
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=0)
    ours = dict(cut.named_parameters())
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(store.gradient(ours[name]), parameter.grad, rtol=1e-10, atol=1e-14, msg=name)
    for layer, router in routers(plain).items():
        assert torch.equal(router.load, routers(cut)[layer].load)


def test_forward_only_gives_the_same_losses_and_keeps_no_gradient() -> None:
    model = make_model(MODEL)
    batch = make_batch(MODEL, 5)
    expected = LossSums(loss_names(1))
    with torch.no_grad():
        model.loss(batch, make_objective(MODEL), expected)
    made = phased(model, 2, batch, None)
    assert torch.equal(made.settle(), expected.settle())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    config = MODEL
    full = make_model(config, seed=5)
    part = whole(config)
    half = Transformer(
        config,
        LocalDispatcher(config.num_routed_experts),
        torch.float64,
        replace(part, layers=(2, 3), experts=range(4, 8), embedding=False, head=False),
    )
    initialize_weights(half, 5)
    ours, theirs = dict(half.named_parameters()), dict(full.named_parameters())
    for name, parameter in ours.items():
        expected = theirs[name]
        if ".mlp.experts." in name:
            expected = expected[4:8]  # type: ignore[assignment]
        assert torch.equal(parameter, expected), name
    other = make_model(config, seed=6)
    assert not torch.equal(other.head_weight, full.head_weight)


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
