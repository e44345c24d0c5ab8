"""Registers the project's evaluation tasks."""

from infer.evaluate.registry import EVALUATION_TASKS, EvaluationTaskSpec
from infer.evaluate.tasks import documents, questions, retrieval

_SPECS = {
    "choice": EvaluationTaskSpec(
        summary="multiple choice by log-likelihood",
        version=1,
        config=questions.ChoiceConfig,
        build=questions.build_choice,
        files=questions.choice_files,
        required=("path",),
    ),
    "bits_per_byte": EvaluationTaskSpec(
        summary="bits per byte of documents, also by source",
        version=1,
        config=documents.BitsPerByteConfig,
        build=documents.build_bits_per_byte,
        required=("path",),
    ),
    "needle": EvaluationTaskSpec(
        summary="a number hidden in text, by depth and length",
        version=1,
        config=retrieval.NeedleConfig,
        build=retrieval.build_needle,
    ),
    "ruler": EvaluationTaskSpec(
        summary="several keys, values and queries, variables, and frequent words in long prompts",
        version=1,
        config=retrieval.RulerConfig,
        build=retrieval.build_ruler,
    ),
    "maths": EvaluationTaskSpec(
        summary="questions of mathematics, whose answers must be proven equal",
        version=2,
        config=questions.MathsTaskConfig,
        build=questions.build_maths,
    ),
    "code": EvaluationTaskSpec(
        summary="programs that tests in a sandbox judge, with pass@k",
        version=1,
        config=questions.CodeTaskConfig,
        build=questions.build_code,
        files=questions.code_files,
    ),
    "reasoning": EvaluationTaskSpec(
        summary="problems that reasoning-gym generates and verifies",
        version=1,
        config=questions.ReasoningTaskConfig,
        build=questions.build_reasoning,
        files=lambda config: (),
        required=("dataset",),
    ),
    "reward": EvaluationTaskSpec(
        summary="a reward model's preference for chosen answers, by subset",
        version=1,
        config=documents.RewardTaskConfig,
        build=documents.build_reward,
        required=("path",),
        heads=("score",),
    ),
}
for _name, _spec in _SPECS.items():
    EVALUATION_TASKS.register(_name, _spec)
