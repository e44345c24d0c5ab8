"""Checks that what cannot be done is refused with one line."""

from collections.abc import Callable, Sequence

import pytest


def assert_refused(
    errors: type[Exception] | tuple[type[Exception], ...], parts: Sequence[str], act: Callable[[], object]
) -> str:
    """Requires an error whose message is one line with all parts. Returns the line."""
    with pytest.raises(errors) as refused:
        act()
    text = str(refused.value)
    assert "\n" not in text
    assert [part for part in parts if part not in text] == [], text
    return text
