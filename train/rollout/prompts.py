"""Finds the prompts of a batch of packed samples, and the data's answers to them.

Shape legend: B sequences, T tokens per sequence.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data.loader import Batch
from data.samples.pack import WEIGHTS
from infer.engines.protocol import NumberedPrompt


@dataclass(frozen=True, kw_only=True, slots=True)
class AnsweredPrompt:
    """A sample: a prompt, and the token ids of the data's answer to it.

    Attributes:
        prompt: numbered within the batch.
        answer: at least one token.
    """

    prompt: NumberedPrompt
    answer: tuple[int, ...]


def find_prompts(batch: Batch) -> list[AnsweredPrompt]:
    """Returns the samples of a batch, in order. Samples without a target have no prompt.

    The answer is the last run of targets, and everything before it is the prompt, earlier answers included.

    Args:
        batch: on the host, with weights as an extra.
    """
    arrays = (batch.tokens_BT.numpy(), batch.positions_BT.numpy(), batch.extras[WEIGHTS].numpy())
    found: list[AnsweredPrompt] = []
    for tokens_T, positions_T, weights_T in zip(*arrays, strict=True):
        for start, end in _pieces(positions_T):
            # The last token of a piece predicts nothing.
            targets = np.flatnonzero(weights_T[start : end - 1])
            if not len(targets):
                continue
            run = np.flatnonzero(np.diff(targets, prepend=-2) > 1)[-1]
            first, last = start + int(targets[run]) + 1, start + int(targets[-1]) + 1
            prompt = NumberedPrompt(number=len(found), tokens=tuple(tokens_T[start:first].tolist()))
            found.append(AnsweredPrompt(prompt=prompt, answer=tuple(tokens_T[first : last + 1].tolist())))
    return found


def _pieces(positions_T: NDArray[np.integer]) -> Iterator[tuple[int, int]]:
    """Yields start and end of each piece of a sequence."""
    starts = np.flatnonzero(positions_T == 0).tolist()
    used = int((positions_T >= 0).sum())
    yield from pairwise([*starts, used])
