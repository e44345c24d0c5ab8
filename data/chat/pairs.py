"""Builds samples of two answers to one prompt. Imports no torch. Shape legend: T tokens."""

from dataclasses import replace

import numpy as np

from data.chat.encode import EncodedChat
from data.registry import SamplePiece, TrainingSample
from data.samples.pack import MARGIN, PAIR, SCORE, WEIGHTS


def pair_sample(key: str, chosen: EncodedChat, rejected: EncodedChat, margin: float = 0.0) -> TrainingSample:
    """Returns a sample of two pieces: the prompt with the preferred answer, and with the other one.

    Values of each token, [T]: `weights` (float32), `pair` and `score` (int16), `margin` (float32); see
    `data.samples.pack`. Answers are found by position, because an end of sentence may also be part of a prompt.
    """
    pieces = (_piece(chosen, 1, margin), _piece(rejected, -1, 0.0))
    return TrainingSample(key=key, pieces=pieces, may_be_cut=False)


def _piece(chat: EncodedChat, number: int, margin: float) -> SamplePiece:
    piece = chat.piece()
    is_last = np.arange(len(chat.ids)) == len(chat.ids) - 1
    weights = piece.values[WEIGHTS]
    values = {
        WEIGHTS: weights,
        PAIR: np.where(weights != 0, number, 0).astype(np.int16),
        SCORE: np.where(is_last, number, 0).astype(np.int16),
        MARGIN: np.where(is_last, margin, 0).astype(np.float32),
    }
    return replace(piece, values=values)
