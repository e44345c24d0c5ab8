"""A DualPipe step over rate-limited links hides its exchanges under computation."""

import pytest

from tests.bench.overlap import measure_overlap, two_hop_plan
from tests.cluster.namespaces import Cluster


@pytest.mark.slow
def test_overlapped_pair_takes_little_longer_than_its_computation_or_its_exchanges(cluster: Cluster) -> None:
    found = measure_overlap(cluster, two_hop_plan(num_micro_batches=6, num_rounds=1))
    # About as long as each other, so that there is as much to hide as can be hidden.
    assert 0.75 <= found.exchange / found.compute <= 1.25
    assert found.in_sequence >= 0.97 * (found.compute + found.exchange)
    assert found.overlapped <= 1.15 * max(found.compute, found.exchange)
    assert found.step_overlapped <= 0.85 * found.step_in_sequence
