"""Reward models and preference optimization on many ranks: equal to one rank, exact at the start, resumed, refused."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
from torch import distributed as dist

from base.refusal import ConfigError
from comm.config import ParallelismConfig
from data.prepare import prepare
from dualpipe.registry import ScheduleConfig
from launch.config.rules import check_rules
from model.transformer import SCORE, named_tensors
from tests.covering import exhaustive
from tests.pairs import on_pairs
from tests.ranks import run_ranks
from tests.tiny import MODEL, OPTIM, tiny_config
from tests.train.job import Job, close_job, open_job, open_loader, run_jobs, run_plain, save_checkpoint
from tests.train.predict.live import compare_rank
from tests.train.predict.test_live import check
from tests.train.test_equality import assert_equal
from train.checkpoint import load as checkpoint
from train.checkpoint.locate import check_compatible
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.sources import load_initial
from train.config import PrecisionConfig, TokenSchedule, TrainConfig
from train.core.learner import NetworkComparison
from train.core.step import train_step
from train.listeners.validation import validate
from train.tasks.preferences import DpoConfig, RewardModelConfig

SHARED = {
    "steps": 2,
    "epochs": None,
    "mtp_loss_weight": TokenSchedule.constant(0.3),
    "balance_loss_weight": 0.01,
    "bias_update_rate": TokenSchedule.constant(0.0),
}
RM = RewardModelConfig(kind="reward_model", centre=0.05, **SHARED)  # type: ignore[arg-type]
DPO = DpoConfig(kind="dpo", beta=0.5, label_smoothing=0.1, sft_weight=0.2, **SHARED)  # type: ignore[arg-type]
LAYOUTS_OF_TWO = [(2, 1, 1, "zb_v"), (1, 2, 2, "1f1b")]
LAYOUTS_OF_FOUR = [(2, 2, 2, "dualpipe")]
MORE_LAYOUTS_OF_FOUR = [*LAYOUTS_OF_FOUR, (4, 1, 1, "dualpipe_split"), (2, 2, 1, "1f1b")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


def run_config(
    folder: Path, task: RewardModelConfig | DpoConfig, pipeline: int = 1, data: int = 1, expert: int = 1, kind: str = ""
) -> TrainConfig:
    """A run of eight sequences, of which each holds two pairs, so that a layout changes no batch."""
    config = tiny_config(
        folder,
        task=task,
        parallelism=ParallelismConfig(pipeline=pipeline, data=data, expert=expert),
        schedule=ScheduleConfig(kind=kind or "1f1b", chunks=None, pairing="overlapped"),
        model=replace(MODEL, num_layers=4),
    )
    return on_pairs(replace(config, batch=replace(config.batch, global_sequences=8)), task.kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "layouts"),
    [
        (RM, LAYOUTS_OF_FOUR),
        (DPO, LAYOUTS_OF_TWO),
        *exhaustive((RM, LAYOUTS_OF_TWO), (RM, MORE_LAYOUTS_OF_FOUR[1:]), (DPO, MORE_LAYOUTS_OF_FOUR)),
    ],
)
def test_many_ranks_equal_one_rank(
    folder: Path, task: RewardModelConfig | DpoConfig, layouts: list[tuple[int, int, int, str]]
) -> None:
    plain = run_plain(run_config(folder, task), 0, 2)
    jobs = [Job(config=run_config(folder, task, *layout)) for layout in layouts]
    results = run_ranks(layouts[0][0] * layouts[0][1], run_jobs, jobs, 2)
    for index in range(len(jobs)):
        for step in range(2):
            assert_equal([rank[index][step] for rank in results], plain[step], 1e-10)


def first_steps(rank: int, world_size: int, configs: list[TrainConfig]) -> list[tuple[dict[str, float], float]]:
    """The reported means of the first step, and the margin of the second."""
    found = []
    for config in configs:
        learner, loader = open_job(config), open_loader(config)
        first, second = (train_step(learner, config.task, loader, step).losses.by_name for step in range(2))
        held_out = validate(learner.replica, config.task, loader, 8, learner.comparison)
        found.append((dict(first), second["margin"]))
        assert held_out.reported["margin"] != 0
        assert "main" not in held_out.reported
        dist.barrier()
        close_job(learner)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", *exhaustive("float32")])
def test_policy_of_the_first_step_is_its_reference_to_the_bit(folder: Path, kind: Literal["float32", "bf16"]) -> None:
    """Several precisions and layouts, with MTP modules in the policy but not in the reference."""
    config = run_config(folder, DPO, 2, 1, 1, "dualpipe_split")
    optim = replace(OPTIM, sharding="zero1" if kind == "bf16" else "replicated")
    configs = [replace(config, precision=PrecisionConfig(kind=kind), optim=optim), run_config(folder, DPO, 1, 2, 2)]
    for rank in run_ranks(2, first_steps, configs):
        for config, (first, margin) in zip(configs, rank, strict=True):
            assert config.model.mtp_depth == 1
            assert first["margin"] == 0.0
            assert first["accuracy"] == 0.0
            assert first["main"] == pytest.approx(0.6931471805599453, rel=1e-12)
            assert first["chosen_log_prob"] < 0
            assert margin != 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """Losses of a run's third step, and of one that was resumed before it."""

    whole: dict[str, float]
    resumed: dict[str, float]
    refused: str


def resume(rank: int, world_size: int, config: TrainConfig) -> Resumed:
    """Saves after two steps, trains on, and repeats the third step from the checkpoint in another learner."""
    learner, loader = open_job(config), open_loader(config)
    prepared = prepare(config.data, config.batch.sequence_length_tokens)
    for step in range(2):
        train_step(learner, config.task, loader, step)
    saved = save_checkpoint(config, learner, 2, prepared)
    elsewhere = replace(config, out_dir=f"{config.out_dir}_bare")
    bare = save_checkpoint(elsewhere, replace(learner, comparison=NetworkComparison()), 2, prepared)
    whole = train_step(learner, config.task, loader, 2).losses.by_name
    dist.barrier()
    close_job(learner)
    again = open_job(replace(config, seed=config.seed + 1))
    try:
        checkpoint.load(again, bare)
        refused = ""
    except CheckpointError as error:
        refused = str(error)
    checkpoint.load(again, saved)
    resumed = train_step(again, config.task, loader, 2).losses.by_name
    dist.barrier()
    close_job(again)
    return Resumed(whole=dict(whole), resumed=dict(resumed), refused=refused)


@pytest.mark.slow
def test_resumed_run_has_the_reference_of_its_checkpoint(folder: Path) -> None:
    task = replace(DPO, steps=4)
    for rank in run_ranks(2, resume, run_config(folder, task, 2, 1, 1, "dualpipe_split")):
        assert rank.resumed == rank.whole
        assert rank.whole["margin"] != 0
        assert "must hold the reference of the run's task" in rank.refused


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """What a start from a checkpoint gave: its line or error, changed tensors, score head, and error of a resume."""

    said: str
    differing: list[str]
    score: list[float]
    resume: str


def outcome(call: Callable[..., str | None], *values: object) -> str:
    """Returns what a call returns, or the message of its error."""
    try:
        return call(*values) or ""
    except CheckpointError as error:
        return str(error)


def start_from(rank: int, world_size: int, base: TrainConfig, starts: list[TrainConfig]) -> tuple[str, list[Started]]:
    """Saves a run of `base` after one step, and starts others from it. Returns the checkpoint, and what each gave."""
    learner, loader = open_job(base), open_loader(base)
    prepared = prepare(base.data, base.batch.sequence_length_tokens)
    train_step(learner, base.task, loader, 0)
    folder = save_checkpoint(base, learner, 1, prepared)
    saved = {name: tensor.clone() for name, tensor in named_tensors(learner.replica.model).items()}
    close_job(learner)
    found = []
    for config in starts:
        given = open_job(replace(config, init_from=str(folder)))
        said = outcome(load_initial, replace(config, init_from=str(folder)), given, prepared.tokenizer)
        refused = outcome(check_compatible, folder, config)
        named = named_tensors(given.replica.model)
        differing = [name for name, tensor in named.items() if name not in saved or not tensor.equal(saved[name])]
        score = named[SCORE].flatten().tolist() if SCORE in named else []
        found.append(Started(said=said, differing=differing, score=score, resume=refused))
        close_job(given)
    return str(folder), found


@pytest.mark.slow
def test_reward_model_starts_from_any_task_with_a_head_of_zeros(folder: Path) -> None:
    """All other tensors are those of the policy. The policy's checkpoint cannot be resumed as a reward model."""
    rm, dpo = replace(run_config(folder, RM), out_dir=str(folder / "rm_of_dpo")), run_config(folder, DPO)
    ((saved, (started,)),) = run_ranks(1, start_from, dpo, [replace(rm, seed=9)])
    assert started.said == f"weights from {saved} (score head from zero)"
    assert started.differing == [SCORE]
    assert started.score == [0.0] * rm.model.hidden_size
    assert started.resume.startswith(f"task.kind: must be dpo, the task of {saved}")


def test_only_a_reward_model_starts_from_a_reward_model(folder: Path) -> None:
    rm, dpo = replace(run_config(folder, RM), out_dir=str(folder / "rm")), run_config(folder, DPO)
    ((saved, (policy, again)),) = run_ranks(1, start_from, rm, [dpo, replace(rm, seed=9)])
    assert policy.said == (
        f"init_from: {saved} must have an output head for tokens, is a reward model, which has a head for scores; "
        f"nearest valid: task=reward_model"
    )
    assert policy.resume.startswith(f"task.kind: must be reward_model, the task of {saved}")
    assert again.said == f"weights from {saved}"
    assert again.differing == []
    assert any(again.score)
    assert again.resume == ""


@pytest.mark.parametrize(
    ("task", "changes", "rule"),
    [
        (RM, {"head": "tokens"}, r"model\.head: must be score with task=reward_model, is tokens"),
        (RM, {"mtp_depth": 1}, r"model\.mtp_depth: must be 0 with model\.head=score"),
        (DPO, {"head": "score"}, r"model\.head: must be tokens with task=dpo, is score"),
    ],
)
def test_rules_reject_a_head_that_does_not_fit_the_task(
    folder: Path, task: RewardModelConfig | DpoConfig, changes: dict[str, object], rule: str
) -> None:
    config = run_config(folder, task)
    check_rules(replace(config, optim=replace(OPTIM, sharding="replicated")))
    with pytest.raises(ConfigError, match=rule):
        check_rules(replace(config, model=replace(config.model, **changes)))  # type: ignore[arg-type]


@pytest.mark.slow
def test_reward_model_keeps_the_memory_that_is_predicted(folder: Path) -> None:
    """Rows are so wide that tables of pairs, which no account has, do not count."""
    config = run_config(folder, RM)
    config = replace(
        config,
        model=replace(config.model, hidden_size=256, num_layers=2),
        optim=replace(OPTIM, sharding="zero1"),
        schedule=replace(config.schedule, kind="dualpipe_split"),
        precision=PrecisionConfig(kind="bf16"),
    )
    ((compared,),) = run_ranks(1, compare_rank, [(config, None)], False)
    check(compared, "bf16", 0.04)
