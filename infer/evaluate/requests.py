"""Defines what evaluation tasks ask a model, and what answers them. Imports no torch."""

from dataclasses import dataclass, field

from infer.config import Finish, Sampling

Text = str | tuple[int, ...]
"""A text, or its token ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContinuationRequest:
    """Asks for the log-likelihood of a continuation.

    Attributes:
        context: what precedes it, perhaps empty. The begin-of-sentence token is put before it.
        continuation: not empty. Both are text, or both are token ids.
        place: names the continuation in errors.
    """

    context: Text
    continuation: Text
    place: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRequest:
    """Asks for the log-likelihood of a whole document, read in windows.

    Attributes:
        text: the document.
        window: tokens that the model sees at a time; None: as many as the model has positions.
        stride: tokens that a window scores; the others are context. None: all of the window.
    """

    text: Text
    window: int | None = None
    stride: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """Asks for continuations of a prompt.

    Attributes:
        prompt: with the begin-of-sentence token put before it if it is a text. Token ids are read unchanged.
        max_new_tokens: maximum number of new tokens.
        stop: strings that end a continuation, and are not part of it.
        samples: number of continuations.
        sampling: how tokens are chosen; greedy by default.
        shows_special: whether special tokens are in the text, by name; thoughts are found by them.
    """

    prompt: Text
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    samples: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    shows_special: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class RatingRequest:
    """Asks a reward model for its score of an answer.

    Attributes:
        tokens: ids of the prompt with the answer, at most as many as the model has positions. The score is read at the
            last one.
    """

    tokens: tuple[int, ...]


EvaluationRequest = ContinuationRequest | DocumentRequest | GenerationRequest | RatingRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class ContinuationAnswer:
    """Log-likelihood of a continuation.

    Attributes:
        log_likelihood: sum of the log-probabilities of its tokens, in nats.
        is_greedy: whether each of its tokens is the most probable one.
        num_tokens: number of its tokens.
        num_dropped: tokens at the start of the context that exceed the model's positions.
    """

    log_likelihood: float
    is_greedy: bool
    num_tokens: int
    num_dropped: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentAnswer:
    """Log-likelihood of a document: sum of the log-probabilities of its tokens, in nats, and their number."""

    log_likelihood: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationAnswer:
    """Continuations of a prompt, in order.

    Attributes:
        continuations: text of each, without the stop string and special tokens that ended it.
        num_tokens: number of generated tokens of each.
        finishes: why each ended.
        num_dropped: tokens at the start of the prompt that exceed the model's positions.
    """

    continuations: tuple[str, ...]
    num_tokens: tuple[int, ...]
    finishes: tuple[Finish, ...]
    num_dropped: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RatingAnswer:
    """A reward model's score of an answer."""

    score: float


EvaluationAnswer = ContinuationAnswer | DocumentAnswer | GenerationAnswer | RatingAnswer
