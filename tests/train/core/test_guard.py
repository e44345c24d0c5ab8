"""The guard: what it refuses, on which rank it was seen, and what becomes of a run whose batch it refused."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from comm.config import ParallelismConfig
from data.loader import Loader
from data.prepare import prepare
from data.shards.open import Prepared
from dualpipe.registry import ScheduleConfig
from model.linear import GradientStore
from model.transformer import named_tensors
from tests.ranks import run_ranks
from tests.tiny import BATCH, CHECKPOINTING, MODEL, OPTIM, TASK, tiny_config
from tests.train.job import close_job, open_job
from train.config import (
    GuardConfig,
    PrecisionConfig,
    RollBackGuardConfig,
    SkipGuardConfig,
    StopGuardConfig,
    TrainConfig,
)
from train.core.guard import LOSS, NORM, Guard, read_loss_and_norm
from train.core.learner import LearnersByBatchSize
from train.core.replica import StepBatch, TaskHook
from train.errors import RefusedStepError, StepRefusal, StoppedError
from train.files.json_lines import JsonLines, read_events
from train.files.run_files import StatusFile
from train.loop import TrainingLoop
from train.optim import staged
from train.optim.adamw import Slice
from train.records.reporter import Reporter

STOP = StopGuardConfig(kind="stop", spike_factor=0.0, spike_window_steps=4)
SKIP = SkipGuardConfig(kind="skip", spike_factor=20.0, spike_window_steps=3, max_consecutive=2)
ROLL_BACK = RollBackGuardConfig(kind="roll_back", spike_factor=20.0, spike_window_steps=3, max_consecutive=2)


def test_guard_refuses_values_that_are_not_finite() -> None:
    guard = Guard(STOP)
    assert guard.judge(LOSS, 2.5) == ""
    assert guard.judge(NORM, math.inf) == "gradient norm is inf"
    assert guard.judge(LOSS, math.nan) == "loss is nan"
    assert guard.judge(LOSS, -math.inf) == "loss is -inf"
    assert guard.values == {LOSS: -math.inf}


def test_guard_refuses_spikes_above_the_median_of_a_full_window() -> None:
    guard = Guard(replace(STOP, spike_factor=3.0))
    for loss, norm in ((2.0, 10.0), (2.0, 1.0), (3.0, 1.0)):
        assert guard.judge(LOSS, 100 * loss) == ""  # three steps are not four
        guard.accept(loss, norm)
    guard.accept(4.0, 2.0)
    assert guard.judge(LOSS, 7.5) == ""
    assert guard.judge(LOSS, 7.6) == "loss is 7.6, above 3 x its median of 4 steps, 2.5"
    assert guard.judge(LOSS, 2.0) == ""
    assert guard.judge(NORM, 4.6) == "gradient norm is 4.6, above 3 x its median of 4 steps, 1.5"
    assert guard.values == {LOSS: 2.0, "median loss": 2.5, NORM: 4.6, "median gradient norm": 1.5}
    for _ in range(4):  # the window moves on
        guard.accept(8.0, 8.0)
    assert guard.judge(LOSS, 23.0) == ""
    guard.replace_history([(1.0, 1.0)] * 4)
    assert guard.judge(LOSS, 3.5).startswith("loss is 3.5, above 3 x its median")


def test_guard_reads_earlier_steps_from_their_records(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_loss_and_norm(path, 9, 3) == []
    lines = [json.dumps({"step": step, "loss": step / 3, "grad_norm": step / 7}) for step in range(1, 8)]
    path.write_text("\n".join([*lines, '{"step": 8, "lo']))
    assert read_loss_and_norm(path, 5, 3) == [(step / 3, step / 7) for step in (3, 4, 5)]
    assert read_loss_and_norm(path, 9, 100)[-1] == (7 / 3, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A run of some ranks.

    Attributes:
        bad: steps whose gradients one rank spoils, whenever they come: that rank and what it multiplies them with; at
            -1 - step, its losses.
        bad_weights: steps whose weights are refused before the passes, as a limit of rollouts does; the weights before
            them are good.
    """

    config: TrainConfig
    bad: dict[int, tuple[int, float]] = field(default_factory=dict)
    left_out: tuple[int, ...] = ()
    bad_weights: tuple[int, ...] = ()


def make_job(folder: Path, name: str, guard: GuardConfig, steps: int, *, data: int = 1, **bad: Any) -> Job:
    """A run in float64 on two ranks, or in bf16 with sharded state on twice as many."""
    sharding, precision = ("replicated", "float64") if data == 1 else ("zero1", "bf16")
    config = tiny_config(
        folder,
        out_dir=str(folder / name),
        parallelism=ParallelismConfig(pipeline=2, data=data, expert=data),
        schedule=ScheduleConfig(kind="dualpipe_split", chunks=None, pairing="overlapped"),
        task=replace(TASK, steps=steps),
        checkpointing=replace(CHECKPOINTING, every_steps=2 if guard.kind == "roll_back" else 0),
        batch=replace(BATCH, sequence_length_tokens=12, global_sequences=2 * data),
        model=replace(MODEL, num_layers=2),
        optim=replace(OPTIM, sharding=sharding),  # type: ignore[arg-type]
        precision=PrecisionConfig(kind=precision),  # type: ignore[arg-type]
        guard=guard,
    )
    return Job(config=config, **bad)


def _spoil(job: Job, training: TrainingLoop) -> None:
    """Has this rank's own gradients spoilt right before they are summed, or its loss right before that."""
    from model.objective import LossSums

    plain_norm, plain_settle = staged.local_norm, LossSums.settle

    def local_norm(store: GradientStore, parameters: Sequence[Tensor]) -> Tensor:
        rank, factor = job.bad.get(training.num_done, (-1, 1.0))
        if rank == dist.get_rank():
            for parameter in parameters[:3]:
                store.gradient(parameter).mul_(factor)
        return plain_norm(store, parameters)

    def settle(sums: LossSums) -> Tensor:
        rank, factor = job.bad.get(-1 - training.num_done, (-1, 1.0))
        return plain_settle(sums) * (factor if rank == dist.get_rank() else 1.0)

    staged.local_norm = local_norm
    LossSums.settle = settle  # type: ignore[assignment, method-assign]


def _run(rank: int, world_size: int, jobs: list[Job]) -> list[tuple[str, dict[str, Tensor]]]:
    """Runs each job, and returns how it ended and this rank's final weights, biases and optimizer state."""
    from model.objective import LossSums

    plain_norm, plain_settle, ends = staged.local_norm, LossSums.settle, []
    for job in jobs:
        ends.append(_run_one(rank, job))
        staged.local_norm, LossSums.settle = plain_norm, plain_settle  # type: ignore[method-assign]
    return ends


def _run_one(rank: int, job: Job) -> tuple[str, dict[str, Tensor]]:
    config, out_dir = job.config, Path(job.config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    prepared: Prepared = prepare(config.data, config.batch.sequence_length_tokens)
    learner = open_job(config)
    reporter = Reporter(None, [JsonLines(out_dir / "metrics.jsonl", 0)] if rank == 0 else [])
    training = TrainingLoop(
        config,
        LearnersByBatchSize(learner, config.batch_sizes, {}),
        prepared,
        reporter,
        StatusFile(out_dir, is_writer=rank == 0),
        0,
    )
    training._recovery._steps_to_skip = set(job.left_out)  # as a run that never saw those batches
    training._listeners = training._listeners[1:]  # without pictures, which take longer than a step
    _spoil(job, training)

    def judged_batch(hook: TaskHook, loader: Loader, step: int) -> StepBatch:
        if step in job.bad_weights:
            raise RefusedStepError(StepRefusal(step=step, reason="bad", last_good=step - 1))
        return hook.prepare(loader, step)

    training._recovery.guard.judged_batch = judged_batch  # type: ignore[method-assign]
    end = ""
    try:
        training.run()
    except StoppedError as error:
        end = str(error)
    reporter.close()
    dist.barrier()
    close_job(learner)
    state = {name: tensor.clone() for name, tensor in named_tensors(learner.replica.model).items()}
    for name, held in learner.optimizer.state().items():
        state[f"optimizer {name}"] = (held.local if isinstance(held, Slice) else held).clone()
    return end, state


BAD = {2: (2, math.nan), -4: (1, math.inf), 5: (1, 1e4)}
"""In steps 3 and 6 gradients and in step 4 the loss, on one rank alone."""


@pytest.fixture(scope="module")
def ends(folder: Path) -> dict[str, list[tuple[str, dict[str, Tensor]]]]:
    """Returns the results of each rank, by name."""
    four, two = partial(make_job, folder, data=2), partial(make_job, folder)
    back_once = replace(ROLL_BACK, max_consecutive=1)
    jobs = {
        4: [
            four("never", STOP, 7, left_out=(2, 3, 5)),
            four("skip", SKIP, 7, bad=BAD),
            four("roll_back", ROLL_BACK, 7, bad=BAD),
            four("stop", STOP, 7, bad=BAD),
            four("cut", STOP, 2),
        ],
        2: [
            two("often", replace(SKIP, max_consecutive=1), 4, bad=dict.fromkeys((1, 2), (0, math.inf))),
            two("back_often", back_once, 6, bad=dict.fromkeys((3, 4), (0, math.inf))),
            two("early", ROLL_BACK, 3, bad={1: (0, math.nan)}),
            two("never_early", STOP, 3, left_out=(1,)),
            two("weights", ROLL_BACK, 6, bad_weights=(4,)),
            two("never_weights", STOP, 6, left_out=(2, 3, 4)),
            two("always_bad", back_once, 5, bad_weights=(3, 4, 5)),
        ],
    }
    by_name: dict[str, Any] = {}
    for size, chosen in jobs.items():
        results = run_ranks(size, _run, chosen)
        by_name |= {Path(job.config.out_dir).name: [rank[at] for rank in results] for at, job in enumerate(chosen)}
    return by_name


def assert_same(ends: dict[str, Any], one: str, other: str) -> None:
    """Weights, biases, masters, moments and step counts of every rank, to the bit."""
    for (said, ours), (_, theirs) in zip(ends[one], ends[other], strict=True):
        assert said == ""
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def steps_of(folder: Path, name: str) -> list[int]:
    """Returns the steps that a run recorded."""
    return [json.loads(line)["step"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_skipped_batch_changes_nothing_except_the_records(ends: dict[str, Any], folder: Path) -> None:
    assert_same(ends, "skip", "never")
    assert steps_of(folder, "skip") == [1, 2, 5, 7]
    norm, loss, spike = read_events(folder / "skip")
    assert [(event["kind"], event["step"], event["ranks"]) for event in (norm, loss, spike)] == [
        ("skipped", 3, [2]),
        ("skipped", 4, [1]),
        ("skipped", 6, [1]),
    ]
    assert (norm["text"], loss["text"]) == ("gradient norm is nan", "loss is inf")
    assert norm["values"]["gradient norm"] == "nan"
    assert math.isfinite(norm["values"]["loss"])
    assert "gradient norm" not in loss["values"]
    assert spike["text"].startswith("gradient norm is ")
    assert "above 20 x its median of 3 steps" in spike["text"]
    config = make_job(folder, "any", SKIP, 7, data=2).config
    prepared = prepare(config.data, config.batch.sequence_length_tokens)
    sizes = config.batch_sizes
    assert norm["samples"] == prepared.order.range(sizes.sequences_before(2), sizes.sequences(2)).tolist()


@pytest.mark.slow
def test_run_that_rolled_back_never_saw_the_batch(ends: dict[str, Any], folder: Path) -> None:
    assert_same(ends, "roll_back", "never")
    assert steps_of(folder, "roll_back") == [1, 2, 5, 7]
    events = read_events(folder / "roll_back")
    rollbacks = [event for event in events if event["kind"] == "rolled_back"]
    assert [(event["step"], event["ranks"]) for event in rollbacks] == [(3, [2]), (4, [1]), (6, [1])]
    assert rollbacks[0]["checkpoint"].endswith("checkpoints/step-00000002")
    assert {event["step"] for event in events if event["kind"] == "skipped_after_rollback"} == {3, 4, 6}


@pytest.mark.slow
def test_stop_ends_every_rank_before_anything_is_updated(ends: dict[str, Any], folder: Path) -> None:
    assert {said for said, _ in ends["stop"]} == {"gradient norm is nan; nothing was updated in this step"}
    for (_, stopped), (_, cut) in zip(ends["stop"], ends["cut"], strict=True):
        assert [name for name in stopped if not torch.equal(stopped[name], cut[name])] == []
    assert [event["kind"] for event in read_events(folder / "stop")] == ["stopped"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("often", "skipped"), ("back_often", "rolled_back")])
def test_too_many_refusals_in_a_row_end_the_run(ends: dict[str, Any], folder: Path, name: str, kind: str) -> None:
    """Also if accepted steps are repeated between them."""
    for said, _ in ends[name]:
        assert said.endswith("refused steps in a row: 2, above guard.max_consecutive=1"), said
    events = [event["kind"] for event in read_events(folder / name)]
    assert [event for event in events if event != "skipped_after_rollback"] == [kind, "stopped"]


@pytest.mark.slow
def test_rollback_without_a_checkpoint_skips_the_batch(ends: dict[str, Any], folder: Path) -> None:
    assert_same(ends, "early", "never_early")
    assert [event["kind"] for event in read_events(folder / "early")] == ["skipped"]


@pytest.mark.slow
def test_rollback_from_bad_weights_skips_all_steps_since_a_good_checkpoint(ends: dict[str, Any], folder: Path) -> None:
    assert_same(ends, "weights", "never_weights")
    assert steps_of(folder, "weights") == [1, 2, 6]
    back, *skipped = read_events(folder / "weights")
    # The checkpoint of step 4 holds the bad weights.
    assert back["checkpoint"].endswith("checkpoints/step-00000002")
    assert (back["first_skipped"], back["step"], back["ranks"]) == (3, 5, [])
    assert [event["step"] for event in skipped] == [3, 4, 5]
    names = sorted(path.name for path in (folder / "weights" / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004", "step-00000004.refused", "step-00000006"]


@pytest.mark.slow
def test_rollbacks_to_one_checkpoint_end(ends: dict[str, Any], folder: Path) -> None:
    for said, _ in ends["always_bad"]:
        assert said == "bad; nothing was updated in this step, refused steps in a row: 2, above guard.max_consecutive=1"
    assert steps_of(folder, "always_bad") == [1, 2]
