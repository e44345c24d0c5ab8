"""Evaluates answers that a model generates, with scorers of rewards as verifiers. Imports no torch."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from data.chat.encode import check_tokens, encode_prompt
from data.chat.messages import ChatMessage
from data.chat.templates import CHAT_TEMPLATES
from infer.config import Sampling
from infer.evaluate.protocol import (
    EvaluationError,
    EvaluationMetric,
    EvaluationSample,
    EvaluationTask,
    EvaluationTaskConfig,
    GenerationAnswer,
    GenerationRequest,
    Measure,
    Record,
    TaskContext,
    TaskDetails,
    Text,
)
from infer.scoring.ratings import pass_at_k
from infer.scoring.score import SCORERS, VERDICTS, Answer, Problem, Score, TextAnswer
from kernels.ranges import NonNegativeFloat, PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerTaskConfig(EvaluationTaskConfig):
    """How answers are generated. Keys are explained in conf/evaluate.yaml."""

    chat_template: Annotated[str, CHAT_TEMPLATES] | None
    max_new_tokens: PositiveInt
    samples: PositiveInt
    temperature: NonNegativeFloat
    pass_at: tuple[PositiveInt, ...]
    limit: PositiveInt | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A problem, its `id`, and its prompt as a chat and as text to continue."""

    key: str | int
    messages: Sequence[ChatMessage]
    text: str
    problem: Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Verifier:
    """Scores answers to problems, several at a time. `close` ends its processes.

    `stop` has strings that end an answer to a prompt of plain text, `facts` are for results.
    """

    score: Callable[[Answer, Problem], Score]
    close: Callable[[], None]
    num_threads: int
    stop: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def open_scorer(kind: str, config: AnswerTaskConfig, **changes: object) -> Any:
    """Builds a scorer of rewards from a task's keys of the same names."""
    spec = SCORERS.get(kind)
    names = [key.name for key in fields(spec.config) if key.name not in ("kind", "weight", *changes)]
    values = {name: getattr(config, name) for name in names}
    return spec.build(spec.config(kind=kind, weight=1.0, **values, **changes))


def build_answers(
    name: str,
    read: Callable[[Any, TaskContext], list[Question]],
    open_verifier: Callable[[Any], Verifier],
    config: AnswerTaskConfig,
    context: TaskContext,
) -> EvaluationTask:
    """Builds a task from functions that read its problems and open their verifier, which it owns."""
    _check_settings(name, config, context)
    questions = read(config, context)[: config.limit]
    prompts: list[Text] = [question.text for question in questions]
    if config.chat_template is not None:
        template = CHAT_TEMPLATES.get(config.chat_template)
        prompts = [tuple(encode_prompt(question.messages, template, context.tokenizer)) for question in questions]
    verifier = open_verifier(config)
    samples = [
        EvaluationSample(key=question.key, requests=(_request(prompt, verifier, config, context),), source=question)
        for question, prompt in zip(questions, prompts, strict=True)
    ]
    metrics = ("accuracy", *(f"pass_at_{k}" for k in config.pass_at))
    return EvaluationTask(
        metrics=tuple(EvaluationMetric(name=metric) for metric in metrics),
        samples=lambda: samples,
        record=lambda sample, answers: _record(verifier, sample.source.problem, *answers),
        measures=lambda record: _measures(record, config.pass_at),
        details=lambda records: _details(records, verifier.facts),
        num_shots=getattr(config, "num_shots", 0),
        close=verifier.close,
    )


def _request(prompt: Text, verifier: Verifier, config: AnswerTaskConfig, context: TaskContext) -> GenerationRequest:
    return GenerationRequest(
        prompt=prompt,
        max_new_tokens=config.max_new_tokens,
        stop=verifier.stop if config.chat_template is None else (),
        samples=config.samples,
        sampling=Sampling(temperature=config.temperature, seed=context.seed),
    )


def _record(verifier: Verifier, problem: Problem, generated: GenerationAnswer) -> Record:
    drawn = [
        TextAnswer(text=text, num_tokens=count, is_finished=finish == "stop")
        for text, count, finish in zip(generated.continuations, generated.num_tokens, generated.finishes, strict=True)
    ]
    with ThreadPoolExecutor(verifier.num_threads, thread_name_prefix="verifier") as threads:
        scores = list(threads.map(lambda answer: verifier.score(answer, problem), drawn))
    return {
        "answers": list(generated.continuations),
        "outcomes": [score.outcome for score in scores],
        "details": [score.detail for score in scores],
        "num_tokens": list(generated.num_tokens),
        "finishes": list(generated.finishes),
        "num_dropped": generated.num_dropped,
    }


def _measures(record: Mapping[str, Any], pass_at: Sequence[int]) -> dict[str, Measure]:
    """Returns accuracy and pass@k. Answers without a verdict do not count."""
    num_correct = record["outcomes"].count("correct")
    num_judged = sum(outcome in VERDICTS for outcome in record["outcomes"])
    if not num_judged:
        return {}
    rates = {f"pass_at_{k}": pass_at_k(num_judged, num_correct, k) for k in pass_at if k <= num_judged}
    return {name: Measure(value=value) for name, value in {"accuracy": num_correct / num_judged, **rates}.items()}


def _details(records: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> TaskDetails:
    outcomes = Counter(outcome for record in records for outcome in record["outcomes"])
    unjudged = sum(count for outcome, count in outcomes.items() if outcome not in VERDICTS)
    truncated = sum(record["num_dropped"] > 0 for record in records)
    notes = [
        *([f"{unjudged} answers have no verdict and are not counted"] if unjudged else []),
        *([f"{truncated} prompts are longer than fits; their first tokens are dropped"] if truncated else []),
    ]
    values = {
        "outcomes": dict(sorted(outcomes.items())),
        "num_cut_answers": sum(finish == "length" for record in records for finish in record["finishes"]),
        "num_truncated": truncated,
        **facts,
    }
    return TaskDetails(values=values, notes=tuple(notes))


def _check_settings(name: str, config: AnswerTaskConfig, context: TaskContext) -> None:
    """Rejects settings that exclude each other, and a template that the tokenizer cannot write."""
    most = context.max_tokens - 1
    if config.max_new_tokens > most:
        rule = f"must be below model.max_position_tokens={context.max_tokens}"
        raise EvaluationError.broken(f"{name}.max_new_tokens", rule, config.max_new_tokens, most)
    for k in config.pass_at:
        if k > config.samples:
            raise EvaluationError.broken(
                f"{name}.pass_at", f"must be at most {name}.samples={config.samples}", k, config.samples
            )
    if len(set(config.pass_at)) < len(config.pass_at):
        raise EvaluationError.broken(
            f"{name}.pass_at", "must have each value once", list(config.pass_at), sorted(set(config.pass_at))
        )
    if config.samples > 1 and config.temperature == 0:
        rule = f"must be above 0 if {name}.samples={config.samples}"
        raise EvaluationError.broken(f"{name}.temperature", rule, "0, with which all answers are equal", "0.8")
    if config.chat_template is not None:
        template = CHAT_TEMPLATES.get(config.chat_template)
        check_tokens(template.required_tokens, config.chat_template, context.tokenizer, f"{name}.chat_template")
