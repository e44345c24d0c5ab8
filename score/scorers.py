"""Registers the project's scorers: rules of text, a judge's votes, and worker processes."""

import hashlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from base.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from base.refusal import RuleError
from score import ratings
from score.pool import WorkerDiedError, WorkerPool, WorkerProgram, WorkerStartError, WorkerTimeoutError
from score.programs import CodeConfig, CodeScorer
from score.ratings import finished_answer
from score.reward import refuse_without_run
from score.score import (
    SCORERS,
    SKIPPED,
    Answer,
    FunctionScorer,
    Problem,
    Score,
    Scorer,
    ScorerConfig,
    ScorerSpec,
    ScoringError,
    failure,
    final_text,
    last_boxed,
    verdict,
)

JUDGE = "reward.parts, kind judge"


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeConfig(ScorerConfig):
    """The configuration of a judge. Keys are explained in conf/reward/judge.yaml and judge_pairs.yaml."""

    weights: str
    form: Literal["single", "pairs"]
    samples: PositiveInt
    constitution: str
    constitution_path: str | None
    question: str
    mark: str
    accept: str
    reject: str
    thinking: bool
    max_new_tokens: PositiveInt
    temperature: NonNegativeFloat

    @property
    def ckpt(self) -> str | None:
        """The folder of separate weights, or None if the policy or the reference judges."""
        return None if self.weights in ("policy", "reference") else self.weights

    def __post_init__(self) -> None:
        others = ("{other}",) if self.form == "pairs" else ()
        for name in ("{prompt}", "{answer}", *others):
            if name not in self.question:
                rule = f"question must contain {name} with form={self.form}"
                begin = f"{self.question[:40]!r}..."
                raise ScoringError.broken(JUDGE, rule, begin, f"{begin} with {name} added")
        for name in ("accept", "reject"):
            if not getattr(self, name).strip():
                raise ScoringError.broken(JUDGE, f"{name} must have text", repr(getattr(self, name)), name)
        if self.accept.strip().casefold() == self.reject.strip().casefold():
            problem = f"accept and reject must differ, both are {self.accept!r}"
            raise ScoringError(f"{JUDGE}: {problem}; nearest valid: yes and no")

    def check_room(self, most: int, place: str, error: type[RuleError] = ScoringError) -> None:
        """Rejects critiques that leave no room for the question in the judge's positions, which `place` names."""
        if self.max_new_tokens >= most:
            rule = f"max_new_tokens must be below {place}, which also hold the question"
            raise error.broken(JUDGE, rule, self.max_new_tokens, most // 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModelScorerConfig(ScorerConfig):
    """The configuration of the score of a reward model, explained in conf/reward/reward_model.yaml."""

    ckpt: str
    place: Literal["pipeline", "first_rank"]
    batch_size: PositiveInt
    question: str | None = None

    def __post_init__(self) -> None:
        if self.question is not None and "{prompt}" not in self.question:
            rule = "question must contain {prompt}"
            raise ScoringError.broken(
                "reward.parts, kind reward_model", rule, repr(self.question), "{prompt} {expected}"
            )


def read_constitution(config: JudgeConfig) -> str:
    """Returns the judge's principles, from the file if there is one."""
    if config.constitution_path is None:
        return config.constitution
    try:
        return Path(config.constitution_path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        problem = f"constitution_path must be a text file, {config.constitution_path!r} cannot be read ({error})"
        raise ScoringError(f"{JUDGE}: {problem}; nearest valid: null, with the text as constitution") from error


VERIFIER = Path(__file__).with_name("gym_verifier.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class PythonConfig(ScorerConfig):
    """A user's function `score(prompt, answer, expected)`, a call's deadline, and its processes."""

    path: str
    function: str
    seconds: PositiveFloat
    num_workers: PositiveInt


class PoolScorer:
    """Base class of scorers with a pool of workers."""

    _pool: WorkerPool

    def close(self) -> None:
        """Kills the workers."""
        self._pool.close()


class PythonScorer(PoolScorer):
    """Calls the function with the prompt, the whole answer with its thoughts, and the expected answer.

    The function is the user's own code and is trusted as a plugin is: it gets this process' environment.
    """

    def __init__(self, config: PythonConfig) -> None:
        """Starts one worker, which imports the file, or raises `ScoringError` if that fails."""
        path = Path(config.path).expanduser().resolve()
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            problem = f"path must be a Python file, {config.path!r} cannot be read: {error.strerror}"
            near = _nearest_file(path)
            raise ScoringError(f"reward.parts, kind {config.kind}: {problem}; nearest valid: {near}") from error
        program = WorkerProgram(
            Path(__file__).with_name("function_program.py"), (str(path), config.function, digest), dict(os.environ)
        )
        self._name = f"{config.path}: {config.function}"
        self._pool = WorkerPool(
            program, config.num_workers, config.seconds, name=f"{config.kind} ({self._name})", counts_timeouts=True
        )
        try:
            self._pool.start()
        except WorkerStartError as error:
            self._pool.close()
            raise ScoringError(f"reward.parts, kind {config.kind}: {config.path} {error}") from error

    def score(self, answer: Answer, problem: Problem) -> Score:
        """Returns the function's score: unknown if the call takes too long, an error if it fails."""
        return self.call(problem.prompt, answer.text, problem.answer)

    def call(self, prompt: str, answer: str, expected: str | None) -> Score:
        """Returns the score of a call of the function."""
        try:
            reply = self._pool.request({"prompt": prompt, "answer": answer, "expected": expected})
        except WorkerTimeoutError as error:
            return failure("unknown", f"{self._name}: {error}")
        except WorkerDiedError as error:
            return failure("error", f"{self._name}: {error}")
        if "error" in reply:
            return failure("error", f"{self._name}: {reply['error']}")
        return Score(value=reply["value"], outcome=reply["outcome"], detail=reply["detail"])


def _nearest_file(path: Path) -> str:
    names = sorted(sibling.name for sibling in path.parent.glob("*.py")) if path.parent.is_dir() else []
    return ", ".join(names[:3]) or "a file that defines score(prompt, answer, expected)"


@dataclass(frozen=True, kw_only=True, slots=True)
class GymScorerConfig(ScorerConfig):
    """The configuration of the verifiers of reasoning-gym, as `ExactConfig` and `PythonConfig`."""

    boxed: bool
    seconds: PositiveFloat
    num_workers: PositiveInt


class GymScorer(PythonScorer):
    """Verifies answers to problems of `data=reasoning_gym`. One that is partly right has a value below 1."""

    def __init__(self, config: GymScorerConfig) -> None:
        """Starts one worker, which imports the library, or raises `ScoringError` if that fails."""
        if importlib.util.find_spec("reasoning_gym") is None:
            missing = "reward.parts: kind reasoning_gym needs the library reasoning-gym, it is missing"
            raise ScoringError(f"{missing}; run pip install '.[reasoning]'")
        self._boxed = config.boxed
        super().__init__(
            PythonConfig(
                kind=config.kind,
                weight=config.weight,
                path=str(VERIFIER),
                function="score",
                seconds=config.seconds,
                num_workers=config.num_workers,
            )
        )

    def score(self, answer: Answer, problem: Problem) -> Score:
        """Returns the verifier's score. Problems of other sources are skipped."""
        if problem.origin is None:
            return SKIPPED
        text = finished_answer(answer, boxed=self._boxed)
        return text if isinstance(text, Score) else self.call(problem.prompt, text.strip(), problem.origin)


LONGEST_ANSWER = 2000  # longer boxes are no answers. Parsers take minutes for them.


@dataclass(frozen=True, kw_only=True, slots=True)
class MathsConfig(ScorerConfig):
    """The deadline of one comparison, the number of processes that compare, and the address space of each."""

    seconds: PositiveFloat
    num_workers: PositiveInt
    memory_gib: PositiveFloat


class MathsScorer(PoolScorer):
    """Compares the last box after the thoughts with the problem's answer.

    A comparison may take minutes and all memory, so it runs in worker processes, which are killed.
    """

    def __init__(self, config: MathsConfig) -> None:
        """Prepares the workers, or raises `ScoringError` if math-verify is not installed."""
        if importlib.util.find_spec("math_verify") is None:
            raise ScoringError("reward.parts: kind maths needs math-verify, it is missing; run pip install '.[score]'")
        program = WorkerProgram(Path(__file__).with_name("maths_program.py"), (str(int(config.memory_gib * 2**30)),))
        self._pool = WorkerPool(program, config.num_workers, config.seconds, name="maths")

    def score(self, answer: Answer, problem: Problem) -> Score:
        """Returns 1 if both are equal. A comparison that takes too long is a timeout, one that fails an error."""
        if problem.answer is None:
            return SKIPPED
        box = last_boxed(final_text(answer.text))
        if not box:
            return failure("missing", "no boxed answer after the thoughts")
        if len(box) > LONGEST_ANSWER:
            return verdict(is_correct=False, detail=f"the box has more than {LONGEST_ANSWER} characters")
        expected = last_boxed(problem.answer) or problem.answer
        try:
            reply = self._pool.request({"expected": expected, "found": box})
        except WorkerTimeoutError:
            return failure("timeout", f"comparing {box[:60]!r} took too long")
        except WorkerDiedError as error:
            return failure("error", str(error))
        if reply["outcome"] in ("error", "timeout"):
            return failure(reply["outcome"], reply["detail"])
        return verdict(is_correct=reply["outcome"] == "correct", detail=reply["detail"] or box[:80])


def _rating(summary: str, config: type[ScorerConfig], score: Callable[[Any, Answer, Problem], Score]) -> ScorerSpec:
    """Returns a scorer of the text alone, without a verdict."""
    return ScorerSpec(summary, config, partial(FunctionScorer, score), has_verdict=False)


def _of_processes(summary: str, config: type[ScorerConfig], build: Callable[[Any], Scorer], needs: str) -> ScorerSpec:
    """Returns a scorer with a verdict that kills its processes at a deadline."""
    return ScorerSpec(summary, config, build, has_verdict=True, needs=needs, has_deadline=True)


def _of_model(summary: str, config: type[ScorerConfig]) -> ScorerSpec:
    """Returns a scorer that needs a model on the ranks of a training run."""
    return ScorerSpec(summary, config, refuse_without_run, has_verdict=False, needs_model=True)


_EXACT = _rating("the text after the thoughts is the answer", ratings.ExactConfig, ratings.score_exact)
_PYTHON = ScorerSpec("a function of a Python file", PythonConfig, PythonScorer, has_verdict=False, has_deadline=True)
_PLURALITY = "the answer is the plurality of its group"
_SPECS = {
    "exact": replace(_EXACT, has_verdict=True, needs="answer"),
    "maths": _of_processes("the last box is proven equal to the answer", MathsConfig, MathsScorer, "answer"),
    "code": _of_processes("the last block of Python passes the problem's tests", CodeConfig, CodeScorer, "tests"),
    "format": _rating("thoughts, box and code are in place", ratings.FormatConfig, ratings.score_format),
    "language": _rating("share of letters in one language", ratings.LanguageConfig, ratings.score_language),
    "length": _rating("0, or down to -1 near a limit of tokens", ratings.LengthConfig, ratings.score_length),
    "repetition": _rating("minus the share of repeated n-grams", ratings.RepetitionConfig, ratings.score_repetition),
    "python": _PYTHON,
    "reasoning_gym": _of_processes("reasoning-gym's own verifier", GymScorerConfig, GymScorer, "origin"),
    "plurality": ScorerSpec(_PLURALITY, ratings.PluralityConfig, ratings.PluralityScorer, has_verdict=False),
    "judge": _of_model("share of a judge's votes for the answer", JudgeConfig),
    "reward_model": _of_model("score of a trained reward model", RewardModelScorerConfig),
}
for _kind, _spec in _SPECS.items():
    SCORERS.register(_kind, _spec)
