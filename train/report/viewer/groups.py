"""Turns groups of journals into the data of the page: checked, rounded, and cut to a size."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from train.report.embed import num_embedded_bytes
from train.report.viewer.journals import JournalGroup, choose_evenly
from train.report.viewer.pieces import TokenPieces

Values = Mapping[str, Any]
_MOST_ANSWERS, _MOST_PARTS = 64, 16
_LEAST_TOKEN_BYTES, _LOG_PROB_BYTES = 6, 8
_LEFT_OUT = " [...] "
_DIGITS = 4


def group_data(group: JournalGroup, pieces: TokenPieces | None, most_bytes: int) -> dict[str, Any]:
    """Returns a group for the page's script.

    Args:
        group: as its journal has it.
        pieces: decodes tokens; None: answers are shown without tokens.
        most_bytes: about the largest size of the result in the page. Long answers lose their middle.
    """
    values = group.values
    samples = values.get("samples")
    answers = [sample for sample in (samples if isinstance(samples, list) else []) if isinstance(sample, dict)]
    shown = choose_evenly(len(answers), _MOST_ANSWERS)
    known = group.log_probs if group.log_probs is not None else [None] * len(answers)
    share = most_bytes * 3 // 4 // max(len(shown), 1)
    return {
        "step": group.step,
        "rollout": group.rollout,
        "prompt": _whole(values.get("prompt")),
        "problem": shorten(_string(values.get("problem")), most_bytes // 32),
        "text": shorten(_string(values.get("text")), most_bytes // 8),
        "expected": _optional(values.get("answer"), most_bytes // 16),
        "dropped": shorten(_string(values.get("dropped")), most_bytes // 32),
        "stats": _statistics(answers),
        "answers": [answer_data(answers[place], known[place], pieces, share) for place in shown],
    }


def answer_data(
    sample: Values, log_probs: Sequence[float] | None, pieces: TokenPieces | None, most_bytes: int
) -> dict[str, Any]:
    """Returns an answer for the page's script.

    Args:
        sample: as the journal has it.
        log_probs: of each of its tokens; None: unknown.
        pieces: decodes tokens; None: the answer is shown without tokens.
        most_bytes: about the largest size of the result in the page.
    """
    ids = sample.get("tokens")
    ids = ids if isinstance(ids, list) and all(type(each) is int and 0 <= each < 2**31 for each in ids) else []
    of_tokens = most_bytes * 3 // 4
    if pieces is None or not ids:
        content: dict[str, Any] = {"text": shorten(_string(sample.get("text")), of_tokens)}
    else:
        content = _tokens(ids, log_probs, pieces, of_tokens)
    return {
        "sample": _whole(sample.get("sample")),
        "outcome": _string(sample.get("outcome"))[:32],
        "finish": _string(sample.get("finish"))[:32],
        "reward": _number(sample.get("reward")),
        "advantage": _number(sample.get("advantage")),
        "version": _whole(sample.get("version")),
        "count": len(ids),
        **content,
        "parts": list(_parts(sample.get("parts"), most_bytes // 4)),
    }


def shorten(text: str, most_bytes: int) -> str:
    """Returns a string without its middle if it takes more than `most_bytes` in the page."""
    most_bytes = max(most_bytes, 64)
    if len(text) <= most_bytes and num_embedded_bytes(text) <= most_bytes:
        return text
    head = _prefix(text[:most_bytes], most_bytes * 3 // 4)
    tail = _prefix(text[: -most_bytes - 1 : -1], most_bytes // 4)[::-1]
    return head + _LEFT_OUT + tail


def _prefix(text: str, most_bytes: int) -> str:
    """Returns the characters at the start that take at most so many bytes in the page."""
    while num_embedded_bytes(text) > most_bytes + 2:
        text = text[: min(len(text) - 1, len(text) * most_bytes // num_embedded_bytes(text))]
    return text


def _tokens(
    ids: Sequence[int], log_probs: Sequence[float] | None, pieces: TokenPieces, most_bytes: int
) -> dict[str, Any]:
    """Returns the tokens of an answer, without its middle if they take more than `most_bytes`."""
    most = max(most_bytes // _LEAST_TOKEN_BYTES, 8)
    head, tail = (len(ids), 0) if len(ids) <= most else (most - most // 4, most // 4)
    shown = [*pieces.of(ids[:head]), *pieces.of(ids[len(ids) - tail :])]
    costs = [num_embedded_bytes(piece) + _LOG_PROB_BYTES for piece in shown]
    if sum(costs) > most_bytes:
        head = min(head, _num_fitting(costs, most_bytes * 3 // 4))
        tail = min(tail or len(ids) - head, _num_fitting(costs[::-1], most_bytes // 4))
    places = [*range(head), *range(len(ids) - tail, len(ids))]
    found: dict[str, Any] = {"pieces": [*shown[:head], *shown[len(shown) - tail :]]}
    if log_probs is not None:
        found["logs"] = [_number(log_probs[place]) for place in places]
    return found if len(places) == len(ids) else {**found, "cut": [head, len(ids) - len(places)]}


def _num_fitting(costs: Sequence[int], most: int) -> int:
    total = 0
    for place, cost in enumerate(costs):
        total += cost
        if total > most:
            return place
    return len(costs)


def _statistics(answers: Sequence[Values]) -> dict[str, Any]:
    """Returns numbers of all answers of a group, also of those that are not shown."""
    rewards = [reward for answer in answers if (reward := _number(answer.get("reward"))) is not None]
    counts = [len(answer["tokens"]) for answer in answers if isinstance(answer.get("tokens"), list)]
    return {
        "answers": len(answers),
        "correct": sum(answer.get("outcome") == "correct" for answer in answers),
        "mean": _number(math.fsum(rewards) / len(rewards)) if rewards else None,
        "least": min(rewards, default=None),
        "most": max(rewards, default=None),
        "tokens": _number(sum(counts) / len(counts)) if counts else None,
    }


def _parts(parts: object, most_bytes: int) -> Iterator[list[Any]]:
    """Yields kind, value, outcome and detail of each part of a reward."""
    named = list(parts.items())[:_MOST_PARTS] if isinstance(parts, dict) else []
    for kind, score in named:
        if isinstance(score, dict):
            detail = shorten(_string(score.get("detail")), most_bytes // len(named) - 64)
            yield [str(kind)[:64], _number(score.get("value")), _string(score.get("outcome"))[:32], detail]


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


def _optional(value: object, most_bytes: int) -> str | None:
    return shorten(value, most_bytes) if isinstance(value, str) else None


def _number(value: object) -> float | None:
    """Returns a number with a few digits; None for anything that is not a finite number."""
    if type(value) is int and abs(value) < 2**53:
        return value
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else None


def _whole(value: object) -> int | None:
    return value if type(value) is int and abs(value) < 2**53 else None
