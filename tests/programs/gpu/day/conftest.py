"""Tests of this folder run without a GPU: the day on a GPU is a dry run there."""

import pytest


@pytest.fixture(autouse=True)
def _cuda() -> None:
    """Skips nothing, unlike the fixture of the folder above."""
