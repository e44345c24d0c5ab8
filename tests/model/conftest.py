"""Fixtures that tests of the model share."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture
def _garbage_collection_disabled() -> Iterator[None]:
    """Disables garbage collection, so that reference cycles stay alive."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
