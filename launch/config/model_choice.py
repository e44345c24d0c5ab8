"""Models that are chosen by something else than their own keys: a step of the ladder, the weights started from.

`conf/model/` holds `kind` and what the kind needs; every other key beside them replaces one value of the model.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from model.config import ModelConfig
from model.ladder import ladder
from train.config.decode import encode
from train.config.errors import ConfigError, nearest, nearest_key

_MODEL_KEYS = tuple(field.name for field in fields(ModelConfig))


def expand_model(model: Mapping[str, Any], init_from: object, init_mtp: object = "checkpoint") -> dict[str, Any]:
    """The keys of a `ModelConfig`, from a model's keys as they were composed.

    Args:
        model: with `kind`, or the keys themselves.
        init_from: the value of that key.
        init_mtp: the value of that key; with `drop`, `of_checkpoint` has no MTP modules.

    Raises:
        ConfigError: an unknown kind or key, a size that is none, no weights to take the architecture from.
        CheckpointError, HfError: what `init_from` names cannot be read.
    """
    if "kind" not in model:
        return dict(model)
    kinds: dict[str, Callable[[], ModelConfig]] = {
        "ladder": lambda: _step(model.get("size")),
        "of_checkpoint": lambda: _of_checkpoint(init_from, drop_mtp=init_mtp == "drop"),
    }
    kind = model["kind"]
    if kind not in kinds:
        raise ConfigError(
            f"model.kind: must be one of {', '.join(kinds)}, is {kind!r}; {nearest(str(kind), list(kinds))}"
        )
    own = ("kind", "size") if kind == "ladder" else ("kind",)
    changes = {key: value for key, value in model.items() if key not in own}
    for key in changes:
        if key not in _MODEL_KEYS:
            choices = [f"model.{name}" for name in (*own, *_MODEL_KEYS)]
            raise ConfigError(f"model.{key}: unknown key; {nearest_key(f'model.{key}', choices)}")
    return {**encode(kinds[kind]()), **changes}


def _step(size: object) -> ModelConfig:
    if type(size) is not int or size < 1:
        raise ConfigError(f"model.size: must be a whole number of at least 1, is {size!r}; nearest valid: 1")
    return ladder(size)


def _of_checkpoint(init_from: object, *, drop_mtp: bool) -> ModelConfig:
    if not isinstance(init_from, str):
        given = "null" if init_from is None else repr(init_from)
        raise ConfigError(
            f"model: of_checkpoint takes the architecture from init_from, which is {given}; "
            f"write init_from=FOLDER, or choose another model"
        )
    from train.checkpoint.sources import source_config

    return source_config(init_from, "init_from", drop_mtp=drop_mtp)
