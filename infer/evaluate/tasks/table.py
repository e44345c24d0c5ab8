"""Registers the project's evaluation tasks."""

from infer.evaluate import answering, likelihood, retrieval
from infer.evaluate.protocol import EVALUATION_TASKS, EvaluationTaskSpec

_SPECS = {
    "choice": EvaluationTaskSpec(
        "multiple choice by log-likelihood",
        likelihood.ChoiceConfig,
        likelihood.build_choice,
        version=1,
        files=likelihood.choice_files,
        required=("path",),
    ),
    "bits_per_byte": EvaluationTaskSpec(
        "bits per byte of documents, also by source",
        likelihood.BitsPerByteConfig,
        likelihood.build_bits_per_byte,
        version=1,
        required=("path",),
    ),
    "needle": EvaluationTaskSpec(
        "a number hidden in text, by depth and length", retrieval.NeedleConfig, retrieval.build_needle, version=1
    ),
    "ruler": EvaluationTaskSpec(
        "several keys, values and queries, variables, and frequent words in long prompts",
        retrieval.RulerConfig,
        retrieval.build_ruler,
        version=1,
    ),
    "maths": EvaluationTaskSpec(
        "questions of mathematics, whose answers must be proven equal",
        answering.MathsTaskConfig,
        answering.build_maths,
        version=2,
    ),
    "code": EvaluationTaskSpec(
        "programs that tests in a sandbox judge, with pass@k",
        answering.CodeTaskConfig,
        answering.build_code,
        version=1,
        files=answering.code_files,
    ),
    "reasoning": EvaluationTaskSpec(
        "problems that reasoning-gym generates and verifies",
        answering.ReasoningTaskConfig,
        answering.build_reasoning,
        version=1,
        files=lambda config: (),
        required=("dataset",),
    ),
    "reward": EvaluationTaskSpec(
        "a reward model's preference for chosen answers, by subset",
        likelihood.RewardTaskConfig,
        likelihood.build_reward,
        version=1,
        required=("path",),
        heads=("score",),
    ),
}
for _name, _spec in _SPECS.items():
    EVALUATION_TASKS.register(_name, _spec)
