"""Tests that plain values are decoded to dataclasses and encoded back, and the messages of refused values."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.decode import decode, encode
from base.refusal import ConfigError
from base.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class Circle:
    kind: Literal["circle"]
    radius: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Polygon:
    kind: Literal["polygon"]
    sides: tuple[float, ...]
    closed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    title: str
    count: int
    limit: int | None
    colour: Literal["red", "green"]
    shape: Circle | Polygon


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeEntry:
    config: type


SHAPES = Registry[ShapeEntry]("shape.kind")
SHAPES.register("circle", ShapeEntry(config=Circle))
SHAPES.register("polygon", ShapeEntry(config=Polygon))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sketch:
    shape: Annotated[object, SHAPES]
    outline: Annotated[str, SHAPES] | None


VALUES: dict[str, Any] = {
    "title": "a", "count": 3, "limit": None, "colour": "red", "shape": {"kind": "circle", "radius": 1.5},
}  # fmt: skip

finite = st.floats(allow_nan=False, allow_infinity=False)
shapes = st.builds(Circle, kind=st.just("circle"), radius=finite) | st.builds(
    Polygon, kind=st.just("polygon"), sides=st.lists(finite).map(tuple), closed=st.booleans()
)
drawings = st.builds(
    Drawing,
    title=st.text(),
    count=st.integers(),
    limit=st.none() | st.integers(),
    colour=st.sampled_from(["red", "green"]),
    shape=shapes,
)


@pytest.mark.slow
@settings(deadline=None)  # other work on the machine may take longer
@given(drawings)
def test_decode_inverts_encode(drawing: Drawing) -> None:
    assert decode(Drawing, encode(drawing)) == drawing


def test_encode_gives_plain_values() -> None:
    shape = {"kind": "polygon", "sides": [1.0, 2.0], "closed": True}
    assert encode(decode(Drawing, {**VALUES, "shape": shape})) == {**VALUES, "shape": shape}


@pytest.mark.parametrize(("value", "number"), [(2, 2.0), ("3e-4", 3e-4), ("1.5", 1.5), (-0.5, -0.5)])
def test_decode_accepts_whole_numbers_and_numeric_text_as_floats(value: object, number: float) -> None:
    radius = decode(Circle, {"kind": "circle", "radius": value}).radius
    assert radius == number
    assert type(radius) is float


def test_decode_returns_an_instance_unchanged() -> None:
    circle = Circle(kind="circle", radius=1.0)
    assert decode(Drawing, {**VALUES, "shape": circle}).shape is circle


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"count": True}, ["count", "whole number", "True"]),
        ({"count": 4.0}, ["count", "4.0", "write 4"]),
        ({"count": 4.5}, ["count", "4.5"]),
        ({"count": "4"}, ["count", "'4'"]),
        ({"count": None}, ["count", "None"]),
        ({"limit": "x"}, ["limit", "'x'"]),
        ({"title": 7}, ["title", "7", "quote"]),
        ({"colour": "gren"}, ["colour", "red, green", "'gren'", "did you mean green"]),
        ({"colour": None}, ["colour", "None"]),
        ({"cuont": 1}, ["cuont: unknown key", "did you mean count"]),
        ({"shape": 3}, ["shape", "keys and values", "3"]),
        ({"shape": {"radius": 1}}, ["shape.kind: missing", "circle, polygon"]),
        ({"shape": {"kind": "cirle", "radius": 1}}, ["shape.kind", "did you mean circle"]),
        ({"shape": {"kind": "circle"}}, ["shape.radius: missing"]),
        ({"shape": {"kind": "circle", "radius": "wide"}}, ["shape.radius", "'wide'"]),
        ({"shape": {"kind": "circle", "radius": True}}, ["shape.radius", "True"]),
        ({"shape": {"kind": "circle", "radius": math.nan}}, ["shape.radius", "finite", "nan"]),
        ({"shape": {"kind": "circle", "radius": math.inf}}, ["shape.radius", "inf"]),
        ({"shape": {"kind": "circle", "radius": "inf"}}, ["shape.radius", "inf"]),
        ({"shape": {"kind": "circle", "radius": 10**400}}, ["shape.radius"]),
        ({"shape": {"kind": "circle", "radius": 1, "sides": []}}, ["shape.sides", "circle", "kind polygon"]),
        ({"shape": {"kind": "polygon", "sides": 3, "closed": True}}, ["shape.sides", "list", "shape.sides=[3]"]),
        ({"shape": {"kind": "polygon", "sides": [1, "x"], "closed": True}}, ["shape.sides[1]", "'x'"]),
        ({"shape": {"kind": "polygon", "sides": [], "closed": 1}}, ["shape.closed", "true or false", "1"]),
    ],
)
def test_decode_refuses_and_names_the_place(change: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        decode(Drawing, {**VALUES, **change})
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize("name", list(VALUES))
def test_decode_refuses_a_missing_key(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^at.{name}: missing"):
        decode(Drawing, {key: value for key, value in VALUES.items() if key != name}, "at")


@pytest.mark.parametrize(
    "shape", [Circle(kind="circle", radius=1.0), Polygon(kind="polygon", sides=(1.0,), closed=True)]
)
def test_decode_reads_kinds_and_names_of_a_registry(shape: Circle | Polygon) -> None:
    sketch = Sketch(shape=shape, outline="circle")
    assert decode(Sketch, encode(sketch)) == sketch
    assert decode(Sketch, {"shape": shape, "outline": None}).shape is shape


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"outline": "cirle"}, ["outline: must be one of circle, polygon, is 'cirle'", "did you mean circle"]),
        ({"shape": {"kind": "polgon"}}, ["shape.kind: must be one of circle, polygon", "did you mean polygon"]),
        ({"shape": {"kind": "circle", "radius": 1, "sides": []}}, ["shape.sides", "circle", "kind polygon"]),
        ({"shape": {}}, ["shape.kind: missing", "circle, polygon"]),
    ],
)
def test_decode_refuses_names_that_a_registry_lacks(change: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        decode(Sketch, {"shape": {"kind": "circle", "radius": 1.0}, "outline": None, **change})
    for part in parts:
        assert part in str(refused.value)
