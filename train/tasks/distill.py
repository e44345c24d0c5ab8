"""Registers distillation: a student imitates a teacher's distributions of the answers. No torch here."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from data.pack import WEIGHTS
from kernels.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Share
from model.config import ModelConfig
from train.checkpoint.sources import check_second_network, second_network_run
from train.config import BatchConfig
from train.errors import ConfigError
from train.tasks.registry import TASKS, TaskSpec
from train.tasks.samples import SampleTaskConfig, check_samples
from train.tasks.scores import check_scores, is_scores_folder, with_scores

if TYPE_CHECKING:
    from data.prepare import Prepared
    from train.config import TrainConfig
    from train.tasks.next_token import DistillationTask


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig(SampleTaskConfig):
    """The configuration of distillation.

    `teacher` is a folder that `launch.score_teacher` wrote, or weights, which form a second, frozen network.
    `beta` is the teacher's weight in jensen_shannon. The divergence has what `cross_entropy_weight` leaves.
    `student_share` is the probability that an answer is the student's if `answers` is `student`.
    """

    teacher: str
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"]
    beta: Share
    temperature: PositiveFloat
    cross_entropy_weight: Share
    answers: Literal["data", "student"]
    student_share: Share
    max_new_tokens: PositiveInt
    sampling_temperature: NonNegativeFloat


def build_distill(config: DistillConfig, model: ModelConfig, batch: BatchConfig) -> "DistillationTask":
    """Builds the task of distillation."""
    from train.tasks.next_token import DistillationTask

    return DistillationTask(config, model.mtp_depth, masks_documents=batch.document_mask)


def check_distill(config: "TrainConfig") -> None:
    """Rejects data without samples, a mixture of one distribution, and sampling that cannot be trained on."""
    check_samples(config)
    assert isinstance(config.task, DistillConfig)
    beta = config.task.beta
    if config.task.divergence == "jensen_shannon" and not 0 < beta < 1:
        raise ConfigError(
            f"task.beta: must be above 0 and below 1 with task.divergence=jensen_shannon, is {beta:g}; nearest valid: "
            f"task.divergence={'forward_kl' if beta <= 0 else 'reverse_kl'}, which is its limit"
        )
    if config.task.answers == "student":
        _check_sampling(config.task, config.batch.sequence_length_tokens)


def _check_sampling(task: DistillConfig, length: int) -> None:
    if task.student_share == 0:
        raise ConfigError(
            "task.student_share: must be above 0 with task.answers=student, is 0; nearest valid: task.answers=data"
        )
    if task.cross_entropy_weight > 0:
        raise ConfigError(
            f"task.cross_entropy_weight: must be 0 with task.answers=student, because the student's own tokens are no "
            f"answer of the data, is {task.cross_entropy_weight:g}; nearest valid: 0"
        )
    if task.max_new_tokens >= length:
        raise ConfigError(
            f"task.max_new_tokens: must be below batch.sequence_length_tokens={length}, which also holds the prompt, "
            f"is {task.max_new_tokens}; nearest valid: {length - 1}"
        )


def check_teacher(config: "TrainConfig") -> None:
    """Rejects a teacher that is neither stored scores nor weights, or has another vocabulary."""
    task = config.task
    assert isinstance(task, DistillConfig)
    if is_scores_folder(task.teacher):
        if task.answers == "student":
            raise ConfigError(
                f"task.answers: must be data if task.teacher is a folder of stored scores, which belong to the answers "
                f"of the data, is student; nearest valid: data, or weights as task.teacher instead of {task.teacher}"
            )
        check_scores(task.teacher, task.temperature, config.model.vocab_size)
        return
    check_second_network(config, task.teacher, "task.teacher", "a teacher")


def teacher_run(config: "TrainConfig") -> "TrainConfig | None":
    """Returns the run with the architecture of a teacher in its pipeline; None if scores are stored."""
    assert isinstance(config.task, DistillConfig)
    if is_scores_folder(config.task.teacher):
        return None
    return second_network_run(config, config.task.teacher, "task.teacher")


def add_scores(config: "TrainConfig", prepared: "Prepared") -> "Prepared":
    """Returns the samples with the teacher's scores, if those are stored."""
    assert isinstance(config.task, DistillConfig)
    return with_scores(config.task.teacher, prepared) if is_scores_folder(config.task.teacher) else prepared


TASKS.register(
    "distill",
    TaskSpec(
        summary="imitation of a teacher's distributions of the answers in samples",
        config=DistillConfig,
        build=build_distill,
        example={
            "epochs": None,
            "teacher": "scores",
            "divergence": "forward_kl",
            "beta": 0.5,
            "temperature": 2.0,
            "cross_entropy_weight": 0.25,
            "answers": "data",
            "student_share": 1.0,
            "max_new_tokens": 16,
            "sampling_temperature": 1.0,
        },
        needs_weights=True,
        check=check_distill,
        check_files=check_teacher,
        teacher_run=teacher_run,
        extend=add_scores,
        values=(WEIGHTS,),
    ),
)
