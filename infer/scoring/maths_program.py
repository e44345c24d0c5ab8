r"""Compares mathematical answers with math-verify, as a worker of a pool.

Requests are lines of JSON with `expected` and `found`, the contents of two boxes. It imports nothing from this project,
so that it starts quickly.
"""

import json
import re
import sys
from typing import Any

_SCIENTIFIC = re.compile(r"(?<![\w.\\])([-+]?\d+(?:\.\d*)?|[-+]?\.\d+)[eE]([-+]?\d+)(?![\w.])")
_TIMES_TEN = re.compile(r"(?<=\d)\s*(?:[x×*]|\\times)\s*10\s*\^")
_LIST = re.compile(r"[-+]?\d[\d.]*(?:\s+[-+]?\d[\d.]*)+")
_PERCENT = re.compile(r"\s*\\?%\s*$")
_THIN_SPACE = re.compile(r"(?<=\d)(?:\\[,;:! ]|~|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")


def plain(text: str) -> str:
    """Returns a text with one form of what LaTeX parsers misread: digit groups, powers of ten, minus."""
    text = text.replace("\u2212", "-").replace("\\left", "").replace("\\right", "").strip().strip("$").strip()
    text = _THIN_SPACE.sub("", text)
    text = _SCIENTIFIC.sub(r"\1 \\cdot 10^{\2}", text)
    return _TIMES_TEN.sub(r" \\cdot 10^", text).rstrip(" .,;")


def split_percent(text: str) -> tuple[str, bool]:
    """Returns a text without a percent sign at its end, and whether it had one."""
    short = _PERCENT.sub("", text)
    return short, short != text


def compare(expected: str, found: str) -> dict[str, str]:
    """Compares two answers.

    A number with a percent sign equals the fraction, and the same number if the other side has no percent sign.

    Returns:
        `outcome` (correct, wrong, or error if the expected answer cannot be parsed) and `detail`.
    """
    expected, found = plain(expected), plain(found)
    lines = " ".join(expected.split()), " ".join(found.split())
    if expected and lines[0] == lines[1]:
        return {"outcome": "correct", "detail": "equal text"}
    if any(_LIST.fullmatch(line) for line in lines):
        return {"outcome": "wrong", "detail": "another list"}  # a parser would multiply the numbers
    (left, is_left_percent), (right, is_right_percent) = split_percent(expected), split_percent(found)
    parsed = _parse(left)
    if not parsed:
        return {"outcome": "error", "detail": "the expected answer cannot be parsed"}
    answers = _parse(right)
    if not answers:
        return {"outcome": "wrong", "detail": "the answer cannot be parsed"}
    is_equal = _is_equal(parsed, answers)
    if is_left_percent != is_right_percent and not is_equal:
        # One side is a percentage: compare it with the other as a fraction.
        both = (f"\\frac{{{left}}}{{100}}", right) if is_left_percent else (left, f"\\frac{{{right}}}{{100}}")
        is_equal = _is_equal(_parse(both[0]), _parse(both[1]))
    return {"outcome": "correct" if is_equal else "wrong", "detail": ""}


def main() -> None:
    """Answers requests until the input ends."""
    import logging
    import resource

    logging.disable(logging.CRITICAL)
    # A power tower asks for more memory than there is. Then the request fails, or the worker ends.
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), int(sys.argv[1])))
    _is_equal(_parse("1"), _parse("\\frac{1}{1}"))  # imports and builds the parsers
    _print({"ready": True})
    for line in sys.stdin:
        message = json.loads(line)
        try:
            reply = compare(message["expected"], message["found"])
        except MemoryError:
            reply = {"outcome": "timeout", "detail": "comparing took too much memory"}
        except Exception as error:
            # Counted apart from wrong answers: a faulty library would otherwise look like a model that knows nothing.
            reply = {"outcome": "error", "detail": f"{type(error).__name__}: {error}"[:200]}
        _print(reply)


def _parse(text: str) -> Any:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    kinds = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    return parse(f"\\boxed{{{text}}}", extraction_config=kinds, parsing_timeout=None, raise_on_error=False)


def _is_equal(expected: Any, found: Any) -> bool:
    from math_verify import verify

    return bool(verify(expected, found, timeout_seconds=None, raise_on_error=True))


def _print(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
