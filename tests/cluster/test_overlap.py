"""A DualPipe step over rate-limited links hides its exchanges behind computation.

Time limits allow for a busy machine. `make bench ARGS="--sections overlap"` prints times and their target.
"""

import pytest

from bench.overlap import measure_overlap, two_hop_plan
from tests.cluster.namespaces import Cluster

pytestmark = pytest.mark.long


def test_overlapped_pair_takes_much_less_than_its_computation_and_its_exchanges(cluster: Cluster) -> None:
    found = measure_overlap(cluster, two_hop_plan(num_micro_batches=6, num_rounds=1))
    assert found.exchange >= 0.7 * found.compute  # there is something to hide
    assert found.in_sequence >= 0.97 * (found.compute + found.exchange)
    assert found.overlapped <= 0.8 * found.in_sequence
    assert found.step_overlapped < found.step_in_sequence
