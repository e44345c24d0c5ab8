"""Continues prompts with a `LocalEngine` for tests: a sample of each, without the stop token."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from infer.config import Finish, Sampling, Speculative, Statistics
from infer.engines.local import LocalEngine
from infer.protocol import NumberedPrompt, Request, StopToken
from infer.sequence import never_stop
from model.transformer import Transformer

GREEDY = Sampling()
BATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class Continuation:
    """Continuation of one prompt: its tokens without the final stop token, and why it ended."""

    tokens: tuple[int, ...]
    finish: Finish


@dataclass(frozen=True, slots=True)
class Generation:
    """Continuations of all prompts in the prompts' order, and joint statistics."""

    continuations: tuple[Continuation, ...]
    statistics: Statistics


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Iterable[int] = (),
    speculative: Speculative = "auto",
    batch_size: int = BATCH_SIZE,
    stop_condition: StopToken = never_stop,
) -> Generation:
    """Continues every prompt. Returns the continuations in the prompts' order, and statistics."""
    numbered = [NumberedPrompt(number=number, tokens=tuple(prompt)) for number, prompt in enumerate(prompts)]
    request = Request(samples=1, max_new_tokens=max_new_tokens, sampling=sampling, stop=frozenset(stop))
    engine = LocalEngine(model, speculative=speculative, batch_size=batch_size, stop_condition=stop_condition)
    made = engine.generate(numbered, request)
    continuations = (Continuation(rollout.without_end(request.stop), rollout.finish) for rollout in made.rollouts)
    return Generation(tuple(continuations), made.statistics)
