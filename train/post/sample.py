"""Draws prompts in an order that the seed alone decides, and defines a rollout. No torch here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from data.chat.encode import encode_prompt
from data.chat.templates import CHAT_TEMPLATES, ChatTemplate
from data.loader import SampleOrder
from data.prepare import Prepared
from data.problems import ProblemRecord, split_problems
from data.registry import DATA_SOURCES
from data.special_tokens import THINK
from data.tokenizer import Tokenizer
from infer.protocol import PROMPT_SAMPLE, Group, Sample, SampledRoutes
from infer.scoring.score import problem_of
from train.config import TrainConfig
from train.config.tasks import RolloutConfig
from train.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptForm:
    """How problems are rendered as prompts, and answers are decoded."""

    template: ChatTemplate
    tokenizer: Tokenizer
    thinking: bool

    def tokens(self, problem: ProblemRecord) -> tuple[int, ...]:
        """Returns the token ids of a problem, up to where the answer begins."""
        return tuple(encode_prompt(problem.messages, self.template, self.tokenizer, thinking=self.thinking))

    def group(self, problem: ProblemRecord, number: int) -> Group:
        """Returns the group of a problem before its answers are sampled."""
        return Group(number=number, tokens=self.tokens(problem), key=problem.key, problem=problem_of(problem))

    def text(self, answer: Sample) -> str:
        """Decodes an answer. Thoughts that the prompt opened are opened again, so that scorers see them."""
        text = self.tokenizer.decode(answer.tokens[:-1] if answer.is_finished else answer.tokens)
        return THINK + text if self.thinking else text


class PromptOrder:
    """The order of prompts: a new permutation of all problems in each epoch."""

    def __init__(self, problems: Sequence[ProblemRecord], form: PromptForm, seed: int) -> None:
        self._problems = problems
        self._form = form
        self._order = SampleOrder(len(problems), seed)

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
    entry = DATA_SOURCES.get(config.data.source.kind)
    assert config.rollout is not None
    assert entry.chat_template is not None
    template = CHAT_TEMPLATES.get(entry.chat_template(config.data.source))
    thinking = template.thinks if config.rollout.thinking is None else config.rollout.thinking
    return PromptForm(template=template, tokenizer=prepared.tokenizer, thinking=thinking)


def read_problems(
    config: TrainConfig, rollouts: RolloutConfig, form: PromptForm, say: Callable[[str], object]
) -> tuple[list[ProblemRecord], list[ProblemRecord]]:
    """Returns the problems to train on and the held-out ones whose prompts leave room for an answer.

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
    return fitting, fitting_held_out
