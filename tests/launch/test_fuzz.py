"""Tests that random invalid configurations are rejected with one line that names the key, before anything starts."""

from itertools import islice
from pathlib import Path

import pytest

from launch import train
from launch.config.compose import compose
from launch.config.errors import user_errors
from launch.config.groups import config_dir
from tests.launch.fuzz import SECONDS, invalid_configurations, misused_keys, problem_of, refusal_of
from train.config.errors import ConfigError


@pytest.mark.long
def test_two_hundred_invalid_configurations_are_rejected_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "start_fork_server", lambda *_: pytest.fail("a process was about to start"))
    for invalid in islice(invalid_configurations(seed=0), 200):
        with pytest.raises(user_errors()) as refused:
            train.main(invalid.overrides)
        assert problem_of(invalid, f"error: {refused.value}\n") == "", (invalid, str(refused.value))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize("command", [path.stem for path in sorted(config_dir().glob("*.yaml"))])
def test_no_library_speaks_to_the_user_of_a_command(command: str) -> None:
    for invalid in islice(misused_keys(command, seed=0), 40):
        with pytest.raises(ConfigError) as refused:
            compose(command, invalid.overrides)
        assert problem_of(invalid, f"error: {refused.value}\n") == "", (invalid, str(refused.value))


@pytest.mark.slow
def test_the_command_rejects_invalid_configurations_soon(tmp_path: Path) -> None:
    for invalid in islice(invalid_configurations(seed=1), 6):
        done, seconds = refusal_of(invalid, tmp_path)
        assert done.returncode == 2, done.stderr
        assert problem_of(invalid, done.stderr) == ""
        assert seconds < SECONDS
    assert list(tmp_path.iterdir()) == []
