"""What is tested in this folder needs no device: it has numbers and tables for its subject, not time."""

import pytest


@pytest.fixture(autouse=True)
def _cuda() -> None:
    """In place of the fixture of the folder above, which skips."""
