"""Renders a training sample as lines of text that mark its targets. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from data.pack import PAIR, WEIGHTS
from data.shards.open import Prepared
from data.tokenizer import Tokenizer
from train.terminal import printable

MAX_CHARACTERS = 4000
CONTEXT = "       | "
TARGET = "target | "


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TitledPiece:
    """A piece of a sequence."""

    title: str
    tokens: NDArray[np.integer]  # token ids, [T]
    is_target: NDArray[np.bool_]  # whether the token is predicted in training, [T]


def sample_lines(prepared: Prepared, sequence: int, *, reads_weights: bool) -> Iterator[str]:
    """Yields lines about the training data and a sequence's first sample; weights decide targets or not."""
    yield from _count_lines(prepared)
    pieces = _pieces(prepared, sequence, reads_weights=reads_weights)
    has_pairs = PAIR in prepared.train.values
    listed = pieces[:2] if has_pairs else pieces[:1]
    yield f"sequence {sequence} has {len(pieces)} {'answers' if has_pairs else 'pieces'}; the first {len(listed)}:"
    for piece in listed:
        yield f"{piece.title}: {len(piece.tokens)} tokens, {int(piece.is_target.sum())} targets"
        yield from piece_lines(piece, prepared.tokenizer)


def piece_lines(piece: TitledPiece, tokenizer: Tokenizer) -> Iterator[str]:
    """Yields a piece's lines, a run of targets or others each; text that spells a token has a backslash."""
    start = 0
    for is_target, run in groupby(piece.is_target.tolist()):
        end = start + len(list(run))
        text = _printable_text(piece.tokens[start:end].tolist(), tokenizer)
        if len(text) > MAX_CHARACTERS:
            text = f"{text[:MAX_CHARACTERS]}... ({len(text) - MAX_CHARACTERS} more characters)"
        for line in text.split("\n"):
            yield f"{TARGET if is_target else CONTEXT}{line}"
        start = end


def _count_lines(prepared: Prepared) -> Iterator[str]:
    rows, length = prepared.train.tokens_NL.shape
    padding = 1 - prepared.train.num_tokens / (rows * length)
    yield f"training: {prepared.train.num_tokens:,} tokens in {rows:,} sequences of {length:,}, {padding:.1%} padding"
    for part, counts in prepared.counts.items():
        yield (
            f"{part} samples: {counts.kept:,} kept ({counts.cut:,} cut at their end), {counts.dropped:,} dropped, "
            f"{counts.targets:,} targets"
        )


def _pieces(prepared: Prepared, sequence: int, *, reads_weights: bool) -> list[TitledPiece]:
    tokens = prepared.train.tokens_NL[sequence]
    positions = prepared.train.positions_NL[sequence]
    is_target = positions >= 1
    if reads_weights and WEIGHTS in prepared.train.values:
        is_target[1:] &= prepared.train.values[WEIGHTS][sequence][:-1] != 0
    pair = prepared.train.values[PAIR][sequence] if PAIR in prepared.train.values else np.zeros_like(positions)
    starts = np.flatnonzero(positions == 0).tolist()
    used = int((positions >= 0).sum())
    counts = prepared.counts.get("train")
    single = "prompt" if counts is not None and not counts.targets else "piece"
    return [
        TitledPiece(title=_title(pair[start:end], single), tokens=tokens[start:end], is_target=is_target[start:end])
        for start, end in zip(starts, [*starts[1:], used], strict=True)
    ]


def _title(pair: NDArray[np.generic], single: str) -> str:
    number = np.asarray(pair, dtype=np.int64)
    return "chosen" if (number > 0).any() else "rejected" if (number < 0).any() else single


def _printable_text(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Returns tokens as text in which special tokens differ from text that spells them."""
    names = tokenizer.placed_names
    parts: list[str] = []
    for is_placed, run in groupby(tokens, key=lambda token: token in names):
        if is_placed:
            parts.extend(names[token] for token in run)
            continue
        text = tokenizer.decode(list(run))
        for name in names.values():
            text = text.replace(name, f"\\{name}")
        parts.append(printable(text))
    return "".join(parts)
