"""Provides a cluster for a test, or skips the test with a reason."""

from collections.abc import Iterator

import pytest

from tests.cluster.namespaces import Cluster, missing, open_cluster


@pytest.fixture(scope="session")
def allowed() -> None:
    """Skips tests that need network namespaces if these cannot be created."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def cluster(allowed: None) -> Iterator[Cluster]:
    """Opens a cluster of four nodes at the default rates."""
    with open_cluster(4) as made:
        yield made
