"""Answers the requests of evaluation tasks with a model. Imports no torch.

The rules for token ids are those of lm-evaluation-harness (EleutherAI, `TemplateLM._encode_pair` and
`get_rolling_token_windows`), so that numbers agree.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from data.tokenizer import Tokenizer
from evaluation.protocol import (
    ContinuationRequest,
    DocumentRequest,
    EvaluatedModel,
    EvaluationAnswer,
    EvaluationError,
    EvaluationRequest,
    GenerationAnswer,
    GenerationRequest,
    LikelihoodAnswer,
    RatingRequest,
)
from infer.config import Sampling
from infer.protocol import NumberedPrompt, Request, Sample, TargetScores, TargetSequence, TextStream

NumberedRequest = tuple[int, EvaluationRequest]
"""A request after its number among all requests of a task, which decides its random numbers."""


@dataclass(frozen=True, slots=True)
class Answerer:
    """A model of `max_tokens` positions, and its tokenizer. `end_ids` are tokens that end a generation."""

    model: EvaluatedModel
    tokenizer: Tokenizer
    end_ids: Sequence[int]
    max_tokens: int

    def answer(self, requests: Sequence[NumberedRequest]) -> list[EvaluationAnswer]:
        """Returns the answer to each request. On several ranks, all call it with the same requests.

        A continuation longer than the model's positions is an error, and so is a log-likelihood that is not finite.
        """
        answers: dict[int, EvaluationAnswer] = {**self._score(requests), **self._rate(requests)}
        by_settings = defaultdict[tuple[int, Sampling], dict[int, tuple[int, GenerationRequest]]](dict)
        for position, (number, request) in enumerate(requests):
            if isinstance(request, GenerationRequest):
                by_settings[request.max_new_tokens, request.sampling][position] = number, request
        for (max_new_tokens, sampling), generations in by_settings.items():
            answers |= self._generate(generations, max_new_tokens, sampling)
        return [answers[position] for position in range(len(requests))]

    def _score(self, requests: Sequence[NumberedRequest]) -> dict[int, LikelihoodAnswer]:
        sequences: dict[int, list[TargetSequence]] = {}
        num_dropped: dict[int, int] = {}
        for position, (_, request) in enumerate(requests):
            if isinstance(request, ContinuationRequest):
                sequence, num_dropped[position] = target_sequence(self.tokenizer, request, self.max_tokens)
                sequences[position] = [sequence]
            elif isinstance(request, DocumentRequest):
                sequences[position] = list(document_windows(self.tokenizer, request, self.max_tokens))
        together = [sequence for group in sequences.values() for sequence in group]
        scores = iter(self.model.score(together) if together else [])
        return {
            position: _likelihood(requests[position][1], [next(scores) for _ in group], num_dropped.get(position, 0))
            for position, group in sequences.items()
        }

    def _rate(self, requests: Sequence[NumberedRequest]) -> dict[int, float]:
        rated = {n: request.tokens for n, (_, request) in enumerate(requests) if isinstance(request, RatingRequest)}
        scores = self.model.rate(list(rated.values())) if rated else []
        for score in scores:
            if not math.isfinite(score):
                raise EvaluationError(f"ckpt: scores of answers must be finite, one is {score}")
        return dict(zip(rated, scores, strict=True))

    def _generate(
        self, requests: Mapping[int, tuple[int, GenerationRequest]], max_new_tokens: int, sampling: Sampling
    ) -> dict[int, GenerationAnswer]:
        prompts = {position: self._prompts(number, request) for position, (number, request) in requests.items()}
        streams = {
            prompt.number: self._stream(requests[position][1], prompt.tokens)
            for position, group in prompts.items()
            for prompt in group
        }

        def is_stopped(number: int, token: int) -> bool:
            streams[number].push(token)
            return streams[number].is_stopped

        rollouts = self.model.generate(
            [prompt for group in prompts.values() for prompt in group],
            Request(max_new_tokens=max_new_tokens, sampling=sampling, stop=frozenset(self.end_ids)),
            is_stopped,
        )
        by_prompt = {rollout.prompt: rollout for rollout in rollouts.rollouts}
        return {
            position: self._generated(requests[position][1], group, [by_prompt[prompt.number] for prompt in group])
            for position, group in prompts.items()
        }

    def _prompts(self, number: int, request: GenerationRequest) -> list[NumberedPrompt]:
        """Returns the prompt of each continuation, each with its own number, and so its own random numbers."""
        tokens = self._prompt_tokens(request)
        room = self.max_tokens - request.max_new_tokens
        if room < 1:
            rule = f"must be below model.max_position_tokens={self.max_tokens}"
            raise EvaluationError.broken("max_new_tokens", rule, request.max_new_tokens, self.max_tokens - 1)
        prompt = tuple(tokens[max(0, len(tokens) - room) :])
        first = number * request.samples
        return [NumberedPrompt(number=first + sample, tokens=prompt) for sample in range(request.samples)]

    def _prompt_tokens(self, request: GenerationRequest) -> Sequence[int]:
        return self.tokenizer.prompt(request.prompt) if isinstance(request.prompt, str) else request.prompt

    def _stream(self, request: GenerationRequest, prompt: Sequence[int]) -> TextStream:
        decode = partial(self.tokenizer.decode, skip_special_tokens=not request.shows_special)
        return TextStream(decode, request.stop, self.tokenizer.text_context(prompt))

    def _generated(
        self, request: GenerationRequest, prompts: Sequence[NumberedPrompt], rollouts: Sequence[Sample]
    ) -> GenerationAnswer:
        """Returns the text of continuations. Every rank computes it from the tokens, which all of them have."""
        continuations = []
        for prompt, rollout in zip(prompts, rollouts, strict=True):
            stream = self._stream(request, prompt.tokens)
            text = "".join([stream.push(token) for token in rollout.without_end(self.end_ids)])
            continuations.append(text + stream.close())
        return GenerationAnswer(
            continuations=tuple(continuations),
            num_tokens=tuple(len(rollout.tokens) for rollout in rollouts),
            finishes=tuple(rollout.finish for rollout in rollouts),
            num_dropped=len(self._prompt_tokens(request)) - len(prompts[0].tokens) if prompts else 0,
        )


@dataclass(frozen=True, slots=True)
class SharedAnswerer:
    """An answerer on several ranks, of which only rank 0 has requests.

    `broadcast` returns the value of rank 0 on all ranks, which all call it.
    """

    answerer: Answerer
    broadcast: Callable[[Sequence[NumberedRequest] | None], Sequence[NumberedRequest] | None]

    def answer(self, requests: Sequence[NumberedRequest]) -> list[EvaluationAnswer]:
        """Returns the answers as `Answerer`. Only rank 0 calls it; the other ranks call `follow`."""
        self.broadcast(requests)
        return self.answerer.answer(requests)

    def follow(self) -> None:
        """Answers the requests of rank 0 on another rank, until rank 0 calls `end`."""
        while (requests := self.broadcast(None)) is not None:
            with suppress(EvaluationError):  # rank 0 raises it, too, and reports it
                self.answerer.answer(requests)

    def end(self) -> None:
        """Ends `follow` on the other ranks. Only rank 0 calls it."""
        self.broadcast(None)


def _likelihood(request: EvaluationRequest, scores: Sequence[TargetScores], num_dropped: int) -> LikelihoodAnswer:
    log_likelihood = math.fsum(value for score in scores for value in score.log_probs)
    if not math.isfinite(log_likelihood):
        subject = request.place if isinstance(request, ContinuationRequest) else "a document"
        raise EvaluationError(f"ckpt: log-likelihoods must be finite, that of {subject} is {log_likelihood}")
    layers = scores[0].loads if scores else ()
    return LikelihoodAnswer(
        log_likelihood=log_likelihood,
        is_greedy=all(all(score.are_greedy) for score in scores),
        num_tokens=sum(len(score.log_probs) for score in scores),
        num_dropped=num_dropped,
        loads={layer: list(map(sum, zip(*(score.loads[layer] for score in scores), strict=True))) for layer in layers},
    )


def encode_continuation(tokenizer: Tokenizer, request: ContinuationRequest) -> tuple[list[int], list[int]]:
    """Returns the token ids of a context and of its continuation.

    White space at the end of the context moves to the continuation, because tokens of most vocabularies begin with it.
    The context is tokenized alone and with the continuation; the continuation has the tokens of the whole after the
    number of tokens of the context. If the whole has no more tokens than the context, the continuation has the last.
    """
    context = request.context
    continuation = request.continuation
    before: Sequence[int]
    if isinstance(context, str) and isinstance(continuation, str):
        stripped = tokenizer.encode(context.rstrip())
        joined = tokenizer.encode(context + continuation)
        size = min(len(stripped), max(len(joined) - 1, 0))
        before = stripped if size == len(stripped) else joined[:size]
        after = joined[size:]
    else:
        assert not isinstance(context, str)
        assert not isinstance(continuation, str)
        before = context
        after = list(continuation)
    if not continuation or not after:
        raise EvaluationError(f"{request.place}: must have at least one token, has none")
    return tokenizer.prompt(before), after


def target_sequence(tokenizer: Tokenizer, request: ContinuationRequest, max_tokens: int) -> tuple[TargetSequence, int]:
    """Returns the sequence that scores a continuation, and how many tokens of the context it drops."""
    before, after = encode_continuation(tokenizer, request)
    if len(after) > max_tokens:
        rule = f"must have at most model.max_position_tokens={max_tokens} tokens"
        raise EvaluationError(f"{request.place}: {rule}, has {len(after)}")
    num_dropped = max(0, len(before) + len(after) - 1 - max_tokens)
    return TargetSequence(tokens=(*before[num_dropped:], *after), num_targets=len(after)), num_dropped


def document_windows(tokenizer: Tokenizer, request: DocumentRequest, max_tokens: int) -> Iterator[TargetSequence]:
    """Yields the windows of a document, so that each token is scored once.

    The first window begins with the begin-of-sentence token. Each further window has `window` tokens before its last
    one and scores its last `stride` tokens, or those that are left.
    """
    tokens = tokenizer.encode(request.text) if isinstance(request.text, str) else list(request.text)
    window = min(request.window or max_tokens, max_tokens)
    stride = min(request.stride or window, window)
    all_tokens = [*tokenizer.prompt(()), *tokens]
    first = len(all_tokens) - len(tokens)
    end = min(len(all_tokens), window + 1)  # the last token of a window is only a target
    while first < len(all_tokens):
        read = tuple(all_tokens[max(0, end - window - 1) : end])
        yield TargetSequence(tokens=read, num_targets=end - first, loads=request.loads)
        first = end
        end = min(len(all_tokens), end + stride)
