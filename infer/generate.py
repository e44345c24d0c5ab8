"""Generates continuations of prompts token by token with a latent KV cache."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from infer.config import Finish, Sampling, Speculative, Statistics, as_token_ids
from infer.engines.local import LocalEngine
from infer.protocol import NumberedPrompt, Request
from infer.sequence import StopCondition, never_stop
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
    stop_condition: StopCondition = never_stop,
) -> Generation:
    """Continues every prompt. Returns the continuations in the prompts' order, and statistics.

    Args:
        model: the whole model, in one process.
        prompts: token ids of each prompt, at least one; lengths may differ. Rows of a tensor are accepted, too.
        max_new_tokens: maximum number of new tokens per prompt; also limited by the model's positions.
        stop: token ids that end a continuation; they are not part of the result.
        speculative: whether the first MTP module drafts one token per round. Drafts reduce the number of passes. They
            change neither the tokens of greedy decoding nor the distribution of sampled tokens.
        batch_size: number of prompts that are continued together; when one ends, the next prompt takes its place.
        stop_condition: called with each new token (prompt's number, token); true ends the continuation after it.

    Raises:
        GenerateError: a prompt is empty or too long, a token is outside the vocabulary, drafts are requested without an
            MTP module, or logits are not finite.
    """
    numbered = [
        NumberedPrompt(number=number, tokens=tuple(prompt)) for number, prompt in enumerate(as_token_ids(prompts))
    ]
    request = Request(samples=1, max_new_tokens=max_new_tokens, sampling=sampling, stop=frozenset(stop))
    engine = LocalEngine(model, speculative=speculative, batch_size=batch_size, stop_condition=stop_condition)
    made = engine.generate(numbered, request)
    continuations = (Continuation(rollout.without_end(request.stop), rollout.finish) for rollout in made.rollouts)
    return Generation(tuple(continuations), made.statistics)
