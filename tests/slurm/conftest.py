"""Fixture with a Slurm cluster for the tests of a module; skips with the reason if Slurm cannot run here."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Slurm, missing, open_slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Yields a cluster with two idle nodes."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with open_slurm(tmp_path_factory.mktemp("slurm") / "base") as made:
        yield made
