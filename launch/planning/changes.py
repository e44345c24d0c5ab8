"""Reads what-ifs: changes of a plan's configuration, which raise ConfigError if they do not apply."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce
from operator import getitem
from textwrap import shorten
from typing import Any, Literal

import yaml

from launch.config.compose import dotted_keys
from train.config.errors import ConfigError, broken, nearest_key

_FORM = "must be NAME*FACTOR, NAME/FACTOR or NAME=VALUE, several joined with ' + '"
_MOST_SHOWN = 60
EXAMPLE = "cluster.inter_node_bytes_per_second*2"
_OPENING = "[{("
_CLOSING = "]})"
_QUOTES = "'\""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One change of a key."""

    key: str
    operator: Literal["=", "*", "/"]
    operand: str

    def __str__(self) -> str:
        return f"{self.key}{self.operator}{self.operand}"

    @property
    def factor(self) -> float:
        """The factor of a change that multiplies."""
        number = math.nan
        with suppress(ValueError):
            number = float(self.operand)
        factor = 1 / number if self.operator == "/" and number else number
        if not (math.isfinite(number) and number > 0 and math.isfinite(factor) and factor > 0):
            hint = 0.01 if number == 0 and self.operator == "*" else 2
            rule = "the factor must be a finite number above 0"
            raise broken(str(self), rule, repr(self.operand), f"{self.key}{self.operator}{hint}")
        return factor

    def new_value(self) -> object:
        """Returns the value of a change with `=`."""
        value: object = None
        with suppress(yaml.YAMLError, ValueError, RecursionError):
            value = yaml.safe_load(self.operand)
        if value is None and self.operand not in ("null", "~"):
            rule = "the value must be a number, text, true, false, null or a list"
            raise broken(str(self), rule, repr(self.operand), f"{self.key}=null")
        return value


def parse_changes(item: str) -> tuple[Change, ...]:
    """Returns the changes of a what-if, which `,` or ` + ` separates."""
    return tuple(_parse_change(text.strip()) for text in _split(item, is_item=True))


def split_changes(text: str) -> list[str]:
    """Returns the parts of a text between commas that are outside of brackets and quotes."""
    return [part.strip() for part in _split(text, is_item=False)]


def _parse_change(text: str) -> Change:
    found = re.fullmatch(r"([^=]*?)\s*=\s*(.*)", text, re.DOTALL) or re.fullmatch(r"(.*?)\s*[*/]\s*([^*/]*)", text)
    if found is None or not found[1] or not re.fullmatch(r"[\w.*/\-]+", found[1]):
        key = re.match(r"[A-Za-z_][\w.]*", text)
        raise broken(text, _FORM, repr(text), f"{key[0]}*2" if key else EXAMPLE)
    operator = text[len(found[1]) :].strip()[0]
    kinds: dict[str, Literal["=", "*", "/"]] = {"=": "=", "*": "*", "/": "/"}
    return Change(key=found[1], operator=kinds[operator], operand=found[2])


def _split(item: str, *, is_item: bool) -> Iterator[str]:
    """Yields the parts between commas, and pluses of one item, that are outside of brackets and quotes."""
    depth = 0
    quote = ""
    start = 0
    for place, letter in enumerate(item):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES:
            quote = letter
        elif letter in _OPENING or letter in _CLOSING:
            depth += 1 if letter in _OPENING else -1
        elif depth == 0 and (letter == "," or (is_item and item[place - 1 : place + 2] == " + ")):
            yield item[start:place]
            start = place + 1
    yield item[start:]


def changed_values(values: Mapping[str, Any], typed: Mapping[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """Returns nested values with changes applied in order. Whole numbers of `typed` must stay whole."""
    result = deepcopy(dict(values))
    decoded = dict(dotted_keys(typed))
    for change in changes:
        for key in _matching_keys(change, result):
            *parents, last = key.split(".")
            group = reduce(getitem, parents, result)
            if change.operator == "=":
                group[last] = change.new_value()
            else:
                group[last] = _multiplied(change, key, group[last], decoded.get(key))
    return result


def _matching_keys(change: Change, values: Mapping[str, Any]) -> list[str]:
    known = dict(dotted_keys(values))
    if change.key in known:
        return [change.key]
    found = [
        key
        for key, value in known.items()
        if "*" in change.key
        and not isinstance(value, dict)
        and key.count(".") == change.key.count(".")
        and all(map(fnmatchcase, key.split("."), change.key.split(".")))
    ]
    if not found:
        raise ConfigError(f"{change.key}: unknown key; {nearest_key(change.key, list(known))}")
    return found


def _multiplied(change: Change, key: str, value: object, typed: object) -> int | float:
    """Returns a number times the factor of a change, whole if the key holds whole numbers."""
    factor = change.factor
    if isinstance(value, dict):
        raise ConfigError(f"{key}: is a group of keys; write the key of a number, such as {_first_number(key, value)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        shown = "null" if value is None else shorten(repr(value), _MOST_SHOWN)
        raise ConfigError(f"{key}: must be a number to be multiplied, is {shown}; nearest valid: {key}=VALUE")
    exact = value / float(change.operand) if change.operator == "/" else value * factor
    if type(value) is int and type(typed) is not float:
        whole = round(exact) if math.isfinite(exact) else value
        if abs(exact - whole) > 1e-9 * max(1.0, abs(whole)):
            raise ConfigError(
                f"{key}: must be a whole number, {change} gives {exact:g}; nearest valid: {key}={max(whole, 1)}"
            )
        return whole
    return exact


def _first_number(key: str, value: Mapping[str, Any]) -> str:
    numbers = [name for name, leaf in dotted_keys(value, f"{key}.") if type(leaf) in (int, float)]
    return f"{numbers[0]}*2" if numbers else "cluster.peak_flops*2"
