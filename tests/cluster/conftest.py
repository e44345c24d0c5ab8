"""A cluster for a test, or the reason why there can be none here."""

from collections.abc import Iterator

import pytest

from tests.cluster.namespaces import Cluster, missing, open_cluster


@pytest.fixture(scope="session")
def allowed() -> None:
    """Skips, with its reason, what needs network namespaces where they cannot be made."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def cluster(allowed: None) -> Iterator[Cluster]:
    """Four nodes at the usual rates."""
    with open_cluster(4) as made:
        yield made
