"""Decodes plain YAML values into frozen dataclasses, and encodes them back.

Hydra's structured configs do not support Literals and unions. So Hydra composes plain YAML, and this module checks
every key and type once, by the type hints of the dataclasses.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from base.ranges import Range
from base.refusal import ConfigError, UnknownKeyError, nearest, nearest_key, nearest_number
from base.registry import Registry

T = TypeVar("T")
GROUP_OF_KEYS = "a group of keys"


def decode(cls: type[T], values: object, place: str = "") -> T:
    """Builds a dataclass, and those nested in it, from a mapping.

    A float may be written as a whole number, or as text such as `3e-4`, which YAML 1.1 does not read as a number.
    An int or a bool must have its own type. An instance of the dataclass may replace its mapping. A dataclass with
    `from_plain` and `to_plain` reads and writes its own form, for example one text. A field with a default may be
    missing. `DECODED_BY` of a dataclass has a field and a registry: the `config` of the entry that the field names is
    the subclass to build.

    `Annotated[str, REGISTRY]` is one of the registry's names. `Annotated[Base, REGISTRY]` is a union of dataclasses:
    the field `kind` is one of the names, and the `config` of that entry is the dataclass. A number with a `Range`
    (`base.ranges`) must lie in that range. `Any` is any plain value.
    """
    return _decode(cls, values, place)  # type: ignore[no-any-return]


def encode(instance: object) -> Any:
    """Returns the plain values from which `decode` builds `instance`: dicts, lists, numbers, text, None."""
    if hasattr(instance, "to_plain") and not isinstance(instance, type):
        return instance.to_plain()
    if is_dataclass(instance) and not isinstance(instance, type):
        return {field.name: encode(getattr(instance, field.name)) for field in fields(instance)}
    if isinstance(instance, tuple):
        return [encode(item) for item in instance]
    if isinstance(instance, Mapping):
        return {key: encode(item) for key, item in instance.items()}
    return instance


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of nested mappings by their dotted keys."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def describe_key(hint: Any, values: object, key: str) -> str:
    """Returns type and range of a dotted key, by its value if no dataclass has it."""
    name, _, rest = key.partition(".")
    value = values.get(name) if isinstance(values, Mapping) else None
    members = _members(hint)
    if name == "kind" and len(members) > 1:
        return "one of " + ", ".join(members)
    kind = values.get(getattr(hint, "DECODED_BY", ("kind",))[0]) if isinstance(values, Mapping) else None
    every = [get_type_hints(member, include_extras=True) for member in (members.get(kind), *members.values()) if member]
    inner = next((hints[name] for hints in every if name in hints), type(value))
    return describe_key(inner, value, rest) if rest else _describe(inner)


def _members(hint: Any) -> dict[Any, Any]:
    """Returns the dataclasses that a type allows, by their kinds if there are several."""
    if get_origin(hint) in (Union, UnionType):
        members = [member for member in get_args(hint) if member is not NoneType]
        return _members(members[0]) if len(members) == 1 else _by_kind(members)
    if get_origin(hint) is Annotated and (registry := _registry_in(get_args(hint)[1:])) is not None:
        return {name: entry.config for name, entry in registry.items()} if get_args(hint)[0] is not str else {}
    if hasattr(hint, "DECODED_BY"):
        return {name: entry.config for name, entry in hint.DECODED_BY[1].items()}
    return {"": hint} if is_dataclass(hint) else {}


def _by_kind(members: Sequence[Any]) -> dict[Any, Any]:
    classes = [member for member in members if is_dataclass(member)]
    return {kind: member for member in classes for kind in get_args(get_type_hints(member)["kind"])}


def _decode(hint: Any, value: object, place: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return _decode_union(get_args(hint), value, place)
    if origin is Annotated:
        return _decode_annotated(hint, value, place)
    if hint is Any:
        return value
    if origin is Literal:
        return _decode_choice(get_args(hint), value, place)
    if origin is tuple:
        return _decode_tuple(hint, value, place)
    if origin is Mapping:
        item = get_args(hint)[1]
        return {str(key): _decode(item, inner, _join(place, key)) for key, inner in _mapping(value, place).items()}
    if is_dataclass(hint):
        return _decode_dataclass(hint, value, place)
    return _decode_scalar(hint, value, place)


def _decode_dataclass(cls: Any, value: object, place: str) -> Any:
    if isinstance(value, cls):
        return value
    if hasattr(cls, "from_plain"):
        try:
            return cls.from_plain(value)
        except ConfigError as error:  # names a key within the value
            raise type(error)(_join(place, str(error))) from error
        except ValueError as error:
            raise ConfigError(f"{place}: {error}") from error
    values = _mapping(value, place)
    if hasattr(cls, "DECODED_BY"):
        selector, registry = cls.DECODED_BY
        default = next(field.default for field in fields(cls) if field.name == selector)
        name = _decode_choice(registry.choices(), values.get(selector, default), _join(place, selector))
        kinds = {each: entry.config for each, entry in registry.items()}
        _refuse_keys_of_others(kinds, name, values, place, selector)
        cls = kinds[name]
    hints = get_type_hints(cls, include_extras=True)
    names = [field.name for field in fields(cls)]
    optional = {field.name for field in fields(cls) if field.default is not MISSING}
    for key in values:
        if key not in names:
            path = _join(place, str(key))
            raise UnknownKeyError(f"{path}: unknown key; {nearest_key(path, [_join(place, name) for name in names])}")
    for name in names:
        if name not in values and name not in optional:
            raise ConfigError(f"{_join(place, name)}: missing; a value is needed ({_describe(hints[name])})")
    given_names = [name for name in names if name in values]
    return cls(**{name: _decode(hints[name], values[name], _join(place, name)) for name in given_names})


def _decode_union(members: tuple[Any, ...], value: object, place: str) -> Any:
    if value is None and NoneType in members:
        return None
    value_types = [member for member in members if member is not NoneType]
    if len(value_types) == 1:
        return _decode(value_types[0], value, place)
    return _decode_tagged(_by_kind(value_types), value, place)


def _decode_annotated(hint: Any, value: object, place: str) -> Any:
    base, *marks = get_args(hint)
    registry = _registry_in(marks)
    if registry is None:
        return _in_ranges(_decode(base, value, place), marks, place)
    if base is str:
        return _decode_choice(registry.choices(), value, place)
    return _decode_tagged(_members(hint), value, place)


def _decode_tagged(kinds: Mapping[str, Any], value: object, place: str) -> Any:
    """Builds the dataclass that the value's `kind` selects."""
    if isinstance(value, tuple(kinds.values())):
        return value
    values = _mapping(value, place)
    if "kind" not in values:
        raise ConfigError(f"{_join(place, 'kind')}: missing; a value is needed (one of {', '.join(kinds)})")
    chosen = _decode_choice(tuple(kinds), values["kind"], _join(place, "kind"))
    _refuse_keys_of_others(kinds, chosen, values, place, "kind")
    return _decode_dataclass(kinds[chosen], values, place)


def _refuse_keys_of_others(
    kinds: Mapping[str, Any], chosen: str, values: Mapping[Any, object], place: str, selector: str
) -> None:
    own_fields = {field.name for field in fields(kinds[chosen])}
    for key in values:
        owners = [kind for kind, member in kinds.items() if key in {field.name for field in fields(member)}]
        if key not in own_fields and owners:
            raise ConfigError(
                f"{_join(place, str(key))}: unknown key when {_join(place, selector)} is {chosen}; "
                f"it belongs to {selector} {' or '.join(owners)}"
            )


def _decode_choice(choices: tuple[Any, ...], value: object, place: str) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    names = [_spelled(choice) for choice in choices]
    raise ConfigError(f"{place}: must be one of {', '.join(names)}, is {value!r}; {nearest(str(value), names)}")


def _spelled(choice: object) -> str:
    """Returns a choice as YAML writes it."""
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def _decode_tuple(hint: Any, value: object, place: str) -> tuple[Any, ...]:
    item_hint = get_args(hint)[0]
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{place}: must be a list, is {value!r}; write {place}=[{value}]")
    return tuple(_decode(item_hint, item, f"{place}[{index}]") for index, item in enumerate(value))


def _decode_scalar(hint: Any, value: object, place: str) -> Any:
    if hint is float:
        return _decode_float(value, place)
    if type(value) is hint:
        return value
    advice = ""
    if hint is int and isinstance(value, float) and value.is_integer():
        advice = f"; write {int(value)}"
    elif hint is str and isinstance(value, (int, float)):
        advice = f"; quote it to make it text: \"{place}='{value}'\""
    elif hint is int and isinstance(value, str) and (near := nearest_number(value, place, is_whole=True)):
        advice = f"; {near}"
    raise ConfigError(f"{place}: must be {_describe(hint)}, is {value!r}{advice}")


def _decode_float(value: object, place: str) -> float:
    number = math.nan
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
    if not math.isfinite(number):
        near = nearest_number(str(value), place)
        raise ConfigError(f"{place}: must be a finite number, is {value!r}{near and f'; {near}'}")
    return number


def _mapping(value: object, place: str) -> Mapping[Any, object]:
    if isinstance(value, Mapping):
        return value
    raise ConfigError(f"{place or 'configuration'}: must hold keys and values, is {value!r}")


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if hint in names:
        return names[hint]
    if hasattr(hint, "from_plain"):
        first = hint.__doc__.splitlines()[0].rstrip(".")
        return f"{first[0].lower()}{first[1:]}"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(_spelled, get_args(hint)))
    if get_origin(hint) is Annotated:
        base, *marks = get_args(hint)
        registry = _registry_in(marks)
        if registry is None:
            return ", ".join([_describe(base), *(str(mark) for mark in marks if isinstance(mark, Range))])
        return "one of " + ", ".join(registry.choices()) if base is str else GROUP_OF_KEYS
    if get_origin(hint) is tuple or hint is list:
        return "a list"
    if get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint):
        return " or ".join(_describe(member) for member in get_args(hint) if member is not NoneType) + ", or null"
    return GROUP_OF_KEYS


def _in_ranges(number: Any, marks: Sequence[object], place: str) -> Any:
    """Returns the number, and refuses one outside any of its ranges."""
    for mark in marks:
        if isinstance(mark, Range) and not mark.holds(number):
            least = f"; the least is {mark.above + 1:g}" if mark.above is not None and type(number) is int else ""
            raise ConfigError(f"{place}: must be {mark}, is {number}{least}")
    return number


def _registry_in(marks: Sequence[object]) -> Registry[Any] | None:
    return next((mark for mark in marks if isinstance(mark, Registry)), None)


def _join(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key
