"""Checks that what cannot be done is refused with one line."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

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


def read_table(path: Path) -> Mapping[str, list[list[str]]]:
    """Returns what is refused, with the parts of each line that says so.

    A line of the file is `what => a part of the first line & another part => a part of the second line`.
    """
    rows = [line.split(" => ") for line in path.read_text("utf-8").splitlines() if line[:1] not in ("", "#")]
    return {what: [line.split(" & ") for line in lines] for what, *lines in rows}
