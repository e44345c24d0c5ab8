"""Many ranks equal one: shared, sliced and masked sequences, growing batches, and forward-only passes."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from comm.balance.rows import Ints, RowPlan, plan_rows
from comm.config import AllToAllDispatchConfig, BalancedDispatchConfig, Cut, ParallelismConfig, TwoHopDispatchConfig
from comm.dispatch import build
from comm.dispatch.local import LocalDispatcher
from data.config import BatchRamp
from dualpipe.builder import build_schedule
from dualpipe.ir import ScheduleError
from dualpipe.registry import ScheduleConfig
from model.config import Recomputed
from model.objective import CrossEntropy, LossSums, loss_names
from model.transformer import Transformer, initialize_weights
from tests.covering import exhaustive
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL, tiny_config
from tests.train.job import Job, close_job, open_job, open_loader, run_jobs, run_plain, score_pass, task_of
from tests.train.test_command import read_metrics, run_train
from tests.train.test_equality import assert_equal_one_rank, assert_none, assert_same, assert_zero1_equal, zero1
from train.config import TokenSchedule, TrainConfig
from train.core.learner import LearnersByBatchSize
from train.core.replica import BatchReader
from train.core.step import rates_of
from train.listeners.validation import validate_pass
from train.predict.timing import nominal_costs
from train.tasks.next_token import to_micro_batch
from verify.steps import StepValues, tensor_differences

STEPS = 2


def shared_config(
    folder: Path,
    pipeline: int,
    data: int,
    context: int,
    expert: int,
    *,
    document_mask: bool = True,
    depth: int = 2,
) -> TrainConfig:
    """A run whose sequences hold several uneven documents and padding. Segments of 16 or 8 tokens."""
    kind: Literal["1f1b", "dualpipe"] = "1f1b" if pipeline == 1 else "dualpipe"
    mesh = ParallelismConfig(pipeline=pipeline, data=data, expert=expert, cut=Cut("even"), context=context)
    config = tiny_config(
        folder, parallelism=mesh, schedule=ScheduleConfig(kind=kind, chunks=None, pairing="overlapped")
    )
    sequences = max(2, 2 * pipeline) * data
    return replace(
        config,
        batch=replace(config.batch, document_mask=document_mask, sequence_length_tokens=64, global_sequences=sequences),
        model=replace(config.model, num_layers=max(3, pipeline), mtp_depth=depth),
    )


def score(rank: int, world_size: int, config: TrainConfig) -> tuple[float, Tensor]:
    """Returns loss and log-probabilities of the first step's batch under the initial weights."""
    learner, loader = open_job(config), open_loader(config)
    losses, log_probs_BT = score_pass(learner, config, loader)
    close_job(learner)
    return losses.main, log_probs_BT


def train_and_score(rank: int, world_size: int, config: TrainConfig) -> tuple[list[StepValues], float, Tensor]:
    """Returns the results of each step, and loss and log-probabilities of the initial weights."""
    (seen,) = run_jobs(rank, world_size, [Job(config=config, starved=1)], STEPS)
    return seen, *score(rank, world_size, config)


def check_scores(config: TrainConfig, plain: TrainConfig, alone: TrainConfig) -> None:
    """Trains and scores on all ranks as on one."""
    results = run_ranks(config.parallelism.world_size, train_and_score, config)
    assert_equal_one_rank([seen for seen, _, _ in results], plain, 1)
    ((loss, log_probs),) = run_ranks(1, score, alone)
    for _, score_loss, scores in results:
        assert score_loss == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(scores, log_probs, rtol=1e-10, atol=1e-12)


def alone(config: TrainConfig) -> TrainConfig:
    """The same run on one rank."""
    mesh = ParallelismConfig(pipeline=1, data=1, expert=1)
    return replace(config, parallelism=mesh, schedule=replace(config.schedule, kind="1f1b"))


@pytest.mark.parametrize(
    ("pipeline", "data", "context", "expert", "document_mask"),
    [
        pytest.param(2, 1, 2, 2, True, marks=pytest.mark.slow),
        pytest.param(1, 1, 4, 2, False, marks=pytest.mark.long),
        pytest.param(1, 2, 2, 4, True, marks=pytest.mark.long),
        *exhaustive((1, 1, 2, 2, True), (1, 1, 2, 1, False), (2, 2, 2, 4, True), (2, 1, 4, 2, False)),
    ],
)
def test_ranks_that_share_sequences_equal_one_rank(
    folder: Path, pipeline: int, data: int, context: int, expert: int, document_mask: bool
) -> None:
    config = shared_config(folder, pipeline, data, context, expert, document_mask=document_mask)
    positions = open_loader(config).batch(0, 0, config.batch.global_sequences).positions_BT
    assert ((positions == 0).sum(1) > 1).any(), "no sequence holds several documents"
    assert (positions < 0).any(), "no sequence has padding"
    check_scores(config, config, alone(config))


@pytest.mark.long
def test_zero1_shards_over_ranks_that_share_sequences(folder: Path) -> None:
    config = zero1(shared_config(folder, 2, 1, 2, 1, depth=1))
    assert_zero1_equal(run_ranks(4, run_jobs, [Job(config=config, starved=1)], STEPS), config)


ALL_TO_ALL = AllToAllDispatchConfig(kind="all_to_all", payload="full", max_nodes=4, node_cap="verify", balance="node")
TWO_HOP = TwoHopDispatchConfig(
    kind="two_hop", payload="full", max_nodes=4, node_cap="verify", balance="node", chunks=2, partial_sums="rows"
)


def train_counted(rank: int, world_size: int, jobs: list[Job]) -> tuple[list[list[StepValues]], list[int]]:
    """Returns the results of a step of each job, and how many copies all plans had in a node and across nodes."""
    copies = [0, 0]

    def counted(counts_RE: Ints, nodes: list[int], **keys: Any) -> RowPlan:
        plan = plan_rows(counts_RE, nodes, **keys)
        num_local = counts_RE.shape[1] // len(nodes)
        for place, slot in np.argwhere(plan.rows_RSR.any(2)):
            home = plan.slot_expert_RS[place][slot] // num_local
            copies[nodes[home] != nodes[place]] += 1
        return plan

    with patch.object(build, "plan_rows", counted):
        return run_jobs(rank, world_size, jobs, 1), copies


def check_copies(config: TrainConfig, dispatch: BalancedDispatchConfig) -> None:
    """Trains with and without copies of experts: each rank's gradients are equal to 1e-12."""
    # Copies of narrow experts on other nodes pay even for few rows.
    config = replace(config, model=replace(config.model, expert_intermediate_size=2))
    each = (dispatch, dispatch.without_copies())
    jobs = [Job(config=replace(config, dispatch=one), starved=1) for one in each]
    for rank, (steps, copies) in enumerate(run_ranks(config.parallelism.world_size, train_counted, jobs)):
        assert [number > 0 for number in copies] == [True, dispatch.balance == "exact"], copies
        for one, other in zip(*steps, strict=True):
            assert one.losses == pytest.approx(other.losses, rel=1e-12)
            assert_none(f"rank {rank}", tensor_differences("gradient", one.gradients, other.gradients, 1e-12))


def sliced_config(
    folder: Path, sizes: tuple[int, int, int], kind: str, slices: int, *, document_mask: bool
) -> TrainConfig:
    """A run whose sequences hold several uneven documents and padding, on pipeline x data x context ranks."""
    pipeline, data, context = sizes
    mesh = ParallelismConfig(pipeline=pipeline, data=data, context=context, expert=data * context, cut=Cut("even"))
    schedule = ScheduleConfig(
        kind=kind,
        chunks=2 if kind == "dualpipe_interleaved" else None,
        pairing="overlapped",
        slices=slices,
        slice_by="length" if slices == 2 else "work",
        link_depth=2,
    )
    config = tiny_config(folder, parallelism=mesh, schedule=schedule, dispatch=ALL_TO_ALL)
    batch = replace(
        config.batch,
        document_mask=document_mask,
        sequence_length_tokens=61 if context == 1 else 64,
        global_sequences=(3 if pipeline < 3 else 6) * data,
    )
    return replace(config, batch=batch, model=replace(config.model, num_layers=max(4, pipeline), mtp_depth=2))


@pytest.mark.slow
def test_slices_that_a_memory_cap_offloads_equal_those_that_stay(folder: Path) -> None:
    config = sliced_config(folder, (2, 1, 1), "dualpipe_split", 2, document_mask=False)
    away = replace(config, costs=replace(config.costs, offload=0.2), memory_cap=2.0)
    # The ranks of both runs follow one order, so that only the copies differ.
    schedule = build_schedule("dualpipe_split", 2, 6, nominal_costs(away, "dualpipe_split"), away.memory_cap)
    assert schedule.has_offload
    assert schedule.slices == 2
    operations = [[group for group in groups if not group[0].kind.is_copy] for groups in schedule.ranks]
    staying = replace(schedule, ranks=tuple(map(tuple, operations)))
    jobs = [Job(config=away, schedule=staying), Job(config=away, schedule=schedule)]
    for rank in run_ranks(2, run_jobs, jobs, STEPS):
        assert_same(rank[0], rank[1])


def whole(config: TrainConfig) -> TrainConfig:
    """The same run on one rank, with whole sequences."""
    mesh = ParallelismConfig(pipeline=1, data=1, expert=1)
    return replace(config, parallelism=mesh, schedule=ScheduleConfig(kind="1f1b", chunks=None, pairing="sequential"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "kind", "slices", "document_mask", "recompute"),
    [
        ((2, 1, 1), "dualpipe_split", 3, True, ("layer",)),
        ((1, 1, 2), "1f1b", 2, True, ()),
        pytest.param((2, 1, 2), "dualpipe_interleaved", 2, False, ("norm", "mla_up"), marks=pytest.mark.long),
        *exhaustive(
            ((1, 1, 1), "1f1b", 3, True, ()),
            ((2, 1, 1), "1f1b", 4, False, ("layer",)),
            ((1, 2, 2), "1f1b", 3, False, ("layer",)),
            ((2, 2, 1), "dualpipe_interleaved", 5, True, ("norm",)),
            ((4, 1, 1), "dualpipe_split", 2, True, ()),
            ((2, 1, 4), "dualpipe_split", 3, True, ("layer",)),
        ),
    ],
)
def test_sequences_in_slices_equal_whole_ones(
    folder: Path,
    sizes: tuple[int, int, int],
    kind: str,
    slices: int,
    document_mask: bool,
    recompute: tuple[Recomputed, ...],
) -> None:
    config = replace(sliced_config(folder, sizes, kind, slices, document_mask=document_mask), recompute=recompute)
    check_scores(config, whole(config), whole(config))


@pytest.mark.parametrize(
    ("sizes", "kind", "dispatch"),
    [
        pytest.param((1, 1, 4), "1f1b", replace(TWO_HOP, balance="exact"), marks=pytest.mark.slow),
        pytest.param((1, 1, 4), "1f1b", replace(ALL_TO_ALL, balance="exact"), marks=pytest.mark.long),
        *exhaustive(
            ((1, 1, 4), "1f1b", TWO_HOP),
            ((1, 1, 4), "1f1b", ALL_TO_ALL),
            ((2, 1, 4), "dualpipe_split", replace(TWO_HOP, balance="exact")),
            ((2, 1, 4), "dualpipe_interleaved", ALL_TO_ALL),
        ),
    ],
)
def test_slices_with_copies_of_experts_equal_those_without(
    folder: Path, sizes: tuple[int, int, int], kind: str, dispatch: BalancedDispatchConfig
) -> None:
    """Also with two MTP modules and recomputed layers."""
    config = sliced_config(folder, sizes, kind, 2, document_mask=True)
    check_copies(replace(config, recompute=("layer",)), dispatch)


def train_and_validate(rank: int, world_size: int, config: TrainConfig) -> tuple[list[list[StepValues]], float]:
    """Returns the results of each step on this rank, and the validation loss of the initial weights."""
    learner, loader = open_job(config), open_loader(config)
    losses, _ = validate_pass(learner.replica, config.task, lambda first, count: loader.batch(0, first, count))
    batches = BatchReader(learner.replica, task_of(config), lambda first, count: loader.batch(0, first, count))
    batch = batches(0, 0)
    assert batch is not None
    assert batch.documents is not None
    assert batches(0, 0) is batch
    close_job(learner)
    return run_jobs(rank, world_size, [Job(config=config)], STEPS), losses.main


@torch.no_grad()
def plain_validation(config: TrainConfig) -> float:
    """Mean nats of the first step's batch in the whole model, one sequence after the other."""
    model = Transformer(config.model, LocalDispatcher(config.model.num_routed_experts), torch.float64)
    initialize_weights(model, config.seed)
    depth, loader, num_targets = config.model.mtp_depth, open_loader(config), 0
    sums, objective = LossSums(loss_names(depth)), CrossEntropy(factors=(0.0,) * (depth + 1), balance=0.0)
    for first in range(config.batch.global_sequences):
        read = loader.batch(0, first, 1)
        batch = to_micro_batch(read, depth, torch.device("cpu"), masks_documents=config.batch.document_mask)
        model.loss(batch, objective, sums)
        num_targets += int((batch.targets_BT[0] >= 0).sum())
    return float(sums.settle()[0]) / num_targets


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "pipeline", "depth"), [("1f1b", 3, 1), *exhaustive(("1f1b", 3, 0), ("dualpipe", 4, 1))]
)
def test_many_ranks_with_masked_documents_equal_one_rank(
    folder: Path, kind: Literal["1f1b", "dualpipe"], pipeline: int, depth: int
) -> None:
    config = tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=pipeline, data=1, expert=1),
        schedule=ScheduleConfig(kind=kind, chunks=None, pairing="overlapped"),
        batch=replace(BATCH, document_mask=True, sequence_length_tokens=64, global_sequences=8),
        model=replace(MODEL, num_layers=max(3, pipeline), mtp_depth=depth),
    )
    positions = open_loader(config).batch(0, 0, 8).positions_BT
    assert ((positions == 0).sum(1) > 1).any(), "no sequence holds several documents, so the test has no effect"
    results = run_ranks(pipeline, train_and_validate, config)
    assert_equal_one_rank([seen for (seen,), _ in results], config)
    expected = plain_validation(config)
    assert [validation for _, validation in results] == pytest.approx([expected] * pipeline, rel=1e-12)
    unmasked = replace(config, batch=replace(config.batch, document_mask=False))
    assert abs(plain_validation(unmasked) - expected) > 1e-6


MTP_WEIGHT = TokenSchedule.from_plain([{"from_tokens": 0, "value": 0.3}, {"from_tokens": 200, "value": 0.1}])

BIAS_RATE = TokenSchedule.from_plain([{"from_tokens": 0, "value": 0.05}, {"from_tokens": 200, "value": 0}])

SAME = ("step", "tokens", "loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm", "max_violation", "lr",
        "mtp_loss_weight", "bias_update_rate")  # fmt: skip

RAMP = BatchRamp(start_sequences=4, end_tokens=2 * 4 * 24, num_sizes=3)  # 4, 8, then 12 sequences of 24 tokens


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dualpipe_v", *exhaustive("dualpipe")])
def test_ramp_on_many_ranks_equals_a_plain_model(folder: Path, kind: str) -> None:
    plain = tiny_config(folder, batch=replace(BATCH, global_sequences=12, ramp=RAMP))
    plain = replace(plain, task=replace(plain.task, mtp_loss_weight=MTP_WEIGHT, bias_update_rate=BIAS_RATE))
    assert [plain.batch_sizes.sequences(step) for step in range(3)] == [4, 8, 12]
    rates = [rates_of(plain.task, plain.optim, plain.batch_sizes, step) for step in range(3)]
    assert [rate.mtp_loss_weight for rate in rates] == [0.3, 0.3, 0.1]
    assert [rate.bias_update for rate in rates] == [0.05, 0.05, 0]
    spread = replace(
        plain,
        parallelism=ParallelismConfig(pipeline=2, data=2, expert=2),
        schedule=ScheduleConfig(kind=kind, chunks=None, pairing="overlapped"),
    )
    expected = run_plain(plain, 0, 3)
    for (steps,) in run_ranks(4, run_jobs, [Job(config=spread)], 3):
        for seen, alone in zip(steps, expected, strict=True):
            assert seen.losses == pytest.approx(alone.losses, rel=1e-10)
            assert seen.norm == pytest.approx(alone.norm, rel=1e-10)
            for name, weight in seen.weights.items():
                assert torch.allclose(weight, alone.weights[name].to(weight.dtype), rtol=1e-10, atol=1e-12), name


@pytest.mark.slow
def test_ramp_in_fp8_resumed_across_changes_of_size_equals_uninterrupted_bitwise(folder: Path) -> None:
    """First and last stage are on different ranks, so each has a shard of the embedding."""
    # Of 32 tokens: steps 1 and 2 read 4 sequences, 3 and 4 read 6, later ones 8.
    choices = (
        *("batch.ramp={start_sequences:4,end_tokens:600,num_sizes:3}", "samples.prompt=", "validation.every_steps=5"),
        *(
            "precision=fp8",
            "schedule=1f1b",
            "parallelism=two_ranks",
            "task.steps=5",
            "optim=adamw_v3",
            "optim.learning_rate=1e-2",
        ),
        *("optim.schedule.warmup=1 steps", "optim.schedule.decay_start=400 tokens"),
        *("optim.schedule.decay_end=1000 tokens", "optim.schedule.last_start=1200 tokens"),
        "task.mtp_loss_weight=[{from_tokens:0,value:0.3},{from_tokens:500,value:0.1}]",
        "task.bias_update_rate=[{from_tokens:0,value:1e-2},{from_tokens:300,value:0}]",
    )
    checkpoint = folder / "uninterrupted" / "checkpoints" / "step-00000002"
    for name, more in (("uninterrupted", "checkpointing.every_steps=2"), ("resumed", f"resume={checkpoint}")):
        done = run_train(folder, name, *choices, more)
        assert done.returncode == 0, done.stderr
    uninterrupted, resumed = (read_metrics(folder, name) for name in ("uninterrupted", "resumed"))
    assert [line["global_batch_sequences"] for line in uninterrupted] == [4, 4, 4, 6, 6]
    assert [line["mtp_loss_weight"] for line in uninterrupted] == [0.3, 0.3, 0.3, 0.3, 0.1]
    assert [line["bias_update_rate"] for line in uninterrupted] == [0.01, 0.01, 0.01, 0, 0]
    assert len({line["router"]["layer_1"]["bias_most"] for line in uninterrupted[2:]}) == 1  # type: ignore[index]
    assert [line["tokens"] for line in uninterrupted] == [128, 256, 384, 576, 768]
    for line, expected in zip(resumed, uninterrupted[2:], strict=True):
        for key in SAME:
            assert line[key] == expected[key], (key, line["step"])
    assert resumed[-1]["validation_loss"] == uninterrupted[-1]["validation_loss"]


def _misplaced(rank: int, world_size: int, config: TrainConfig) -> str:
    learner = open_job(config)
    try:
        LearnersByBatchSize(learner, config.batch_sizes, {4: build_schedule("zb_v", 1, 4)})
    except ScheduleError as error:
        return str(error)
    finally:
        close_job(learner)
    return ""


def test_ramp_whose_schedule_places_stages_on_other_ranks_is_refused(folder: Path) -> None:
    ramp = BatchRamp(start_sequences=4, end_tokens=1, num_sizes=2)
    config = tiny_config(folder, batch=replace(BATCH, ramp=ramp))
    (said,) = run_ranks(1, _misplaced, config)
    assert said.startswith("batch.ramp: every size must place its stages on the same ranks as 16 micro-batches do")


@torch.no_grad()
def plain_scores(config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the first step's batch by the plain model, and which of them are targets."""
    model = Transformer(config.model, LocalDispatcher(config.model.num_routed_experts), torch.float64)
    initialize_weights(model, config.seed)
    batch = open_loader(config).batch(0, 0, config.batch.global_sequences)
    targets_BT = batch.targets(1)
    logs_BT1 = model(batch.tokens_BT).log_softmax(-1).gather(2, targets_BT.clamp(min=0)[..., None])
    return logs_BT1[..., 0].masked_fill(targets_BT < 0, 0), targets_BT >= 0


@pytest.mark.slow
@pytest.mark.parametrize(("pipeline", "data"), [(2, 2), *exhaustive((1, 1), (4, 1))])
def test_scores_of_many_ranks_equal_those_of_the_plain_model(folder: Path, pipeline: int, data: int) -> None:
    config = tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=pipeline, data=data, expert=data),
        batch=replace(BATCH, global_sequences=8),
        schedule=ScheduleConfig(kind="1f1b" if pipeline == 1 else "dualpipe", chunks=None, pairing="overlapped"),
    )
    plain_BT, is_target_BT = plain_scores(config)
    for rank, (loss, log_probs_BT) in enumerate(run_ranks(pipeline * data, score, config)):
        torch.testing.assert_close(log_probs_BT, plain_BT, rtol=1e-10, atol=1e-12, msg=f"rank {rank}")
        assert loss == pytest.approx(float(-plain_BT.sum() / is_target_BT.sum()), rel=1e-10), f"rank {rank}"
