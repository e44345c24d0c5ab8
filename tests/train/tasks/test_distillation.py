"""Tests distillation from stored scores and from a teacher in the pipeline, on many ranks and on one."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch

from base.refusal import ConfigError
from comm.dispatch.local import LocalDispatcher
from data.corpus import DataError
from data.prepare import prepare
from data.progress import NO_PROGRESS
from model.objectives.distillation import DIVERGENCE, KeepStates
from model.transformer import Transformer, initialize_weights
from tests.covering import exhaustive
from tests.launch.checkpoints import write_checkpoint
from tests.marked_samples import sft_config
from tests.model.live_memory import rotation_tables
from tests.ranks import run_ranks
from tests.tiny import MODEL
from tests.train.job import Job, close_job, open_job, open_loader, run_jobs, run_plain, task_of
from tests.train.test_equality import assert_equal
from train.config import TokenSchedule, TrainConfig
from train.core.replica import BatchReader
from train.post.comparison import Teacher
from train.predict.memory import predict_memory
from train.start.corpus import prepare_corpus
from train.tasks.distill import FORMAT_VERSION, DistillConfig, ScoresMeta, ScoresWriter, write_scores
from train.tasks.registry import TASKS
from verify.steps import start_biases

TEMPERATURE = 2.0
TASK = DistillConfig(
    kind="distill",
    steps=1,
    epochs=None,
    mtp_loss_weight=TokenSchedule.constant(0.1),
    balance_loss_weight=0.01,
    bias_update_rate=TokenSchedule.constant(0.0),
    teacher="",
    divergence="forward_kl",
    beta=0.3,
    temperature=TEMPERATURE,
    cross_entropy_weight=0.25,
    answers="data",
    student_share=1.0,
    max_new_tokens=6,
    sampling_temperature=1.0,
)
TEACHER = replace(MODEL, hidden_size=24, num_layers=4, mtp_depth=0, initializer_range=0.4)


def make_teacher() -> Transformer:
    model = Transformer(TEACHER, LocalDispatcher(TEACHER.num_routed_experts), torch.float64)
    initialize_weights(model, 11)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights of a teacher and its scores of the samples."""
    folder, teacher = tmp_path_factory.mktemp("distillation"), make_teacher()
    write_checkpoint(folder / "weights", teacher)
    config = sft_config(folder)
    prepared = prepare(config.data, config.batch.sequence_length_tokens)
    meta = ScoresMeta(
        format_version=FORMAT_VERSION,
        teacher="weights",
        fingerprint=prepared.fingerprint,
        vocab_size=TEACHER.vocab_size,
        kept=12,
        temperature=TEMPERATURE,
    )
    with ScoresWriter(folder / "scores", meta) as writer:
        write_scores(teacher, prepared, meta, writer, 3, NO_PROGRESS)
    return folder


def distill_config(
    folder: Path,
    teacher: Literal["weights", "scores"],
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"],
    pipeline: int = 1,
) -> TrainConfig:
    config = sft_config(folder, pipeline=pipeline)
    return replace(config, task=replace(TASK, teacher=str(folder / teacher), divergence=divergence))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "divergence"),
    [("scores", "forward_kl"), ("weights", "jensen_shannon"), *exhaustive(("weights", "reverse_kl"))],
)
def test_distillation_on_two_ranks_equals_one_rank(
    folder: Path,
    teacher: Literal["weights", "scores"],
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"],
) -> None:
    config = distill_config(folder, teacher, divergence, pipeline=2)
    results = run_ranks(2, run_jobs, [Job(config=config)], 1)
    plain = run_plain(config, 0, 1)[0]
    assert_equal([rank[0][0] for rank in results], plain, 1e-10)
    names = task_of(config).names
    assert plain.losses[names.index(DIVERGENCE)] > 0.1, "the teacher is too much like the student"
    means = dict(zip(names, plain.losses, strict=False))
    mixed = 0.75 * means[DIVERGENCE] + 0.25 * means["main"] + 0.1 * means["mtp_1"] + 0.01 * means["balance"]
    assert plain.losses[-1] == pytest.approx(mixed, rel=1e-12)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_student_equal_to_its_teacher_has_divergence_and_gradient_zero(
    tmp_path: Path, divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"]
) -> None:
    config = distill_config(tmp_path, "weights", divergence)
    alone = replace(config.task, cross_entropy_weight=0.0, balance_loss_weight=0.0, temperature=1.5)  # type: ignore[call-arg]
    config = replace(config, task=alone, model=replace(config.model, mtp_depth=0))
    same = Transformer(config.model, LocalDispatcher(config.model.num_routed_experts), torch.float64)
    initialize_weights(same, config.seed)
    start_biases(same, 0)
    write_checkpoint(tmp_path / "weights", same)
    seen = run_plain(config, 0, 1)[0]
    assert seen.losses[task_of(config).names.index(DIVERGENCE)] == pytest.approx(0, abs=1e-12)
    assert seen.norm <= 1e-12


ONE_RANK = (1, 1, 1, "1f1b")
LAYOUTS = [(1, 2, 2, "1f1b"), (2, 1, 1, "dualpipe")]
MORE_LAYOUTS = [(2, 2, 2, "dualpipe_v")]
STUDENT_SEQUENCES = 8


def student_config(folder: Path, layout: tuple[int, int, int, str], share: float) -> TrainConfig:
    """Returns a run that trains on its own answers, with a batch that all layouts can run."""
    pipeline, data, expert, kind = layout
    config = sft_config(folder, pipeline=pipeline, data=data, expert=expert)
    task = replace(
        TASK, teacher=str(folder / "weights"), cross_entropy_weight=0.0, answers="student", student_share=share
    )
    return replace(
        config,
        task=task,
        batch=replace(config.batch, global_sequences=STUDENT_SEQUENCES),
        schedule=replace(config.schedule, kind=kind),
        model=replace(config.model, num_layers=4, initializer_range=0.4),
    )


def measure_teacher(rank: int, world_size: int, config: TrainConfig) -> tuple[int, int]:
    """Returns the bytes that this rank holds of the teacher: weights with their tables, and states of a batch."""
    learner, loader = open_job(config), open_loader(config)
    batches = BatchReader(learner.replica, task_of(config), partial(loader.batch, 0))
    assert isinstance(learner.comparison, Teacher)
    states = learner.comparison.replica.record(batches, KeepStates())
    network = learner.comparison.replica.network
    held = [*network.parameters(), *network.buffers(), *rotation_tables(network)]
    close_job(learner)
    return sum(each.nbytes for each in held), sum(each.nbytes for each in states.values())


def test_memory_of_a_teacher_is_predicted(folder: Path) -> None:
    config = distill_config(folder, "weights", "reverse_kl", pipeline=2)
    alone = predict_memory(replace(config, task=sft_config(folder).task))
    for rank, (weights, states) in enumerate(run_ranks(2, measure_teacher, config)):
        both = predict_memory(config).ranks[rank]
        assert both.weights - alone.ranks[rank].weights == weights, rank
        assert both.batch - alone.ranks[rank].batch == states > 0, rank
    assert predict_memory(distill_config(folder, "scores", "forward_kl", pipeline=2)) == alone


@pytest.mark.slow
@pytest.mark.parametrize("layouts", [LAYOUTS, *exhaustive([ONE_RANK], MORE_LAYOUTS)])
def test_student_of_its_own_answers_is_the_same_under_every_layout(
    folder: Path, layouts: list[tuple[int, int, int, str]]
) -> None:
    share = 0.7
    plain = run_plain(student_config(folder, ONE_RANK, share), 0, 2)
    on_data = run_plain(student_config(folder, ONE_RANK, 1e-9), 0, 1)
    assert abs(plain[0].losses[-1] - on_data[0].losses[-1]) > 1e-3, "no answer is the student's"
    jobs = [Job(config=student_config(folder, layout, share)) for layout in layouts]
    results = run_ranks(jobs[0].config.parallelism.world_size, run_jobs, jobs, 2)
    for number in range(len(jobs)):
        for step, expected in enumerate(plain):
            assert_equal([rank[number][step] for rank in results], expected, 1e-9)


def test_student_cannot_answer_if_scores_are_stored_or_nothing_would_be_sampled(folder: Path) -> None:
    config = distill_config(folder, "scores", "reverse_kl")
    student = replace(TASK, teacher=str(folder / "scores"), answers="student", cross_entropy_weight=0.0)
    spec = TASKS.get("distill")
    with pytest.raises(
        ConfigError, match=r"task\.answers: must be data if .* stored scores.*; nearest valid: data, or"
    ):
        spec.check_files(replace(config, task=student))
    spec.check(replace(config, task=student))
    for changed, message in (
        (
            replace(student, student_share=0.0),
            r"task\.student_share: must be above 0 .*nearest valid: task.answers=data",
        ),
        (
            replace(student, cross_entropy_weight=0.5),
            r"task\.cross_entropy_weight: must be 0 .* is 0\.5; nearest valid: 0",
        ),
        (
            replace(student, max_new_tokens=24),
            r"task\.max_new_tokens: must be below .*=24, .* is 24; nearest valid: 23",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            spec.check(replace(config, task=changed))


def test_scores_of_other_samples_or_at_another_temperature_are_rejected(folder: Path) -> None:
    config = distill_config(folder, "scores", "forward_kl")
    spec = TASKS.get("distill")
    spec.check_files(config)
    assert prepare_corpus(config).train.values["teacher_ids"].shape[2] == 12
    warmer = replace(config, task=replace(TASK, teacher=str(folder / "scores"), temperature=1.0))
    with pytest.raises(ConfigError, match=r"task\.temperature: must be 2, at which .* is 1; nearest valid: 2"):
        spec.check_files(warmer)
    with pytest.raises(ConfigError, match=r"task\.teacher: must have the vocabulary of the model, 400 tokens"):
        spec.check_files(replace(config, model=replace(MODEL, vocab_size=400)))
    others = replace(config, data=sft_config(folder, num_samples=80).data)
    with pytest.raises(DataError, match=r"task\.teacher: .* must have the scores of these samples"):
        prepare_corpus(others)


def test_teacher_in_the_pipeline_must_fit_it(folder: Path) -> None:
    spec = TASKS.get("distill")
    spec.check_files(distill_config(folder, "weights", "forward_kl", pipeline=4))
    config = distill_config(folder, "weights", "forward_kl", pipeline=8)
    with pytest.raises(ConfigError, match=r"task\.teacher: must have at least .* layers"):
        spec.check_files(config)
    with pytest.raises(ConfigError, match=r"task\.teacher: must have the vocabulary of the model, 400 tokens"):
        spec.check_files(replace(config, model=replace(MODEL, vocab_size=400)))


def test_mixture_of_jensen_shannon_needs_both_distributions(folder: Path) -> None:
    config = distill_config(folder, "scores", "jensen_shannon")
    spec = TASKS.get("distill")
    spec.check(config)
    for beta, nearest in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        limit = replace(config, task=replace(TASK, divergence="jensen_shannon", beta=beta))
        with pytest.raises(ConfigError, match=rf"task\.beta: must be above 0 and below 1 .*={nearest}"):
            spec.check(limit)
