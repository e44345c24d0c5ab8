"""Numbers for people. The script of the page writes a chart's values in the same way."""

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
