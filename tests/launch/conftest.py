"""Fixtures that tests of several commands share."""

from pathlib import Path

import pytest

from tests.launch.checkpoints import write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a run's folder with a checkpoint of a tiny model, which tests only read."""
    return write_run(tmp_path_factory.mktemp("run"))
