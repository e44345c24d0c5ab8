"""Fixtures that tests of several commands share."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch.checkpoints import write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a run's folder with a checkpoint of a tiny model, which tests only read."""
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session", autouse=True)
def parses_each_text_once() -> Iterator[None]:
    """Keeps what YAML's parser returns, because tests compose the same files hundreds of times."""
    plain, parsed = yaml.load, {}

    def load(stream: Any, Loader: Any) -> Any:
        text = stream if isinstance(stream, str | bytes) else stream.read()
        if not isinstance(stream, str | bytes):
            stream.seek(0)  # an error names the file
        key = (text, Loader.__qualname__)
        if key not in parsed:
            parsed[key] = plain(stream, Loader)
        return deepcopy(parsed[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "load", load)
        yield
