"""Text from a model: greedy continuation of a prompt.

Shape legend: B sequences, T tokens.
"""

from collections.abc import Sequence

import torch

from model.transformer import Transformer


@torch.no_grad()
def continue_greedily(model: Transformer, prompt: Sequence[int], num_tokens: int, stop: int) -> list[int]:
    """The most probable continuation, token by token; the whole sequence is read again for each.

    Args:
        model: whole, in one process.
        prompt: token ids, at least one.
        num_tokens: at most this many are made, and never more than the model's positions hold.
        stop: the token after which nothing follows; not part of the result.

    Raises:
        ValueError: the prompt is empty.
    """
    if not prompt:
        raise ValueError("prompt: must hold at least one token, holds none")
    tokens = list(prompt)
    room = min(num_tokens, model.config.max_position_tokens - len(tokens))
    for _ in range(room):
        logits_BTV = model(torch.tensor([tokens]))
        chosen = int(logits_BTV[0, -1].argmax())
        if chosen == stop:
            break
        tokens.append(chosen)
    return tokens[len(prompt) :]
