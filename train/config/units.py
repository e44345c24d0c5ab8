"""Reads numbers with units or separators as other programs write them, for the advice of an error."""

import re
from collections.abc import Mapping
from decimal import Decimal

_NUMBER = re.compile(r"(\d[\d_]*(?:,\d{3})+|\d[\d_]*(?:[.,]\d+)?(?:e[+-]?\d+)?) *([a-z%]*)", re.IGNORECASE)
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_NUMBERS: Mapping[str, int | Decimal] = {**_COUNTS, "%": Decimal("0.01"), "f": 1}
_UNITS: Mapping[str, Mapping[str, int | Decimal]] = {
    "bytes": {f"{prefix}{end}": scale for prefix, scale in {**_COUNTS, "g": 10**9}.items() for end in ("", "b")}
    | {"b": 1}
    | {f"{prefix}i{end}": 2 ** (10 * power) for power, prefix in enumerate("kmgt", 1) for end in ("", "b")},
    "seconds": {
        **dict.fromkeys(("", "s", "sec"), 1),
        **dict.fromkeys(("m", "min", "minute"), 60),
        **dict.fromkeys(("h", "hr", "hour"), 3600),
        **dict.fromkeys(("d", "day"), 86400),
    },
}
"""Factors of the units that a key can have, by the last word of its name."""


def nearest_number(text: str, key: str, *, is_whole: bool = False) -> str:
    """Returns the end of an error with the number that `80GB` or `1,000` means; empty if it means none."""
    if factors := re.fullmatch(r"(\d+)[x*](\d+)", text):
        return f"nearest valid: {key}={int(factors[1]) * int(factors[2])}"
    match = _NUMBER.fullmatch(text.strip())
    if match is None or ("," in text and not re.fullmatch(r"0,\d+|\d{1,3}(,\d{3})+", match[1])):
        return ""
    own = key.rpartition("_")[2]
    words = match[2].lower().rstrip("s") if own != "bytes" else match[2].lower()
    units = _UNITS.get(own, _NUMBERS)
    if own == "tokens" and re.search("length|position", key):
        units = {**units, "k": 1024}  # context lengths are powers of two
    scale = 1 if words and own.startswith(words) and words not in units else units.get(words)
    if scale is None:
        return ""
    digits = match[1].replace("_", "")
    digits = digits.replace(",", "." if digits.startswith("0,") else "")
    number = Decimal(digits) * scale
    return (
        "" if is_whole and number % 1 else f"nearest valid: {key}={digits if scale == 1 else f'{number.normalize():f}'}"
    )
