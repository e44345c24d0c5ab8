"""A run's configuration in four steps: composed, resolved, decoded and checked. No torch here."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_type_hints

from data.config import DataConfig
from data.registry import DATA_SOURCES
from launch.config.compose import compose
from launch.config.memory_rules import check_memory
from launch.config.resolve import check_files, resolve
from launch.config.rules import check_name, check_rules
from train.config import TrainConfig
from train.config.decode import decode, encode


def compose_run(overrides: Sequence[str], command: str = "train") -> TrainConfig:
    """Composes, resolves and decodes a run's configuration; `check` is the last step.

    Args:
        overrides: that `compose` takes.
        command: name of a root YAML with the keys of `conf/train.yaml` alone.

    Raises:
        ConfigError: an override that does not parse, an unknown or missing key, a value of another type or range.
        CheckpointError, HfError: the model or the tokenizer is that of weights that cannot be read.
    """
    return read_config(resolve(compose(command, overrides)))


def read_config(values: Mapping[str, Any]) -> TrainConfig:
    """Decodes a run's configuration from resolved values, as a run's `config.yaml` holds them. Reads no file.

    Raises:
        ConfigError: an unknown or missing key, a value of another type or range.
    """
    data = values.get("data")
    if isinstance(data, Mapping):
        # On the command line the source's keys stand next to data's other keys: `data=files data.paths=[a,b]`.
        own = {field.name for _, entry in DATA_SOURCES.items() for field in fields(entry.config)}
        hint = get_type_hints(DataConfig, include_extras=True)["source"]
        source = decode(hint, {key: data[key] for key in data if key in own}, "data")
        others = {key: value for key, value in data.items() if key not in own}
        values = {**values, "data": {**others, "source": source}}
    return decode(TrainConfig, values)


def write_config(config: TrainConfig) -> dict[str, Any]:
    """Returns the plain values that `read_config` reads."""
    values: dict[str, Any] = encode(config)
    data = values["data"]
    values["data"] = {**data.pop("source"), **data}
    return values


def check(config: TrainConfig) -> None:
    """Refuses a configuration that no run can follow, before any process starts.

    Raises:
        ConfigError: a rule between keys, or a run that does not fit its devices.
        CutError, ScheduleError: as `check_rules`.
        DataError, CheckpointError, HfError: as `check_files`.
    """
    check_name(config)
    check_rules(config)
    check_memory(config, check_rules)
    check_files(config)
