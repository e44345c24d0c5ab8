"""Text from a model: the continuation of a prompt, drawn token by token.

Shape legend: B sequences, T tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch

from model.transformer import Transformer


@torch.no_grad()
def continue_tokens(
    model: Transformer, prompt: Sequence[int], num_tokens: int, *, stop: int, temperature: float, seed: int
) -> list[int]:
    """A continuation; the whole sequence is read again for each token.

    Args:
        model: whole, in one process.
        prompt: token ids, at least one.
        num_tokens: at most this many are made, and never more than the model's positions hold.
        stop: the token after which nothing follows; not part of the result.
        temperature: that scores are divided by before drawing; 0 takes the most probable token.
        seed: of the draws.

    Raises:
        ValueError: the prompt is empty.
    """
    if not prompt:
        raise ValueError("prompt: must hold at least one token, holds none")
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    room = min(num_tokens, model.config.max_position_tokens - len(tokens))
    for _ in range(room):
        logits_V = model(torch.tensor([tokens]))[0, -1]
        if temperature > 0:
            chosen = int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))
        else:
            chosen = int(logits_V.argmax())
        if chosen == stop:
            break
        tokens.append(chosen)
    return tokens[len(prompt) :]
