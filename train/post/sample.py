"""Draws prompts by the seed alone, and defines a rollout with its advantages and statistics.

No torch here. Sources: arXiv:2402.03300 (standardized advantages), arXiv:2503.20783 (centered).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from base.refusal import ConfigError
from data.chat.encode import encode_prompt
from data.chat.messages import ChatMessage
from data.chat.templates import CHAT_TEMPLATES, ChatTemplate
from data.mix.mixture import Mixture
from data.problems import ProblemRecord, split_problems, take_turns
from data.shards.open import Prepared
from data.special_tokens import THINK
from data.tokenizer import Tokenizer
from infer.protocol import PROMPT_SAMPLE, Group, Sample, SampledRoutes
from score.reward import ScoreSheet, part_kind
from score.score import SCORERS, VERDICTS, problem_of
from train.config import TrainConfig
from train.config.tasks import RolloutConfig
from train.terminal import printable


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptForm:
    """How problems are rendered as prompts, and answers are decoded."""

    template: ChatTemplate
    tokenizer: Tokenizer
    thinking: bool

    def tokens(self, problem: ProblemRecord) -> tuple[int, ...]:
        """Returns the token ids of a problem, up to where the answer begins."""
        return self.encode(problem.messages)

    def encode(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Returns the token ids of messages, up to where the answer begins."""
        return tuple(encode_prompt(messages, self.template, self.tokenizer, thinking=self.thinking))

    def group(self, problem: ProblemRecord, number: int) -> Group:
        """Returns the group of a problem before its answers are sampled."""
        return Group(number=number, tokens=self.tokens(problem), key=problem.key, problem=problem_of(problem))

    def text(self, answer: Sample) -> str:
        """Decodes an answer. Thoughts that the prompt opened are opened again, so that scorers see them."""
        text = self.tokenizer.decode(answer.tokens[:-1] if answer.is_finished else answer.tokens)
        return THINK + text if self.thinking else text


class PromptOrder:
    """The order of prompts: sources by weight, and a new permutation of a source in each epoch."""

    def __init__(self, problems: Sequence[ProblemRecord], form: PromptForm, order: Mixture) -> None:
        self._problems = problems
        self._form = form
        self._order = order

    def take(self, first: int, count: int) -> list[Group]:
        """Returns the prompts at `count` positions from `first` on, with the position as number."""
        numbers = self._order.range(first, count).tolist()
        return [self._form.group(self._problems[number], first + at) for at, number in enumerate(numbers)]


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutHeader:
    """What a rollout was made with, and numbers of it.

    Rollouts count from 0; `step`, the first training step that learns from it, from 1.
    `next_prompt` is the position of the first prompt after it; before it is sampled, that of its first prompt.
    """

    rollout: int
    step: int
    weights: str
    settings: str
    next_prompt: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """What identifies the weights and settings that sampled it."""
        return f"{self.weights} {self.settings}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RolloutRoutes:
    """A rank's records of the experts of a rollout's tokens; the requests decide which rank has a record."""

    sampled: SampledRoutes
    requests: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredRollout:
    """All groups of a rollout, equal on all ranks except for the records of experts, if there are any."""

    header: RolloutHeader
    groups: tuple[Group, ...]
    routes: RolloutRoutes | None = field(default=None, compare=False)

    @property
    def answers(self) -> list[Sample]:
        """All answers by group and sample."""
        return [answer for group in self.groups for answer in group.answers]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerPlace:
    """The batch, the row in it and the position of the prompt's first token at which an answer is trained."""

    prompt: int
    sample: int
    prompt_tokens: int
    answer_tokens: int
    batch: int
    row: int
    start: int

    @property
    def first(self) -> int:
        """The position that predicts the answer's first token."""
        return self.start + self.prompt_tokens - 1

    def records(self) -> Iterator[tuple[int, int, int]]:
        """Yields sample, first position and number of tokens of each of its records of experts."""
        yield PROMPT_SAMPLE, self.start, self.prompt_tokens
        # The sampler does not read the last token.
        if self.answer_tokens > 1:
            yield self.sample, self.first + 1, self.answer_tokens - 1


def prompt_form(config: TrainConfig, prepared: Prepared) -> PromptForm:
    """Returns how a run that learns from rewards renders its problems."""
    assert config.rollout is not None
    assert config.data.source.chat_template is not None
    template = CHAT_TEMPLATES.get(config.data.source.chat_template)
    thinking = template.thinks if config.rollout.thinking is None else config.rollout.thinking
    return PromptForm(template=template, tokenizer=prepared.tokenizer, thinking=thinking)


def read_problems(
    config: TrainConfig, rollouts: RolloutConfig, form: PromptForm, say: Callable[[str], object]
) -> tuple[list[ProblemRecord], list[ProblemRecord]]:
    """Returns the problems to train on and the held-out ones, of those that leave room for an answer.

    Raises:
        ConfigError: no problem to train on has room for an answer.
    """
    train, held_out = split_problems(config.data)
    room = config.batch.sequence_length_tokens - rollouts.max_new_tokens
    fitting, fitting_held_out = (
        [problem for problem in problems if len(form.tokens(problem)) <= room] for problems in (train, held_out)
    )
    if not fitting:
        raise ConfigError(
            f"rollout.max_new_tokens: must leave room for a prompt in batch.sequence_length_tokens, leaves {room} "
            f"tokens, and none of {len(train)} prompts has so few; nearest valid: a larger "
            f"batch.sequence_length_tokens"
        )
    if len(fitting) < len(train):
        say(f"problems: {len(train) - len(fitting):,} of {len(train):,} have too long prompts and are not trained")
    if len(fitting_held_out) < rollouts.held_out:
        say(
            f"held-out problems: {len(fitting_held_out)}, below rollout.held_out={rollouts.held_out}, because "
            f"data.validation_fraction={config.data.validation_fraction:g} holds out {len(held_out)} problems, "
            f"{len(held_out) - len(fitting_held_out)} of them with too long prompts; nearest: a larger fraction"
        )
    return fitting, take_turns(fitting_held_out, config.data.seed)


AdvantageKind = Literal["standardized", "centered"]
EQUAL = "equal rewards"
NO_VERDICT = "no verdict"
PASS_AT_1 = "pass_at_1"
_LONGEST_REASON = 200


def advantages(rewards: Sequence[float], kind: AdvantageKind) -> list[float]:
    """Returns advantages of a group: centered, or also divided by the deviation. Equal rewards give 0."""
    if all(reward == rewards[0] for reward in rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    centered = [reward - mean for reward in rewards]
    if kind == "centered":
        return centered
    deviation = math.sqrt(math.fsum(value * value for value in centered) / len(centered))
    return [value / deviation for value in centered]


def with_advantages(group: Group, kind: AdvantageKind, *, drop_equal: bool) -> Group:
    """Returns a group with the advantages of its answers, or marked as not trained."""
    if group.dropped:
        return group
    rewards = [answer.reward for answer in group.answers]
    if drop_equal and all(reward == rewards[0] for reward in rewards):
        return replace(group, dropped=EQUAL)
    values = zip(group.answers, advantages(rewards, kind), strict=True)
    answers: tuple[Sample, ...] = tuple(replace(answer, advantage=value) for answer, value in values)
    return replace(group, answers=answers)


def rollout_metrics(rollout: ScoredRollout, step: int) -> dict[str, Any]:
    """Returns numbers of a rollout, over the whole job.

    `entropy` is that of the sampler, in nats per token. Answers without a verdict have no part in rewards and in
    `correct_share`; a rollout that has no other answers lacks both.
    """
    answers = rollout.answers
    groups = rollout.groups
    num_equal = sum(map(has_equal_rewards, groups))
    num_unjudged = sum(group.dropped.startswith(NO_VERDICT) for group in groups)
    rewards = [answer.reward for answer in answers if answer.sheet.is_verdict]
    mean = math.fsum(rewards) / max(len(rewards), 1)
    deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / max(len(rewards), 1))
    unjudged = [answer.sheet for answer in answers if not answer.sheet.is_verdict]
    # A hostile program may have chosen the text.
    reason = " ".join(unjudged[0].fault.split()) if unjudged else ""
    tokens = [answer.num_tokens for answer in answers]
    checked = [is_right(answer.sheet) for answer in answers]
    num_checked = len(checked) - checked.count(None)
    return {
        "answers": len(answers),
        **({"reward": mean, "reward_deviation": deviation} if rewards else {}),
        "parts": part_means(answers),
        **({"correct_share": checked.count(True) / num_checked} if num_checked else {}),
        "groups": len(groups),
        "equal_share": num_equal / len(groups),
        "no_verdict_share": len(unjudged) / len(answers),
        **({"no_verdict_reason": printable(reason[:_LONGEST_REASON])} if reason else {}),
        "no_verdict_groups": num_unjudged / len(groups),
        "idle_share": (num_equal + num_unjudged) / len(groups),
        "skipped_share": sum(answer.sheet.outcome == "skipped" for answer in answers) / len(answers),
        "draws": rollout.header.counts["draws"],
        "entropy": -math.fsum(value for answer in answers for value in answer.log_probs) / max(sum(tokens), 1),
        "mean_tokens": sum(tokens) / len(tokens),
        "most_tokens": max(tokens),
        "cut_share": sum(not answer.is_finished for answer in answers) / len(answers),
        "versions_behind": step - min(answer.version for answer in answers),
        "part_seconds": dict(rollout.header.seconds),
    }


def held_out_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Returns measurements of scored answers to held-out problems.

    These are pass_at_1 and pass_at_n over judged answers and problems, the mean reward, the mean number of tokens and
    the share of cut answers. What no answer has is missing.
    """
    answers = [answer for group in groups for answer in group.answers]
    is_correct = [
        [right for answer in group.answers if (right := is_right(answer.sheet)) is not None] for group in groups
    ]
    is_correct = [group for group in is_correct if group]
    rewards = [answer.sheet.total for answer in answers if answer.sheet.is_verdict]
    metrics: dict[str, float] = {}
    if is_correct:
        metrics[PASS_AT_1] = sum(map(sum, is_correct)) / sum(map(len, is_correct))
        metrics[f"pass_at_{len(groups[0].answers)}"] = sum(map(any, is_correct)) / len(is_correct)
    if rewards:
        metrics["reward"] = sum(rewards) / len(rewards)
    if len(rewards) < len(answers):
        metrics["no_verdict_share"] = 1 - len(rewards) / len(answers)
    return metrics | {
        "mean_tokens": sum(answer.num_tokens for answer in answers) / len(answers),
        "cut_share": sum(not answer.is_finished for answer in answers) / len(answers),
    }


def has_equal_rewards(group: Group) -> bool:
    """Returns whether all answers of a group have one reward, whether or not it is trained."""
    is_judged = not group.dropped.startswith(NO_VERDICT)
    return is_judged and len({answer.reward for answer in group.answers}) == 1


def part_means(answers: Sequence[Sample]) -> Mapping[str, float]:
    """Returns the mean value of each part of the reward, over the answers that it could score."""
    values: dict[str, list[float]] = {}
    for answer in answers:
        for name, score in answer.sheet.parts.items():
            if score.outcome not in ("skipped", "unknown", "error"):
                values.setdefault(name, []).append(score.value)
    return {name: math.fsum(scores) / len(scores) for name, scores in values.items()}


def is_right(sheet: ScoreSheet) -> bool | None:
    """Returns whether the parts that check answers find no fault; None if none applies or one fails."""
    checks = [
        score.outcome
        for name, score in sheet.parts.items()
        if SCORERS.get(part_kind(name)).has_verdict or score.outcome in ("correct", "wrong")
    ]
    applied = [outcome for outcome in checks if outcome != "skipped"]
    is_judged = bool(applied) and all(outcome in VERDICTS for outcome in applied)
    return all(outcome == "correct" for outcome in applied) if is_judged else None
