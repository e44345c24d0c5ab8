"""Reads a run's configuration in four steps: compose, resolve, decode, check. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, get_type_hints

from data.config import DataConfig
from data.progress import progress_on
from data.registry import DATA_SOURCES
from launch.config.compose import MissingValueError, compose, own_keys
from launch.config.memory_rules import check_memory
from launch.config.resolve import check_files, check_weights, resolve
from launch.config.rules import check_all, check_name, check_rules
from train.config import TrainConfig
from train.config.decode import decode, encode
from train.config.errors import ConfigError
from train.corpus import prepare_corpus
from train.schedule.timing import with_chunks

_ENDLESS_STEPS = 2**40
_MOMENTS = Literal["auto", "float32", "bf16"]


def compose_run(overrides: Sequence[str], *, checks_weights: bool = True) -> TrainConfig:
    """Composes, resolves and decodes a run's configuration; `check` is the last step."""
    try:
        values = compose("train", overrides)
    except MissingValueError as missing:
        others = _other_problem(overrides, missing.keys, checks_weights=checks_weights)
        raise ConfigError(f"{missing}{others}") from missing
    return read_run(values, checks_weights=checks_weights)


def _other_problem(overrides: Sequence[str], missing: Sequence[str], *, checks_weights: bool) -> str:
    """Returns what else is wrong with a run that lacks values, as the end of a message; empty if nothing."""
    examples = {key: {"data.paths": [key], "data.tokenizer": None}.get(key, key) for key in missing}
    try:
        values = resolve(compose("train", overrides, examples))
        steps = values["task"].get("steps") or _ENDLESS_STEPS
        config = with_chunks(read_config(_with_steps(values, steps)))
        _check_values(config, checks_weights=checks_weights)
    except ConfigError as error:
        # A value within a list cannot be filled and is still missing.
        return "" if isinstance(error, MissingValueError) else f". Also {error}"
    return ""


def read_run(values: Mapping[str, Any], *, checks_weights: bool = True) -> TrainConfig:
    """Resolves and decodes a run's composed values. Every command that starts or plans a run calls it.

    Keys of `conf/submit.yaml`, which an experiment may also set, are ignored. If `task.epochs` is the length of the
    run, `task.steps` follows from the data, which are prepared after everything else has been checked.
    """
    submit_keys = own_keys("submit")
    resolved = resolve({key: value for key, value in values.items() if key not in submit_keys})
    task = resolved.get("task")
    has_epochs = isinstance(task, Mapping) and task.get("steps") is None and task.get("epochs") is not None
    config = read_config(_with_steps(resolved, _ENDLESS_STEPS) if has_epochs else resolved)
    config = with_chunks(config)
    if not has_epochs:
        return config
    _check_values(config, checks_weights=checks_weights)
    endless = replace(config, accept=(*config.accept, "repeated_corpus"))
    check_files(endless)
    num_sequences = len(prepare_corpus(endless, progress_on()).train_tokens_NL)
    steps = config.batch_sizes.steps_for(float(resolved["task"]["epochs"]) * num_sequences)
    return replace(config, task=replace(config.task, steps=steps))


def _with_steps(values: Mapping[str, Any], steps: int) -> dict[str, Any]:
    return {**values, "task": {**values["task"], "steps": steps}}


def read_config(values: Mapping[str, Any]) -> TrainConfig:
    """Decodes a run's configuration from resolved values, as in a run's `config.yaml`. Reads no files."""
    data = values.get("data")
    optim = values.get("optim")
    precision = values.get("precision")
    if isinstance(optim, Mapping) and "moments" in optim:
        # Decoded by itself, because an error must list `auto` as a choice, which the run's configuration is not.
        moments: str = decode(_MOMENTS, optim["moments"], "optim.moments")  # type: ignore[arg-type]
        is_fp8 = isinstance(precision, Mapping) and precision.get("kind") == "fp8"
        chosen = {"auto": "bf16" if is_fp8 else "float32"}.get(moments, moments)
        values = {**values, "optim": {**optim, "moments": chosen}}
    if isinstance(data, Mapping):
        # On the command line, the keys of the source are mixed with the other keys of `data`: `data.paths=[a,b]`.
        own = {field.name for _, entry in DATA_SOURCES.items() for field in fields(entry.config)}
        hint = get_type_hints(DataConfig, include_extras=True)["source"]
        source = decode(hint, {key: data[key] for key in data if key in own}, "data")
        others = {key: value for key, value in data.items() if key not in own}
        values = {**values, "data": {**others, "source": source}}
    return decode(TrainConfig, values)


def write_config(config: TrainConfig) -> dict[str, Any]:
    """Returns a configuration as the plain values that `read_config` decodes."""
    values: dict[str, Any] = encode(config)
    data = values["data"]
    values["data"] = {**data.pop("source"), **data}
    return values


def check(config: TrainConfig, *, checks_weights: bool = True) -> None:
    """Rejects an invalid configuration before any process starts. A plan and a sample need no weights."""
    _check_values(config, checks_weights=checks_weights)
    check_memory(config, check_rules)
    check_files(config)


def _check_values(config: TrainConfig, *, checks_weights: bool) -> None:
    check_all(config, check_name, check_rules, *([check_weights] if checks_weights else []))
