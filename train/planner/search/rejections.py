"""Groups rejected layouts by reason, with a bounded number of examples. No torch here."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_MOST_GROUPS = 500
_NUMBER = re.compile(r"\d[\d,.]*")
_LIST = re.compile(r"\[[^\]]*\]")


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedLayouts:
    """Layouts that were rejected for the same kind of reason.

    Attributes:
        layout: the one that comes closest to be accepted, or the first; values that do not matter are None.
        reason: why it was rejected, in the words of the check.
        count: number of layouts.
    """

    layout: Mapping[str, Any]
    reason: str
    count: int


class Rejections:
    """Rejected layouts by the text of their reasons without numbers."""

    def __init__(self) -> None:
        self._groups: dict[str, tuple[float, RejectedLayouts]] = {}
        self.count = 0

    def add(self, layout: Mapping[str, Any], reason: str, *, count: int = 1, excess: float = 0.0) -> None:
        """Adds rejected layouts.

        Args:
            excess: by how much the layout misses the rule; the group shows the layout with the least.
        """
        self.count += count
        key = _LIST.sub("[]", _NUMBER.sub("#", reason))
        if key not in self._groups and len(self._groups) >= _MOST_GROUPS:
            key = next(reversed(self._groups))
        known = self._groups.get(key)
        if known is None:
            self._groups[key] = (excess, RejectedLayouts(layout=layout, reason=reason, count=count))
            return
        least, group = known
        shown = (layout, reason) if excess < least else (group.layout, group.reason)
        merged = RejectedLayouts(layout=shown[0], reason=shown[1], count=group.count + count)
        self._groups[key] = (min(least, excess), merged)

    def largest(self, number: int) -> tuple[RejectedLayouts, ...]:
        """Returns the groups with most layouts."""
        groups = sorted((group for _, group in self._groups.values()), key=lambda group: -group.count)
        return tuple(groups[:number])

    def __iter__(self) -> Iterator[RejectedLayouts]:
        """Yields all groups, the first rejected first."""
        return (group for _, group in self._groups.values())
