"""Fixtures for tests of the benchmark itself, which need no device because numbers and tables do not."""

import pytest


@pytest.fixture(autouse=True)
def _cuda() -> None:
    """Replaces the fixture of the parent folder, which skips."""
