"""Evaluates answers that a model generates: accuracy, and pass@k of several answers. Imports no torch.

Tasks that differ only in their problems and in their judge build an `AnswerTask`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

from data.chat.encode import check_tokens, encode_prompt
from data.chat.messages import ChatMessage
from data.chat.templates import CHAT_TEMPLATES
from infer.config import Sampling
from infer.evaluate.config import EvaluationError, EvaluationTaskConfig
from infer.evaluate.protocol import EvaluationMetric, EvaluationSample, Measure, TaskContext, TaskDetails
from infer.evaluate.requests import EvaluationAnswer, GenerationAnswer, GenerationRequest, Text
from infer.scoring.pass_rates import pass_at_k
from infer.scoring.score import VERDICTS, Answer, Score
from kernels.ranges import NonNegativeFloat, PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerTaskConfig(EvaluationTaskConfig):
    """How answers are generated.

    Attributes:
        chat_template: name of the chat template of the prompts; None: plain text.
        max_new_tokens: maximum number of tokens of an answer.
        samples: number of answers to each problem.
        temperature: divisor of the logits; 0 chooses the most probable token.
        pass_at: values of k for which pass@k is estimated, each at most `samples`.
        limit: maximum number of problems; None: all.
    """

    chat_template: Annotated[str, CHAT_TEMPLATES] | None
    max_new_tokens: PositiveInt
    samples: PositiveInt
    temperature: NonNegativeFloat
    pass_at: tuple[PositiveInt, ...]
    limit: PositiveInt | None


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerProblem:
    """A problem: its `id`, the prompt, the group that it is counted in, and what the judge needs."""

    key: str | int
    prompt: Text
    source: Any
    group: str | None = None


class AnswerTask:
    """Problems whose answers are generated and judged."""

    num_shots = 0

    def __init__(
        self,
        config: AnswerTaskConfig,
        context: TaskContext,
        problems: Sequence[AnswerProblem],
        judge: "AnswerJudge",
    ) -> None:
        """Makes a request of each problem.

        Args:
            config: of the task, checked by `check_settings`.
            judge: scores answers. The task owns it.
        """
        self._config, self._judge = config, judge
        at = tuple(EvaluationMetric(name=f"pass_at_{k}") for k in config.pass_at)
        self.metrics = (EvaluationMetric(name="accuracy"), *at)
        sampling = Sampling(temperature=config.temperature, seed=context.seed)
        self._samples = [
            EvaluationSample(
                key=problem.key,
                requests=(
                    GenerationRequest(
                        prompt=problem.prompt,
                        max_new_tokens=config.max_new_tokens,
                        stop=judge.stop if config.chat_template is None else (),
                        samples=config.samples,
                        sampling=sampling,
                    ),
                ),
                source=problem,
            )
            for problem in problems[: config.limit]
        ]

    def samples(self) -> Sequence[EvaluationSample]:
        """Implements `EvaluationTask.samples`: a request for all answers to a problem."""
        return self._samples

    def record(self, sample: EvaluationSample, answers: Sequence[EvaluationAnswer]) -> dict[str, Any]:
        """Implements `EvaluationTask.record`."""
        problem: AnswerProblem = sample.source
        (given,) = answers
        assert isinstance(given, GenerationAnswer)
        drawn = [
            Answer(text=text, num_tokens=count, is_finished=finish == "stop")
            for text, count, finish in zip(given.continuations, given.num_tokens, given.finishes, strict=True)
        ]
        scores = self._judge.score_all(drawn, problem.source)
        return {
            **({} if problem.group is None else {"group": problem.group}),
            "answers": list(given.continuations),
            "outcomes": [score.outcome for score in scores],
            "details": [score.detail for score in scores],
            "num_tokens": list(given.num_tokens),
            "finishes": list(given.finishes),
            "num_dropped": given.num_dropped,
        }

    def measures(self, record: Mapping[str, Any]) -> Mapping[str, Measure]:
        """Implements `EvaluationTask.measures`. Answers without a verdict do not count."""
        num_correct, num_judged = _counts(record)
        if not num_judged:
            return {}
        found = {"accuracy": Measure(value=num_correct / num_judged)}
        for k in self._config.pass_at:
            if k <= num_judged:
                found[f"pass_at_{k}"] = Measure(value=pass_at_k(num_judged, num_correct, k))
        return found

    def details(self, records: Sequence[Mapping[str, Any]]) -> TaskDetails:
        """Implements `EvaluationTask.details`: how many answers had which outcome."""
        outcomes = Counter(outcome for record in records for outcome in record["outcomes"])
        unjudged = sum(count for outcome, count in outcomes.items() if outcome not in VERDICTS)
        cut = sum(finish == "length" for record in records for finish in record["finishes"])
        truncated = sum(record["num_dropped"] > 0 for record in records)
        notes = [
            *([f"{unjudged} answers have no verdict and are not counted"] if unjudged else []),
            *([f"{truncated} prompts are longer than fits; their first tokens are dropped"] if truncated else []),
        ]
        values = {
            "outcomes": dict(sorted(outcomes.items())),
            "num_cut_answers": cut,
            "num_truncated": truncated,
            **self._judge.facts,
        }
        return TaskDetails(values=values, notes=tuple(notes))

    def close(self) -> None:
        """Ends the judge's processes."""
        self._judge.close()


class AnswerJudge:
    """Scores answers to problems.

    Attributes:
        stop: strings that end an answer to a prompt of plain text.
        facts: about the judge, for the results.
    """

    def __init__(
        self,
        score: Callable[[Answer, Any], Score],
        close: Callable[[], None],
        *,
        stop: tuple[str, ...] = (),
        num_threads: int = 1,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Stores the arguments.

        Args:
            score: scores an answer, given the problem's `source`.
            close: ends the processes of `score`.
            stop: strings that end an answer to a prompt of plain text.
            num_threads: number of answers that are scored at the same time.
        """
        self._score, self._close, self.stop, self.facts = score, close, stop, dict(facts or {})
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="judge")

    def score_all(self, answers: Sequence[Answer], source: Any) -> list[Score]:
        """Scores the answers to a problem, in their order."""
        return list(self._threads.map(lambda answer: self._score(answer, source), answers))

    def close(self) -> None:
        """Ends threads and processes."""
        self._threads.shutdown()
        self._close()


def check_settings(name: str, config: AnswerTaskConfig, context: TaskContext) -> None:
    """Rejects settings that exclude each other, and a template that the tokenizer cannot write.

    Args:
        name: of the task, for errors.

    Raises:
        EvaluationError, DataError: names the key.
    """
    most = context.max_tokens - 1
    if config.max_new_tokens > most:
        raise EvaluationError(
            f"{name}.max_new_tokens: must be below model.max_position_tokens={context.max_tokens}, is "
            f"{config.max_new_tokens}; nearest valid: {most}"
        )
    for k in config.pass_at:
        if k > config.samples:
            raise EvaluationError(
                f"{name}.pass_at: must be at most {name}.samples={config.samples}, is {k}; nearest valid: "
                f"{config.samples}"
            )
    if len(set(config.pass_at)) < len(config.pass_at):
        raise EvaluationError(
            f"{name}.pass_at: must have each value once, is {list(config.pass_at)}; nearest valid: "
            f"{sorted(set(config.pass_at))}"
        )
    if config.samples > 1 and config.temperature == 0:
        raise EvaluationError(
            f"{name}.temperature: must be above 0 if {name}.samples={config.samples}, is 0, with which all answers "
            f"are equal; nearest valid: 0.8"
        )
    if config.chat_template is not None:
        template = CHAT_TEMPLATES.get(config.chat_template)
        check_tokens(template.required_tokens, config.chat_template, context.tokenizer, f"{name}.chat_template")


def chat_or_text(config: AnswerTaskConfig, context: TaskContext, messages: Sequence[ChatMessage], text: str) -> Text:
    """Returns a prompt in the form that the configuration wants.

    Args:
        messages: the prompt as a conversation.
        text: the prompt as text to continue.
    """
    if config.chat_template is None:
        return text
    return tuple(encode_prompt(messages, CHAT_TEMPLATES.get(config.chat_template), context.tokenizer))


def _counts(record: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the numbers of correct answers and of those with a verdict."""
    outcomes = record["outcomes"]
    return outcomes.count("correct"), sum(outcome in VERDICTS for outcome in outcomes)
