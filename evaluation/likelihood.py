"""Evaluates choices and documents by likelihood, and pairs of answers by a reward model.

choice: `{"id": ..., "context": ..., "choices": [...], "answer": 0}`. The begin-of-sentence token, the context and a
choice are joined without anything between them, so a choice begins with the space that it needs.
bits_per_byte: a document is read in windows, and every token is scored once. The number of bytes is that of the text in
UTF-8, so the tokenizer does not matter.
reward: how often the chosen answer has the higher score. A line of the file is `{"id": ..., "subset": ..., "prompt":
..., "chosen": ..., "rejected": ...}`. `messages` may replace `prompt`. Prompts and answers are strings, or lists of
messages as in `data=preferences`. The form and the accuracy by subset are those of RewardBench (arXiv:2403.13787).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Annotated, Any

from base.ranges import NonNegativeInt, PositiveInt
from data.chat.encode import check_tokens, encode_conversations
from data.chat.messages import AnswerPair, read_pair
from data.chat.templates import CHAT_TEMPLATES
from data.corpus import DataError, describe, list_of, refusal, text_of
from evaluation.answers import target_sequence
from evaluation.protocol import (
    ContinuationRequest,
    DocumentRequest,
    EvaluationError,
    EvaluationMetric,
    EvaluationSample,
    EvaluationTask,
    EvaluationTaskConfig,
    LikelihoodAnswer,
    Measure,
    RatingRequest,
    Record,
    ResultTable,
    SampleLine,
    TaskContext,
    TaskDetails,
    checked_file,
    field_of,
    needed_path,
    read_samples,
    read_text,
    text_field,
)
from evaluation.statistics import estimate, group_by

MOST_CHOICES = 1000
_CHOICE_EXAMPLE = 'lines {"id": "1", "context": "1+1=", "choices": ["2", "3"], "answer": 0}'


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceConfig(EvaluationTaskConfig):
    """Multiple choice. Keys are explained in conf/evaluate.yaml."""

    path: str | None
    num_shots: NonNegativeInt
    shots_path: str | None
    limit: PositiveInt | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceQuestion:
    """A question: what precedes each choice, the choices, and the number of the right one, from 0."""

    context: str
    choices: tuple[str, ...]
    answer: int


def choice_files(config: ChoiceConfig) -> tuple[str, ...]:
    """Returns the files of questions and examples."""
    return tuple(path for path in (config.path, config.shots_path if config.num_shots else None) if path)


def build_choice(config: ChoiceConfig, context: TaskContext) -> EvaluationTask:
    """Builds the task `choice`: the most likely choice is the answer."""
    questions = read_samples("choice.path", needed_path("choice.path", config.path, _CHOICE_EXAMPLE), _read_choices)
    shots = questions[: config.num_shots]
    if config.num_shots and config.shots_path is not None:
        shots = read_samples("choice.shots_path", config.shots_path, _read_choices)[: config.num_shots]
    elif config.num_shots:
        questions = questions[config.num_shots :]
    if len(shots) < config.num_shots or not questions:
        value = f"{config.num_shots}, there are {len(shots)} examples"
        near = max(0, len(shots) - (config.shots_path is None))
        rule = "must leave a question and have as many examples"
        raise EvaluationError.broken("choice.num_shots", rule, value, near)
    solved = [shot.value for shot in shots]
    prefix = "".join(f"{shot.context}{shot.choices[shot.answer]}\n\n" for shot in solved)
    samples = [_choice_sample(question, prefix, context) for question in questions[: config.limit]]
    return EvaluationTask(
        metrics=(EvaluationMetric(name="accuracy"), EvaluationMetric(name="accuracy_per_byte")),
        samples=lambda: samples,
        record=_choice_record,
        measures=lambda record: {
            "accuracy": Measure(value=float(record["chosen"] == record["answer"])),
            "accuracy_per_byte": Measure(value=float(record["chosen_per_byte"] == record["answer"])),
        },
        details=_choice_details,
        num_shots=config.num_shots,
    )


def _choice_sample(question: SampleLine[ChoiceQuestion], prefix: str, context: TaskContext) -> EvaluationSample:
    requests = tuple(
        ContinuationRequest(
            context=prefix + question.value.context,
            continuation=choice,
            place=f"{question.place}: choices[{number}]",
        )
        for number, choice in enumerate(question.value.choices)
    )
    for request in requests:
        target_sequence(context.tokenizer, request, context.max_tokens)  # rejects choices that are too long
    return EvaluationSample(key=question.key, requests=requests, source=question.value)


def _choice_record(sample: EvaluationSample, answers: Sequence[LikelihoodAnswer]) -> Record:
    question: ChoiceQuestion = sample.source
    values = [answer.log_likelihood for answer in answers]
    sizes = [max(1, len(choice.encode())) for choice in question.choices]
    per_byte = [value / size for value, size in zip(values, sizes, strict=True)]
    return {
        "loglikelihoods": values,
        "is_greedy": [answer.is_greedy for answer in answers],
        "answer": question.answer,
        "chosen": values.index(max(values)),
        "chosen_per_byte": per_byte.index(max(per_byte)),
        "num_dropped": max(answer.num_dropped for answer in answers),
    }


def _choice_details(records: Sequence[Mapping[str, Any]]) -> TaskDetails:
    truncated = sum(record["num_dropped"] > 0 for record in records)
    guessing = sum(1 / len(record["loglikelihoods"]) for record in records) / max(1, len(records))
    note = f"{truncated} contexts are longer than the model's positions; their first tokens are dropped"
    values = {"num_truncated": truncated, "accuracy_of_guessing": guessing}
    return TaskDetails(values=values, notes=(note,) if truncated else ())


def _read_choices(values: Mapping[str, Any], place: str) -> ChoiceQuestion:
    choices = list_of(field_of(values, "choices", place), f"{place}: choices", text_of)
    if len(choices) > MOST_CHOICES:
        raise DataError(f"{place}: choices: must have at most {MOST_CHOICES} items, has {len(choices)}")
    for number, choice in enumerate(choices):
        if not choice:
            raise DataError(f'{place}: choices[{number}]: must have text, is ""; nearest: leave the choice out')
    answer = field_of(values, "answer", place)
    if type(answer) is not int or not 0 <= answer < len(choices):
        last = len(choices) - 1
        near = min(max(answer, 0), last) if type(answer) is int else 0
        raise refusal(f"{place}: answer", f"must be the number of a choice, from 0 to {last}", describe(answer), near)
    return ChoiceQuestion(context=text_field(values, "context", place), choices=choices, answer=answer)


TEXT_SUFFIXES = (".txt", ".md")
_DOCUMENT_EXAMPLE = 'lines {"id": "1", "text": "..."}'
_PAIR_EXAMPLE = 'lines {"id": "1", "subset": "chat", "prompt": "1+1?", "chosen": "2", "rejected": "3"}'


@dataclass(frozen=True, kw_only=True, slots=True)
class BitsPerByteConfig(EvaluationTaskConfig):
    """Bits per byte of documents. Keys are explained in conf/evaluate.yaml."""

    path: str | None
    window_tokens: PositiveInt | None
    stride_tokens: PositiveInt | None
    loads: bool
    limit: PositiveInt | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedDocument:
    """A document, and the source that it is counted for."""

    source: str
    text: str


def build_bits_per_byte(config: BitsPerByteConfig, context: TaskContext) -> EvaluationTask:
    """Builds the task `bits_per_byte`."""
    documents = read_documents("bits_per_byte.path", needed_path("bits_per_byte.path", config.path, _DOCUMENT_EXAMPLE))
    window = min(config.window_tokens or context.max_tokens, context.max_tokens)
    if (config.stride_tokens or window) > window:
        rule = f"must be at most the window's {window} tokens"
        raise EvaluationError.broken("bits_per_byte.stride_tokens", rule, config.stride_tokens, window)
    if config.loads and not context.counts_loads:
        rule = "must be false on several ranks and during training"
        raise EvaluationError.broken("bits_per_byte.loads", rule, "true", "launch.evaluate with parallelism=one_rank")
    windowed: Any = {"window": window, "stride": config.stride_tokens, "loads": config.loads}
    samples = [
        EvaluationSample(
            key=document.key,
            requests=(DocumentRequest(text=document.value.text, **windowed),),
            source=document.value,
        )
        for document in documents[: config.limit]
    ]
    windows = {"window_tokens": window, "stride_tokens": config.stride_tokens or window}
    return EvaluationTask(
        metrics=(EvaluationMetric(name="bits_per_byte", higher_is_better=False),),
        samples=lambda: samples,
        record=_document_record,
        measures=lambda record: {
            "bits_per_byte": Measure(value=-record["loglikelihood"] / math.log(2), weight=float(record["num_bytes"]))
        },
        details=lambda records: _document_details(records, windows),
    )


def _document_record(sample: EvaluationSample, answers: Sequence[LikelihoodAnswer]) -> Record:
    document: EvaluatedDocument = sample.source
    (answer,) = answers
    return {
        "source": document.source,
        "loglikelihood": answer.log_likelihood,
        "num_tokens": answer.num_tokens,
        "num_bytes": len(document.text.encode()),
        **({"loads": answer.loads} if answer.loads else {}),
    }


def _document_details(records: Sequence[Mapping[str, Any]], windows: Mapping[str, int]) -> TaskDetails:
    sources = {source: _sums(group) for source, group in sorted(group_by(records, "source").items())}
    columns = ("documents", "num_bytes", "num_tokens", "bits_per_byte", "nats_per_token")
    rows = tuple((source, *(values[name] for name in columns)) for source, values in sources.items())
    table = ResultTable(title="Bits per byte of each source", columns=("source", *columns), rows=rows)
    totals = {name: value for name, value in _sums(records).items() if name not in ("documents", "bits_per_byte")}
    return TaskDetails(values={**totals, **windows, "sources": sources}, tables=(table,))


def _sums(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    nats = -math.fsum(record["loglikelihood"] for record in records)
    num_bytes = sum(record["num_bytes"] for record in records)
    num_tokens = sum(record["num_tokens"] for record in records)
    return {
        "documents": len(records),
        "num_bytes": num_bytes,
        "num_tokens": num_tokens,
        "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else None,
        "nats_per_token": nats / num_tokens if num_tokens else None,
    }


def read_documents(key: str, path: str) -> list[SampleLine[EvaluatedDocument]]:
    """Reads documents, each counted for its `source` or else the file: of `.jsonl`, or one of text."""
    file = checked_file(key, path)
    if file.suffix in TEXT_SUFFIXES:
        text = read_text(key, file)
        if not text:
            raise DataError(f"{key}: {file} must have text, is empty; nearest: another file")
        return [SampleLine(file.name, EvaluatedDocument(source=file.name, text=text), f"{key}: {file}")]
    if file.suffix != ".jsonl":
        raise DataError(f"{key}: must be a .jsonl, .txt or .md file, is {path!r}; nearest: {file.stem}.jsonl")

    def read(values: Mapping[str, Any], place: str) -> EvaluatedDocument:
        source = text_field(values, "source", place) if values.get("source") is not None else file.name
        return EvaluatedDocument(source=source, text=text_field(values, "text", place))

    documents = read_samples(key, path, read)
    if not any(document.value.text for document in documents):
        raise DataError(f"{key}: {path} must have text, all documents are empty; nearest: another file")
    return documents


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardTaskConfig(EvaluationTaskConfig):
    """Pairs of answers. Keys are explained in conf/evaluate.yaml."""

    path: str | None
    chat_template: Annotated[str, CHAT_TEMPLATES]
    limit: PositiveInt | None


def build_reward(config: RewardTaskConfig, context: TaskContext) -> EvaluationTask:
    """Builds the task `reward`."""
    template = CHAT_TEMPLATES.get(config.chat_template)
    check_tokens(template.required_tokens, config.chat_template, context.tokenizer, "reward.chat_template")
    lines = read_samples("reward.path", needed_path("reward.path", config.path, _PAIR_EXAMPLE), _read_rated_pair)
    lines = lines[: config.limit]
    pairs = [line.value[1] for line in lines]
    both = [conversation for pair in pairs for conversation in (pair.chosen, pair.rejected)]
    encoded = [tuple(chat.ids) for chat in encode_conversations(both, template, context.tokenizer)]
    for number, ids in enumerate(encoded):
        if len(ids) > context.max_tokens:
            name = ("chosen", "rejected")[number % 2]
            rule = f"must have at most model.max_position_tokens={context.max_tokens} tokens with {name}"
            raise EvaluationError.broken(lines[number // 2].place, rule, len(ids), "leave the line out")
    samples = [
        EvaluationSample(
            key=line.key,
            requests=(RatingRequest(tokens=chosen), RatingRequest(tokens=rejected)),
            source=line.value[0],
        )
        for line, chosen, rejected in zip(lines, encoded[::2], encoded[1::2], strict=True)
    ]
    return EvaluationTask(
        metrics=(EvaluationMetric(name="accuracy"), EvaluationMetric(name="margin")),
        samples=lambda: samples,
        record=lambda sample, scores: {"subset": sample.source, "chosen": scores[0], "rejected": scores[1]},
        measures=_pair_measures,
        details=_pair_details,
    )


def _pair_measures(record: Mapping[str, Any]) -> Mapping[str, Measure]:
    """Returns accuracy and margin. Equal scores count half."""
    margin = record["chosen"] - record["rejected"]
    return {"accuracy": Measure(value=0.5 if margin == 0 else float(margin > 0)), "margin": Measure(value=margin)}


def _pair_details(records: Sequence[Mapping[str, Any]]) -> TaskDetails:
    rows = []
    for subset, group in sorted(group_by(records, "subset").items()):
        measures = [_pair_measures(record) for record in group]
        accuracy = estimate([measure["accuracy"] for measure in measures])
        margin = mean(measure["margin"].value for measure in measures)
        rows.append((subset, accuracy.value, accuracy.standard_error, margin, accuracy.num_samples))
    columns = ("subset", "accuracy", "standard_error", "margin", "samples")
    values = {
        "subsets": {str(row[0]): dict(zip(columns[1:], row[1:], strict=True)) for row in rows},
        "mean_accuracy_of_subsets": mean(row[1] or 0.0 for row in rows) if rows else None,
        "accuracy_of_guessing": 0.5,
    }
    table = ResultTable(title="Accuracy by subset", columns=columns, rows=tuple(rows))
    return TaskDetails(values=values, tables=(table,))


def _read_rated_pair(values: Mapping[str, Any], place: str) -> tuple[str, AnswerPair]:
    has_messages = "messages" in values and "prompt" not in values
    subset = text_field(values, "subset", place) if values.get("subset") is not None else "all"
    return subset, read_pair({**values, "prompt": values["messages"]} if has_messages else values, place)
