"""Reads the configuration of a run that `launch.plan run=DIR` compares with its plan. No torch here."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.config.compose import key_of
from launch.config.run_config import read_config, write_config
from launch.ranks.run_folder import CONFIG_NAME, read_folder
from train.config import TrainConfig
from train.config.errors import ConfigError

_CHANGEABLE = ("cluster", "cost", "plan")
"""Sections of a run's configuration that describe devices and prices, which a comparison may change."""
_PLANNED = (
    "model",
    "parallelism",
    "schedule",
    "batch",
    "precision",
    "dispatch",
    "recompute",
    "costs",
    "memory_cap",
    "attention",
    "optim",
)
"""Sections that a plan depends on, which must be those of the run."""
_ALL = ("experiment",)


def measured_config(folder: Path, values: Mapping[str, Any], overrides: Sequence[str]) -> TrainConfig:
    """Returns the configuration of a run, with devices and prices from overrides.

    Args:
        overrides: of the command. What the plan depends on may be given again, but not changed.

    Raises:
        ConfigError: the configuration cannot be read, or an override differs from it.
    """
    run = write_config(read_folder(folder))
    for key in map(key_of, overrides):
        section, is_leaf = key.partition(".")[0], "." in key
        if section in _CHANGEABLE and is_leaf:
            _set(run, key, _leaf(values, key))
        elif section in _CHANGEABLE:
            run[section] = values[section]
        else:
            for name in _PLANNED if key in _ALL else [key] if section in _PLANNED else []:
                _check_equal(name, _leaf(values, name), _leaf(run, name))
    return read_config(run)


def require_run(folder: Path) -> Path:
    """Returns the folder of a run.

    Raises:
        ConfigError: it holds no run.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise ConfigError(f"run: must be the folder of a run, which holds {CONFIG_NAME}, is {str(folder)!r}")
    return folder


def _check_equal(key: str, given: object, own: object) -> None:
    """Rejects a value that differs from that of the run, and names its key."""
    for name, value in _leaves(key, given):
        known = dict(_leaves(key, own)).get(name, value)
        if value != known and not (value is None or value == "auto"):
            raise ConfigError(
                f"run: {name} must be that of the run, is {value}; nearest valid: {name}={known}, or rates= in place "
                f"of run= to plan another run"
            )


def _leaves(key: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key, value


def _leaf(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for name in key.split("."):
        found = found[name] if isinstance(found, Mapping) and name in found else None
    return found


def _set(values: dict[str, Any], key: str, value: object) -> None:
    *path, last = key.split(".")
    for name in path:
        values = values[name]
    values[last] = value
