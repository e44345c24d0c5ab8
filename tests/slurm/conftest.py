"""A Slurm for the tests of a module, or the reason why there can be none here."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Slurm, missing, open_slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two idle nodes."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with open_slurm(tmp_path_factory.mktemp("slurm") / "base") as made:
        yield made
