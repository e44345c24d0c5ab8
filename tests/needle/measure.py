"""Measures a network: answers to needles by depth and length, and bits per byte by position."""

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model.transformer import Transformer
from tests.needle.network import BASE_LENGTH, LONG_LENGTH
from tests.needle.rows import Rows

LENGTHS = (128, 256, 512, 1024)
DEPTHS = tuple(number / 8 for number in range(9))
_NEEDLE_SEED, _TEXT_SEED = 90_001, 90_002
_TEXT_ROWS = 24
_ROWS_PER_PASS = 4096


@dataclass(frozen=True, slots=True)
class Measured:
    """What a network does at every length.

    Attributes:
        accuracy: share of right answers by length and depth.
        first_bits: bits per byte of unseen text at positions up to the base length.
        last_bits: bits per byte in the last half of the long length.
    """

    accuracy: tuple[tuple[float, ...], ...]
    first_bits: float
    last_bits: float

    def mean(self, length: int) -> float:
        """Returns the mean accuracy over depths at a length."""
        row = self.accuracy[LENGTHS.index(length)]
        return sum(row) / len(row)

    def as_json(self) -> dict[str, object]:
        """Returns plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, object]) -> "Measured":
        """Reads what `as_json` returned."""
        accuracy, first, last = (values[name] for name in ("accuracy", "first_bits", "last_bits"))
        assert isinstance(accuracy, list)
        assert isinstance(first, float)
        assert isinstance(last, float)
        return cls(tuple(tuple(row) for row in accuracy), first, last)


@torch.no_grad()
def measure(model: Transformer, samples: int = 36, lengths: tuple[int, ...] = LENGTHS) -> Measured:
    """Measures a network on rows that are the same for every network.

    Args:
        model: the network.
        samples: questions per length and depth.
        lengths: lengths that are asked at; at others the accuracy is 0.
    """
    rows = Rows(_NEEDLE_SEED)
    accuracy = [
        tuple(_share_right(model, rows, length, depth, samples) if length in lengths else 0.0 for depth in DEPTHS)
        for length in LENGTHS
    ]
    nats_T = _text_nats(model, Rows(_TEXT_SEED).text(_TEXT_ROWS, LONG_LENGTH))
    first, last = nats_T[: BASE_LENGTH - 1], nats_T[LONG_LENGTH // 2 - 1 :]
    return Measured(tuple(accuracy), *(float(part.mean()) / math.log(2) for part in (first, last)))


def _share_right(model: Transformer, rows: Rows, length: int, depth: float, samples: int) -> float:
    """Returns the share of greedy answers, over the whole vocabulary, that are the needle's value."""
    asked = [rows.needle(length, depth) for _ in range(samples)]
    tokens_BT, values_B = torch.from_numpy(np.stack([row for row, _ in asked])), [value for _, value in asked]
    per_pass = max(_ROWS_PER_PASS // length, 1)
    answers = [model(part_BT)[:, -1].argmax(-1) for part_BT in tokens_BT.split(per_pass)]
    return float((torch.cat(answers) == torch.tensor(values_B)).double().mean())


def _text_nats(model: Transformer, tokens_BT: Tensor) -> Tensor:
    """Returns the mean cross-entropy of each predicted position over rows, [T - 1]."""
    nats = [
        functional.cross_entropy(model(part_BT[:, :-1]).transpose(1, 2), part_BT[:, 1:], reduction="none")
        for part_BT in tokens_BT.split(4)
    ]
    return torch.cat(nats).double().mean(0)
