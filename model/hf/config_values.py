"""Reads keys of a checkpoint's JSON, each with its rule. Imports no torch."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.hf.files import HfError, nearest, shown

LARGEST_WHOLE = 2**63 - 1


class ConfigValues:
    """An object of a JSON file whose keys are read one by one; each rule raises an `HfError`.

    Args:
        place: dotted keys that lead to the object; empty for the whole file.
    """

    def __init__(self, path: Path, values: Mapping[str, Any], place: str = "") -> None:
        self._path = path
        self._values = values
        self._place = place

    def get(self, key: str) -> Any:
        """Returns the value of a key, or None if the key is missing."""
        return self._values.get(key)

    def need(self, key: str) -> Any:
        """Returns the value of a required key."""
        if key not in self._values:
            raise self.error(key, f"must be given, is missing{nearest(key, self._values)}")
        return self._values[key]

    def whole(self, key: str, least: int) -> int:
        """Returns a whole number of at least `least`, and not larger than any size."""
        value = self.need(key)
        if type(value) is not int:
            raise self.error(key, f"must be a whole number, is {shown(value)}")
        if value > LARGEST_WHOLE:
            raise self.error(key, f"must be at most {LARGEST_WHOLE}, is {shown(value)}")
        if value < least:
            raise self.error(key, f"must be at least {least}, is {value}; nearest: {least}")
        return value

    def number(self, key: str, *, above: float = 0.0) -> float:
        """Returns a finite number above `above`."""
        value = self.need(key)
        try:
            number = float(value) if type(value) in (int, float) else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.error(key, f"must be a finite number, is {shown(value)}")
        if number <= above:
            raise self.error(key, f"must be above {above:g}, is {value}")
        return number

    def only(self, key: str, allowed: Any) -> None:
        """Checks that a key is missing or has the value `allowed`."""
        value = self._values.get(key, allowed)
        if type(value) is not type(allowed) or value != allowed:
            raise self.error(key, f"must be {_json(allowed)}, as nothing else is supported, is {shown(value)}")

    def inside(self, key: str) -> "ConfigValues":
        """Returns the object under a key."""
        value = self.need(key)
        if not isinstance(value, dict):
            raise self.error(key, f"must be an object of keys and values, is {shown(value)}")
        return ConfigValues(self._path, value, self._dotted(key))

    def error(self, key: str, problem: str) -> HfError:
        """Returns the error about a key."""
        return HfError(self._path, self._dotted(key), problem)

    def _dotted(self, key: str) -> str:
        return f"{self._place}.{key}" if self._place else key


def _json(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
