"""What charts share: numbers for people, round ticks, and the line that a step's events draw."""

import math

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def plain(value: float) -> str:
    """Four digits, as in `0.3303`, `1,797`, `3e-05`."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def short(value: float) -> str:
    """With a letter for thousands and more: `3.15M`."""
    for size, letter in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def num_bytes(value: float) -> str:
    """As in `3.15 MB`."""
    text = short(value)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def percent(value: float) -> str:
    """As in `5.5 %`."""
    return f"{100 * value:.3g} %"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, at least two of them: the first not above, the last not below."""
    span = high - low or abs(high) or 1.0
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [
        round(number * step, 12) if step > 1e-9 else number * step for number in range(first, max(last, first + 1) + 1)
    ]


def step_ticks(first: int, last: int) -> list[int]:
    """The first step, the last one, and round ones between them that leave room for both."""
    span = last - first
    between = [int(tick) for tick in ticks(first, last, 6) if float(tick).is_integer()]
    return [
        first,
        *(tick for tick in between if first + span * 0.06 < tick < last - span * 0.08),
        *([last] * (span > 0)),
    ]
