"""Evaluates a reward model: how often the chosen answer has the higher score. Imports no torch.

A line of the file is `{"id": ..., "subset": ..., "prompt": ..., "chosen": ..., "rejected": ...}`. `messages` may
replace `prompt`. Prompts and answers are strings, or lists of messages as in `data=preferences`. The form is that of
RewardBench (arXiv:2403.13787), and so is the accuracy by subset.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Annotated, Any

from data.chat.encode import check_tokens, encode_conversations
from data.chat.messages import AnswerPair
from data.chat.records import read_pair
from data.chat.templates import CHAT_TEMPLATES
from infer.evaluate.config import EvaluationError, EvaluationTaskConfig, needed_path
from infer.evaluate.lines import check_unique, key_field, read_lines, text_field
from infer.evaluate.protocol import (
    EvaluationMetric,
    EvaluationSample,
    Measure,
    ResultTable,
    SimpleTask,
    TaskContext,
    TaskDetails,
)
from infer.evaluate.registry import EVALUATION_TASKS, EvaluationTaskSpec
from infer.evaluate.requests import EvaluationAnswer, RatingAnswer, RatingRequest
from infer.evaluate.statistics import estimate
from kernels.ranges import PositiveInt

NAME = "reward"
EXAMPLE = 'lines {"id": "1", "subset": "chat", "prompt": "1+1?", "chosen": "2", "rejected": "3"}'
ALL = "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardTaskConfig(EvaluationTaskConfig):
    """Pairs of answers.

    Attributes:
        path: `.jsonl` file of pairs.
        chat_template: name of the chat template that the reward model was trained with.
        limit: maximum number of pairs; None: all.
    """

    path: str | None
    chat_template: Annotated[str, CHAT_TEMPLATES]
    limit: PositiveInt | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RatedPair:
    """A pair of answers: its `id`, its subset, both conversations, and its file and line."""

    key: str | int
    subset: str
    pair: AnswerPair
    place: str


class RewardTask(SimpleTask):
    """Pairs of answers."""

    metrics = (EvaluationMetric(name="accuracy"), EvaluationMetric(name="margin"))

    def __init__(self, config: RewardTaskConfig, context: TaskContext) -> None:
        """Reads and checks the file.

        Raises:
            EvaluationError, DataError: no file, a line that is not valid, or an answer that is too long.
        """
        template = CHAT_TEMPLATES.get(config.chat_template)
        check_tokens(template.required_tokens, config.chat_template, context.tokenizer, "reward.chat_template")
        pairs = read_lines("reward.path", needed_path("reward.path", config.path, EXAMPLE), _pair)
        check_unique([pair.key for pair in pairs], [pair.place for pair in pairs])
        pairs = pairs[: config.limit]
        both = [conversation for each in pairs for conversation in (each.pair.chosen, each.pair.rejected)]
        encoded = [tuple(chat.ids) for chat in encode_conversations(both, template, context.tokenizer)]
        for number, ids in enumerate(encoded):
            if len(ids) > context.max_tokens:
                raise EvaluationError(
                    f"{pairs[number // 2].place}: must have at most model.max_position_tokens={context.max_tokens} "
                    f"tokens with {('chosen', 'rejected')[number % 2]}, has {len(ids)}; nearest valid: leave the line "
                    f"out"
                )
        self._samples = [
            EvaluationSample(
                key=each.key, requests=(RatingRequest(tokens=chosen), RatingRequest(tokens=rejected)), source=each
            )
            for each, chosen, rejected in zip(pairs, encoded[::2], encoded[1::2], strict=True)
        ]

    def record(self, sample: EvaluationSample, answers: Sequence[EvaluationAnswer]) -> dict[str, Any]:
        """Implements `EvaluationTask.record`."""
        pair: RatedPair = sample.source
        chosen, rejected = (answer.score for answer in answers if isinstance(answer, RatingAnswer))
        return {"subset": pair.subset, "chosen": chosen, "rejected": rejected}

    def measures(self, record: Mapping[str, Any]) -> Mapping[str, Measure]:
        """Implements `EvaluationTask.measures`. Equal scores count half."""
        margin = record["chosen"] - record["rejected"]
        return {"accuracy": Measure(value=0.5 if margin == 0 else float(margin > 0)), "margin": Measure(value=margin)}

    def details(self, records: Sequence[Mapping[str, Any]]) -> TaskDetails:
        """Implements `EvaluationTask.details`: accuracy by subset, and its mean over subsets."""
        by_subset = defaultdict[str, list[Mapping[str, Measure]]](list)
        for record in records:
            by_subset[record["subset"]].append(self.measures(record))
        rows = []
        for subset, measures in sorted(by_subset.items()):
            found = estimate([each["accuracy"] for each in measures])
            margin = mean(each["margin"].value for each in measures)
            rows.append((subset, found.value, found.standard_error, margin, found.num_samples))
        columns = ("subset", "accuracy", "standard_error", "margin", "samples")
        subsets = {str(row[0]): dict(zip(columns[1:], row[1:], strict=True)) for row in rows}
        values = {
            "subsets": subsets,
            "mean_accuracy_of_subsets": mean(row[1] or 0.0 for row in rows) if rows else None,
            "accuracy_of_guessing": 0.5,
        }
        table = ResultTable(title="Accuracy by subset", columns=columns, rows=tuple(rows))
        return TaskDetails(values=values, tables=(table,))


def _pair(values: Mapping[str, Any], place: str) -> RatedPair:
    given = {**values, "prompt": values["messages"]} if "messages" in values and "prompt" not in values else values
    return RatedPair(
        key=key_field(values, place),
        subset=text_field(values, "subset", place) if values.get("subset") is not None else ALL,
        pair=read_pair(given, place),
        place=place,
    )


def _files(config: RewardTaskConfig) -> tuple[str, ...]:
    return (config.path,) if config.path else ()


EVALUATION_TASKS.register(
    NAME,
    EvaluationTaskSpec(
        summary="a reward model's preference for chosen answers, by subset",
        version=1,
        config=RewardTaskConfig,
        build=RewardTask,
        files=_files,
        required=("path",),
        heads=("score",),
    ),
)
