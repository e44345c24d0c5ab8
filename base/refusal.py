"""The error about a value that breaks a rule: one line."""

from typing import Self


class RuleError(ValueError):
    """Invalid value. The message states the key, the rule, the value and the nearest valid choice."""

    @classmethod
    def broken(cls, key: str, rule: str, value: object, near: object) -> Self:
        """Returns the error about a value that breaks a rule."""
        return cls(f"{key}: {rule}, is {value}; nearest valid: {near}")
