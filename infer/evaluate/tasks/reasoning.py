"""Evaluates problems that the library reasoning-gym generates and verifies. Imports no torch.

The library (arXiv:2505.24760) is no dependency; `pip install '.[reasoning]'`.
"""

from dataclasses import dataclass

from data.chat.templates import CHAT_TEMPLATES
from data.corpus import DataError
from data.problems.gym import GymSource
from data.registry import DATA_SOURCES
from infer.evaluate.config import EvaluationError
from infer.evaluate.protocol import TaskContext
from infer.evaluate.registry import EVALUATION_TASKS, EvaluationTaskSpec
from infer.evaluate.tasks.answering import (
    AnswerJudge,
    AnswerProblem,
    AnswerTask,
    AnswerTaskConfig,
    chat_or_text,
    check_settings,
)
from infer.scoring.python import GymScorer, GymScorerConfig
from infer.scoring.score import problem_of
from kernels.ranges import PositiveFloat, PositiveInt

NAME = "reasoning"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReasoningTaskConfig(AnswerTaskConfig):
    """Problems of reasoning-gym.

    Attributes:
        dataset: name of one of the library's data sets.
        num_problems: number of problems; repeated ones are left out. The evaluation's seed decides them.
        boxed: whether the last box is the answer; otherwise it is the whole text after the thoughts.
        seconds: deadline of a verification.
        num_workers: number of processes that verify.
    """

    dataset: str | None
    num_problems: PositiveInt
    boxed: bool
    seconds: PositiveFloat
    num_workers: PositiveInt


def build_reasoning_task(config: ReasoningTaskConfig, context: TaskContext) -> AnswerTask:
    """Generates the problems.

    Raises:
        EvaluationError, DataError, ScoringError: settings that are not valid, or no library.
    """
    if not config.dataset:
        raise EvaluationError(
            f"reasoning.dataset: a value is needed, is {config.dataset!r}; write reasoning.dataset=NAME, one of "
            f"reasoning-gym's data sets, for example basic_arithmetic"
        )
    check_settings(NAME, config, context)
    source = GymSource(
        kind="reasoning_gym",
        dataset=config.dataset,
        count=config.num_problems,
        generator_seed=context.seed,
        template=config.chat_template or CHAT_TEMPLATES.names()[0],
    )
    generate = DATA_SOURCES.get("reasoning_gym").problems
    assert generate is not None
    try:
        records = list(generate(source))
    except DataError as error:
        renamed = str(error).replace("data.dataset", "reasoning.dataset").replace("data.kind", "tasks")
        raise EvaluationError(renamed) from error
    problems = [
        AnswerProblem(
            key=record.key,
            prompt=chat_or_text(config, context, record.messages, f"Question: {record.prompt}\nAnswer:"),
            source=problem_of(record),
        )
        for record in records
    ]
    scorer = GymScorer(
        GymScorerConfig(
            kind="reasoning_gym",
            weight=1.0,
            boxed=config.boxed,
            seconds=config.seconds,
            num_workers=config.num_workers,
        )
    )
    stop = () if config.boxed else ("\nQuestion:",)
    return AnswerTask(
        config, context, problems, AnswerJudge(scorer.score, scorer.close, stop=stop, num_threads=config.num_workers)
    )


EVALUATION_TASKS.register(
    NAME,
    EvaluationTaskSpec(
        summary="problems that reasoning-gym generates and verifies",
        version=1,
        config=ReasoningTaskConfig,
        build=build_reasoning_task,
        files=lambda config: (),
        required=("dataset",),
    ),
)
