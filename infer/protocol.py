"""Defines what every engine takes and returns, and decodes streams of tokens. Imports no torch.

Shape legend: T tokens, K experts per token.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from infer.config import Finish, GenerateError, Sampling, Statistics
from score.reward import ScoreSheet
from score.score import Problem

PROMPT_SAMPLE = -1  # sample number of the record of a prompt, which all of its continuations share

UNSCORED = ScoreSheet(total=0.0, outcome="skipped", parts={})  # scores of an answer that no scorer has seen


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberedPrompt:
    """A prompt of a job, at least one token. Its number in the whole job decides its random numbers."""

    number: int
    tokens: tuple[int, ...]


class TokenConstraint(Protocol):
    """Restricts the next token of one continuation."""

    def allowed(self) -> NDArray[np.bool_] | None:
        """Returns which tokens may come next, V, at least one; None if all may."""

    def accept(self, token: int) -> None:
        """Adds the token that was chosen."""


@dataclass(frozen=True, slots=True)
class ChosenToken:
    """A token of a text, and what its request wants to know about it.

    Attributes:
        log_prob: as `Sample.log_probs`, or as `Request.num_alternatives` says.
        kept: the tokens that sampling kept, if recorded.
        alternatives: the most probable tokens with their log-probabilities, in descending order, if requested.
    """

    token: int
    log_prob: float
    kept: tuple[int, ...] = ()
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """How an engine continues prompts.

    Attributes:
        samples: at least 1, number of continuations of each prompt.
        max_new_tokens: maximum number of new tokens of each; the model's positions limit it, too.
        step: number of the request in a job, for example of a training step. It decides the random numbers, too.
        stop: token ids that end a continuation. The ending token is part of the rollout, because it was chosen.
        record_routes: whether the ranks record the experts of the tokens that they read.
        record_kept: whether the tokens that top-k, top-p and min-p kept are recorded. Log-probabilities are then those
            among the kept tokens. Without effect if the sampling keeps all tokens.
        logit_bias: added to the logits of tokens.
        num_alternatives: None for log-probabilities as in `Sample`. A number asks for those of the model itself, at
            temperature 1, of each chosen token and of that many most probable ones.
        scores_prompt: whether each prompt token after the first gets the same log-probabilities.
        constraint: builds the constraint of a continuation; None allows every token.
    """

    samples: int = 1
    max_new_tokens: int
    sampling: Sampling
    step: int = 0
    stop: frozenset[int] = frozenset()
    record_routes: bool = False
    record_kept: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_alternatives: int | None = None
    scores_prompt: bool = False
    constraint: Callable[[], TokenConstraint] | None = None

    @property
    def settings(self) -> tuple[object, ...]:
        """What rows must have in common to be computed together."""
        return (replace(self.sampling, seed=0), self.keeps_sets, self.num_alternatives)

    @property
    def keeps_sets(self) -> bool:
        """Whether sets of kept tokens are recorded."""
        return self.record_kept and not self.sampling.keeps_all

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise GenerateError(f"samples: must be at least 1, is {self.samples}; nearest valid: 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A sampled answer, from the engine to the loss. An engine fills the fields up to `kept`.

    Attributes:
        prompt: number of its prompt.
        sample: its number among the prompt's answers, from 0.
        tokens: chosen token ids, including the stop token that ended it.
        log_probs: log-probability of each token under the model at the sampling temperature (1 if it is 0), before
            top-k, top-p, min-p and penalties; among the kept tokens if these are recorded.
        kept: for each token, the tokens that top-k, top-p and min-p kept, ascending. Empty if they are not recorded.
        text: decoded tokens without the one that ended it, with thoughts that the prompt opened.
        reward: total of the sheet, and the penalty of its length.
        advantage: reward compared with the group; 0 if the group is not trained.
        version: number of updates in the weights that sampled it.
        old_log_probs: log-probability of each token under the policy before the first update, if that was computed.
    """

    prompt: int
    sample: int
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish: Finish
    kept: tuple[tuple[int, ...], ...] = ()
    text: str = ""
    sheet: ScoreSheet = UNSCORED
    reward: float = 0.0
    advantage: float = 0.0
    version: int = 0
    old_log_probs: tuple[float, ...] | None = None

    @property
    def num_tokens(self) -> int:
        """Number of generated tokens."""
        return len(self.tokens)

    @property
    def is_finished(self) -> bool:
        """Whether the model ended the answer, rather than the limit of tokens."""
        return self.finish == "stop"

    def without_end(self, stop: Collection[int]) -> tuple[int, ...]:
        """Returns the tokens without the stop token that ended the answer, if one did."""
        return self.tokens[:-1] if self.tokens and self.tokens[-1] in stop else self.tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Group(NumberedPrompt):
    """A prompt and the answers that were sampled to it.

    Attributes:
        key: identifies the problem in the data.
        answers: by sample; empty before they are sampled.
        dropped: why the group is not trained; empty if it is.
    """

    key: str
    problem: Problem
    answers: tuple[Sample, ...] = ()
    dropped: str = ""


class RouteKey(NamedTuple):
    """A record of experts: of a prompt (sample `PROMPT_SAMPLE`) or of a continuation, in one layer."""

    prompt: int
    sample: int
    layer: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampledRoutes:
    """Experts of the tokens that this rank read, in the MoE layers of the main model that it ran.

    Each record of ids is TK, in as few bytes as the number of experts requires. A prompt is recorded once. The last
    token of a continuation is not read and has no experts; a continuation of one token has no record.
    """

    ids: Mapping[RouteKey, NDArray[np.generic]]

    @property
    def num_bytes(self) -> int:
        """Number of bytes of all records."""
        return sum(ids_TK.nbytes for ids_TK in self.ids.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollouts:
    """Answers by prompt and then by sample, joint statistics, and this rank's routes if requested."""

    rollouts: tuple[Sample, ...]
    statistics: Statistics
    routes: SampledRoutes | None = None


StopToken = Callable[[int, int], bool]
"""Called with each new token (prompt's number, token); returns whether the continuation ends after it."""


ExpertLoads = Mapping[str, Sequence[int]]
"""Tokens that chose each expert, by layer, as in a line of `loads.jsonl`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetSequence:
    """Token ids, at most one more than the model has positions; some at the end are scored, not all."""

    tokens: tuple[int, ...]
    num_targets: int
    loads: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetScores:
    """Log-probabilities of targets in nats, whether each is most probable, and loads if asked for."""

    log_probs: tuple[float, ...]
    are_greedy: tuple[bool, ...]
    loads: ExpertLoads = field(default_factory=dict)


class Engine(Protocol):
    """Protocol of an engine.

    Tokens and draws depend on weights, seed, step, prompt number and sample number, never on layout or other prompts.
    """

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request) -> Rollouts:
        """Continues every prompt. All ranks of the model call it with the same arguments.

        Raises:
            GenerateError: a prompt is empty or too long, a token is outside the vocabulary, or logits are not finite.
        """


REPLACEMENT = "\ufffd"


class TextStream:
    """Incremental text of a stream of tokens: all pieces together are the text up to a stop string.

    Incomplete characters are held back, and so is text that may be the start of a stop string. Many tokenizers drop the
    leading space of a first token, so tokens are decoded together with those before them; the earlier text is cut off.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        """Starts with no text.

        Args:
            decode: returns the text of token ids, with U+FFFD for bytes that are not UTF-8.
            before: the last few tokens before the stream.
        """
        self._decode = decode
        self._stop_strings = tuple(stop_strings)
        self._before = list(before)  # tokens of whole characters, before the open tokens
        self._open: list[int] = []  # tokens since the last whole character
        self._done = 0  # number of characters of the open tokens that were passed on
        self._held = ""  # decoded text that may be the start of a stop string
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Adds a token. Returns the new text that is certain."""
        self._open.append(token)
        text = decode_after(self._decode, self._before, self._open)
        # Bytes of an incomplete character are decoded as one or more U+FFFD at the end. All text before them is final.
        decided = text.rstrip(REPLACEMENT)
        fresh = decided[self._done :]
        self._done = max(self._done, len(decided))
        if decided == text:
            self._before = self._open
            self._open = []
            self._done = 0
        return self._pass_on(fresh)

    def close(self) -> str:
        """Returns the rest of the text. Call it when no token follows."""
        rest = decode_after(self._decode, self._before, self._open)[self._done :] if self._open else ""
        self._before = self._open
        self._open = []
        self._done = 0
        text = self._pass_on(rest) + self._held
        self._held = ""
        return text

    def _pass_on(self, fresh: str) -> str:
        """Returns new text up to a stop string, and holds back text that may be the start of one."""
        if self.is_stopped:
            return ""
        text = self._held + fresh
        ends = [position for position in (text.find(stop) for stop in self._stop_strings) if position >= 0]
        if ends:
            self.is_stopped = True
            self._held = ""
            return text[: min(ends)]
        begun = max((overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]


def decode_after(decode: Callable[[Sequence[int]], str], before: Sequence[int], ids: Sequence[int]) -> str:
    """Returns the text that tokens add after others, or alone if bytes of both form characters together."""
    text = decode([*before, *ids])
    start = decode(before) if before else ""
    return text[len(start) :] if text.startswith(start) else decode(ids)


def overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of the text that is the start of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[len(text) - size :])), 0)
