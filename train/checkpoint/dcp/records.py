"""Reads a pickle as data: names become inert records, and nothing is imported or called.

A pickle is a small program whose instructions may call any function. torch writes two things with it: the list of a
checkpoint's tensors, and a header for each tensor. Both need few instructions. Here those build plain values, and every
other instruction is refused. No torch here.
"""

import pickletools
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS_AND_TEXTS = frozenset(("BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE"))
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = frozenset(("BINPUT", "LONG_BINPUT"))
_GETS = frozenset(("BINGET", "LONG_BINGET"))
_IGNORED = frozenset(("PROTO", "FRAME"))
_LARGEST_NUMBER = 2**63
_LONGEST_TEXT = 100


class RecordError(ValueError):
    """The bytes are no pickle, or contain an instruction or a nesting that records do not need."""


@dataclass(frozen=True, slots=True, eq=False)
class GlobalName:
    """The module and name of an object that a pickle refers to. It is never imported.

    Attributes:
        text: dotted name.
    """

    text: str


@dataclass(slots=True, eq=False)
class ObjectRecord:
    """An object that a pickle would create by a call.

    Attributes:
        name: dotted name of what would be called.
        arguments: arguments of the call.
        state: state that the object would then receive; None if there is none.
    """

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class PersistentId:
    """A reference to data that is stored outside the pickle."""

    key: Any


_MARK = GlobalName("mark")


def read_records(content: bytes, allowed: Container[str]) -> Any:
    """Returns the value that a pickle holds, with records in place of objects.

    Args:
        allowed: dotted names that it may contain. The caller decides what a name means.

    Raises:
        RecordError: the content is no pickle, or is refused.
    """
    machine = _Machine(allowed)
    try:
        for instruction, argument, _ in pickletools.genops(content):
            if instruction.name == "STOP":
                return machine.result()
            machine.run(instruction.name, argument)
    except RecordError:
        raise
    # pickletools raises ValueError on truncated bytes, and various decoding errors on others.
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise RecordError(f"is no pickle ({type(error).__name__}: {error})") from error
    raise RecordError("is no pickle: it has no end")


class _Machine:
    """The stack and the memo that a pickle's instructions work on."""

    def __init__(self, allowed: Container[str]) -> None:
        self._allowed = allowed
        self._stack: list[Any] = []
        # A dictionary, not a list, because an instruction may use any index up to 2**32.
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        """Returns the value that is left on the stack."""
        if len(self._stack) != 1:
            raise RecordError(f"must leave one value, leaves {len(self._stack)}")
        return self._stack[0]

    def run(self, name: str, argument: Any) -> None:
        """Executes one instruction."""
        stack = self._stack
        if name in _NUMBERS_AND_TEXTS:
            stack.append(_checked(argument))
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in _PUTS:
            self._memo[argument] = stack[-1]
        elif name in _GETS:
            stack.append(self._memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _IGNORED:
            pass
        else:
            self._build(name, argument)

    def _build(self, name: str, argument: Any) -> None:
        """Executes an instruction that creates or fills a container, or that would create an object."""
        stack = self._stack
        match name:
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[name])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(_flat_tuple(self._pop(_SHORT_TUPLES[name])))
            case "TUPLE":
                stack.append(_flat_tuple(self._pop_to_mark()))
            case "APPEND" | "APPENDS":
                items = self._pop(1) if name == "APPEND" else self._pop_to_mark()
                _of_type(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._pop(2) if name == "SETITEM" else self._pop_to_mark()
                _fill(_of_type(stack[-1], dict), items)
            case "GLOBAL" | "STACK_GLOBAL":
                stack.append(self._name(argument.split(" ") if name == "GLOBAL" else self._pop(2)))
            case "REDUCE" | "NEWOBJ":
                called, arguments = self._pop(2)
                stack.append(ObjectRecord(_of_type(called, GlobalName).text, _of_type(arguments, tuple)))
            case "BUILD":
                (state,) = self._pop(1)
                _of_type(stack[-1], ObjectRecord).state = state
            case "BINPERSID":
                stack.append(PersistentId(*self._pop(1)))
            case _:
                raise RecordError(f"must hold only plain records, holds the instruction {name}")

    def _name(self, parts: list[Any]) -> GlobalName:
        text = ".".join(_of_type(part, str) for part in parts)
        if text not in self._allowed:
            raise RecordError(f"must hold only plain records, names {shown(text)}")
        return GlobalName(text)

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count or any(item is _MARK for item in self._stack[-count:]):
            raise RecordError("is no pickle: its stack is empty")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        items.reverse()
        return items


def shown(text: str) -> str:
    """Returns a text from a file for an error message: in one line, and truncated if it is long."""
    literal = repr(text)[1:-1]
    return literal if len(literal) <= _LONGEST_TEXT else f"{literal[:_LONGEST_TEXT]}..."


def _checked(value: Any) -> Any:
    if isinstance(value, int) and not -_LARGEST_NUMBER <= value < _LARGEST_NUMBER:
        raise RecordError("must hold numbers of at most 64 bits, holds a larger one")
    return value


def _flat_tuple(items: list[Any]) -> tuple[Any, ...]:
    """Returns a tuple, and refuses more than three levels.

    Hashing or printing a deeply nested tuple overflows the interpreter's stack.
    """
    inner = (item for item in items if type(item) is tuple)
    if any(type(part) is tuple and any(type(each) is tuple for each in part) for item in inner for part in item):
        raise RecordError("must hold tuples of at most three levels, holds a deeper one")
    return tuple(items)


def _fill(values: dict[Any, Any], items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, ObjectRecord):
            raise RecordError(f"must have strings or records as keys, has a {type(key).__name__}")
        values[key] = value


def _of_type(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise RecordError(f"must hold a {kind.__name__}, holds a {type(value).__name__}")
    return value
