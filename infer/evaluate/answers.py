"""Answers the requests of evaluation tasks with a model. Imports no torch."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from data.tokenizer import Tokenizer
from infer.config import Sampling
from infer.engines.protocol import NumberedPrompt, Request, Rollout
from infer.evaluate.config import EvaluationError
from infer.evaluate.protocol import EvaluatedModel, TargetScores, TargetSequence
from infer.evaluate.requests import (
    ContinuationAnswer,
    ContinuationRequest,
    DocumentAnswer,
    DocumentRequest,
    EvaluationAnswer,
    EvaluationRequest,
    GenerationAnswer,
    GenerationRequest,
    RatingAnswer,
    RatingRequest,
)
from infer.evaluate.tokens import context_tokens, document_windows, target_sequence
from infer.text import TextStream


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberedRequest:
    """A request, and its number among all requests of a task, which decides its random numbers."""

    number: int
    request: EvaluationRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scored:
    """Sequences of one request among those of all requests."""

    first: int
    count: int
    num_dropped: int = 0


@dataclass(slots=True)
class _Continuation:
    """A continuation that is generated: its prompt, and its text so far."""

    prompt: NumberedPrompt
    stream: TextStream
    num_dropped: int
    pieces: list[str] = field(default_factory=list)

    def push(self, token: int) -> bool:
        """Adds a token, and returns whether a stop string has appeared."""
        self.pieces.append(self.stream.push(token))
        return self.stream.is_stopped


class Answerer:
    """A model with its tokenizer, which answers requests."""

    def __init__(self, model: EvaluatedModel, tokenizer: Tokenizer, end_ids: Sequence[int], max_tokens: int) -> None:
        """Stores the arguments.

        Args:
            end_ids: ids of the tokens that end a generation.
            max_tokens: number of positions of the model.
        """
        self._model, self._tokenizer = model, tokenizer
        self._end_ids, self._max_tokens = frozenset(end_ids), max_tokens

    def answer(self, requests: Sequence[NumberedRequest]) -> list[EvaluationAnswer]:
        """Returns the answer to each request. On several ranks, all call it with the same requests.

        Raises:
            EvaluationError: a continuation is longer than the model has positions, or a log-likelihood is not finite.
        """
        found: list[EvaluationAnswer | None] = [None] * len(requests)
        for at, scored in [*self._score(requests), *self._rate(requests)]:
            found[at] = scored
        by_settings = defaultdict[tuple[int, Sampling], list[int]](list)
        for at, each in enumerate(requests):
            if isinstance(each.request, GenerationRequest):
                by_settings[each.request.max_new_tokens, each.request.sampling].append(at)
        for (max_new_tokens, sampling), places in by_settings.items():
            for at, generated in self._generate(requests, places, max_new_tokens, sampling):
                found[at] = generated
        return [answer for answer in found if answer is not None]

    def _score(self, requests: Sequence[NumberedRequest]) -> list[tuple[int, EvaluationAnswer]]:
        """Answers the requests for log-likelihoods in one call of the model."""
        sequences, places = list[TargetSequence](), dict[int, _Scored]()
        for at, each in enumerate(requests):
            first, num_dropped = len(sequences), 0
            if isinstance(each.request, ContinuationRequest):
                sequence, num_dropped = target_sequence(self._tokenizer, each.request, self._max_tokens)
                sequences.append(sequence)
            elif isinstance(each.request, DocumentRequest):
                sequences.extend(document_windows(self._tokenizer, each.request, self._max_tokens))
            else:
                continue
            places[at] = _Scored(first=first, count=len(sequences) - first, num_dropped=num_dropped)
        scores = self._model.score(sequences) if sequences else []
        return [(at, _likelihood(requests[at].request, place, scores)) for at, place in places.items()]

    def _rate(self, requests: Sequence[NumberedRequest]) -> list[tuple[int, EvaluationAnswer]]:
        """Answers the requests for scores of a reward model in one call of the model."""
        rated = {at: each.request.tokens for at, each in enumerate(requests) if isinstance(each.request, RatingRequest)}
        scores = self._model.rate(list(rated.values())) if rated else []
        for score in scores:
            if not math.isfinite(score):
                raise EvaluationError(f"ckpt: scores of answers must be finite, one is {score}")
        return [(at, RatingAnswer(score=score)) for at, score in zip(rated, scores, strict=True)]

    def _generate(
        self, requests: Sequence[NumberedRequest], places: Sequence[int], max_new_tokens: int, sampling: Sampling
    ) -> list[tuple[int, EvaluationAnswer]]:
        """Answers requests for continuations with the same settings."""
        continuations = {at: self._start(requests[at]) for at in places}
        by_number = {each.prompt.number: each for group in continuations.values() for each in group}
        rollouts = self._model.generate(
            [each.prompt for each in by_number.values()],
            Request(samples=1, max_new_tokens=max_new_tokens, sampling=sampling, stop=self._end_ids),
            lambda number, token: by_number[number].push(token),
        )
        by_prompt = {rollout.prompt: rollout for rollout in rollouts.rollouts}
        return [(at, self._generated(requests[at], group, by_prompt)) for at, group in continuations.items()]

    def _start(self, numbered: NumberedRequest) -> list[_Continuation]:
        """Returns the continuations of a request, each with its own number, and so its own random numbers."""
        request = numbered.request
        assert isinstance(request, GenerationRequest)
        given = request.prompt
        tokens = context_tokens(self._tokenizer, given) if isinstance(given, str) else list(given)
        room = self._max_tokens - request.max_new_tokens
        if room < 1:
            raise EvaluationError(
                f"max_new_tokens: must be below model.max_position_tokens={self._max_tokens}, is "
                f"{request.max_new_tokens}; nearest valid: {self._max_tokens - 1}"
            )
        num_dropped = max(0, len(tokens) - room)
        prompt = tuple(tokens[num_dropped:])
        return [
            _Continuation(
                NumberedPrompt(number=numbered.number * request.samples + sample, tokens=prompt),
                self._stream(request, prompt),
                num_dropped,
            )
            for sample in range(request.samples)
        ]

    def _stream(self, request: GenerationRequest, prompt: Sequence[int]) -> TextStream:
        decode = partial(self._tokenizer.decode, skip_special_tokens=not request.shows_special)
        return TextStream(decode, request.stop, self._tokenizer.text_context(prompt))

    def _generated(
        self, numbered: NumberedRequest, group: Sequence[_Continuation], by_prompt: dict[int, Rollout]
    ) -> GenerationAnswer:
        """Returns the text of continuations. Every rank computes it from the tokens, which all of them have."""
        request = numbered.request
        assert isinstance(request, GenerationRequest)
        rollouts = [by_prompt[each.prompt.number] for each in group]
        found = []
        for each, rollout in zip(group, rollouts, strict=True):
            stream = self._stream(request, each.prompt.tokens)
            ids = rollout.tokens[:-1] if rollout.tokens and rollout.tokens[-1] in self._end_ids else rollout.tokens
            text = "".join([stream.push(token) for token in ids])
            found.append(text + stream.close())
        return GenerationAnswer(
            continuations=tuple(found),
            num_tokens=tuple(len(rollout.tokens) for rollout in rollouts),
            finishes=tuple(rollout.finish for rollout in rollouts),
            num_dropped=group[0].num_dropped if group else 0,
        )


def _likelihood(request: EvaluationRequest, place: _Scored, scores: Sequence[TargetScores]) -> EvaluationAnswer:
    """Returns the answer to a request, given the scores of all sequences."""
    own = scores[place.first : place.first + place.count]
    log_likelihood = math.fsum(value for each in own for value in each.log_probs)
    if not math.isfinite(log_likelihood):
        where = request.place if isinstance(request, ContinuationRequest) else "a document"
        raise EvaluationError(f"ckpt: log-likelihoods must be finite, that of {where} is {log_likelihood}")
    num_tokens = sum(len(each.log_probs) for each in own)
    if isinstance(request, DocumentRequest):
        return DocumentAnswer(log_likelihood=log_likelihood, num_tokens=num_tokens)
    return ContinuationAnswer(
        log_likelihood=log_likelihood,
        is_greedy=all(all(each.are_greedy) for each in own),
        num_tokens=num_tokens,
        num_dropped=place.num_dropped,
    )
