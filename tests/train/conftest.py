"""Fixtures that tests of training share."""

from pathlib import Path

import pytest

from tests.tiny import write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_text(folder)
    return folder
