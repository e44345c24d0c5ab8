"""The architecture as a checkpoint's manifest records it, back to a `ModelConfig`. No torch here."""

import types
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from model.config import ModelConfig

T = TypeVar("T")


def read_model_record(record: object) -> ModelConfig:
    """What `dataclasses.asdict` made of an architecture, read again from JSON.

    Raises:
        TypeError: a key too few or too many, or a value of another type.
    """
    return _read(ModelConfig, record, "model")


def _read(cls: type[T], record: object, place: str) -> T:
    if not isinstance(record, dict):
        raise TypeError(f"{place} is {record!r}, must hold keys and values")
    hints = get_type_hints(cls)
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    wrong = [f"{place}.{name} is missing" for name in names if name not in record]
    wrong += [f"{place}.{name} is unknown" for name in record if name not in names]
    if wrong:
        raise TypeError("; ".join(wrong))
    return cls(**{name: _value(hints[name], record[name], f"{place}.{name}") for name in names})


def _value(hint: Any, value: object, place: str) -> object:
    members = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for member in members:
        if is_dataclass(member) and isinstance(member, type):
            kinds = get_args(get_type_hints(member)["kind"])
            if isinstance(value, dict) and value.get("kind") in kinds:
                return _read(member, value, place)
        elif get_origin(member) is Literal:
            if value in get_args(member):
                return value
        elif type(value) is member:
            return value
        elif member is float and type(value) is int:
            return float(value)
    raise TypeError(f"{place} is {value!r}")
