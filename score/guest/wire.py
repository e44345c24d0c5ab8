"""Joins the processes of the tests and of the program: each uses values and objects of the other.

Values cross the border by content, also those of the standard library. The receiver builds them from plain data, so a
comparison in the tests never asks the program whether a value is equal. Mutable values keep their identity: both sides
report what they changed with their next message. Any other object stays where it is; the other side gets a proxy that
forwards its operators, and a class with the same name and bases (`proxies`).
"""

import collections
import datetime
import decimal
import fractions
import json
import operator
import sys
import threading
import types
from collections.abc import Generator, Sequence
from typing import Any, BinaryIO

from score.guest.proxies import CONTENT, make_class, make_error, make_proxy

_LARGEST_LINE = 2**24
_DEEPEST = 200
_SINGLE_ITEMS = 32  # generators send so many items one by one, and then several at a time
_DICTS = (dict, collections.OrderedDict, collections.Counter, collections.defaultdict)
_MUTABLE = {kind.__name__: kind for kind in (list, collections.deque, bytearray, set, *_DICTS)}
_REBUILT = {
    kind.__name__: kind
    for kind in (
        *(int, bytes, complex, range, slice, fractions.Fraction, decimal.Decimal),
        *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone),
    )
}
_CLASSES = {kind.__name__: kind for kind in (*CONTENT, *_MUTABLE.values(), *_REBUILT.values(), object, bool)}


class WireError(Exception):
    """A value that cannot be sent or received."""


class BrokenLinkError(BaseException):
    """The other process ended or sent no message. `except Exception` does not catch it."""


class Peer:
    """One end of the link. The other side may send requests before its reply, which are served meanwhile.

    `doubt` says why a failure may be due to the link; empty if it is not.
    """

    def __init__(self, incoming: BinaryIO, outgoing: BinaryIO, parity: int) -> None:
        """Starts without shared objects. The numbers that a side gives to its objects have its parity."""
        self._incoming = incoming
        self._outgoing = outgoing
        self._next_number = parity
        self._numbers: dict[int, int] = {}  # by id, of own objects and of shared containers
        self._objects: dict[int, Any] = {}  # own objects, which stay alive
        self._shared: dict[int, _Shared] = {}
        self._announced: set[int] = set()  # classes that the other side has
        self._sent: set[int] = set()  # containers that are in the message that is being written
        self._remote_numbers: dict[int, int] = {}  # by id
        self._remote: dict[int, Any] = {}  # what stands for an object of the other side
        self._lock = threading.RLock()
        self.doubt = ""

    def perform(self, name: str, target: Any, arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        """Performs an operation on an own object for the other side."""
        raise NotImplementedError

    def operate(self, target: Any, name: str, arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        """Performs an operator on an object of the other side."""
        return self.ask("special", target._number, name, *arguments, **named)

    def take_printed(self) -> str:
        """Returns what this side printed since the last call."""
        return ""

    def is_remote(self, value: Any) -> bool:
        """Returns whether a value stands for an object of the other side and has no content."""
        return id(value) in self._remote_numbers and not isinstance(value, CONTENT)

    def ask(self, name: str, number: int | None, /, *arguments: Any, **named: Any) -> Any:
        """Performs an operation on an object of the other side, or on its module if the number is None."""
        try:
            with self._lock:
                self._sent.clear()
                request: dict[str, Any] = {
                    "do": name,
                    "on": number,
                    "arguments": [self.encode(item) for item in arguments],
                }
                request["named"] = {key: self.encode(item) for key, item in named.items()}
                self.send({**request, "changes": self._encode_changes()})
                while "do" in (message := self.receive()):
                    self.serve(message)
                if "doubt" in message:
                    raise WireError(str(message["doubt"]))
                result = self.decode(message["value"] if "value" in message else message["error"])
                for change in message["changes"]:
                    self.decode(change)
                sys.stdout.write(str(message["printed"]))
        except (OSError, KeyError, RecursionError) as problem:
            raise BrokenLinkError(f"no reply from the program: {problem!r}") from problem
        except WireError as problem:
            self.doubt = self.doubt or str(problem)
            raise BrokenLinkError(str(problem)) from problem
        if "value" in message:
            return result
        raise result if isinstance(result, BaseException) else BrokenLinkError("no reply from the program: no error")

    def serve(self, message: dict[str, Any]) -> None:
        """Performs a request of the other side, and replies."""
        try:
            # The arguments stay in use until what happened to them is encoded.
            arguments = [self.decode(item) for item in message["arguments"]]
            named = {str(name): self.decode(value) for name, value in message["named"].items()}
            for change in message["changes"]:
                self.decode(change)
            target = None if message["on"] is None else self._objects[message["on"]]
            try:
                outcome = "value"
                result = self.perform(message["do"], target, arguments, named)
            except (Exception, SystemExit) as error:
                outcome = "error"
                result = error
            self._sent.clear()
            reply = {outcome: self.encode(result), "changes": self._encode_changes()}
            self.send({**reply, "printed": self.take_printed()})
        except (WireError, RecursionError, LookupError, TypeError) as problem:
            self.send({"doubt": f"{problem}"})

    def send(self, message: dict[str, Any]) -> None:
        """Writes a message as a line."""
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        if len(line) > _LARGEST_LINE:
            raise WireError(f"a value of more than {_LARGEST_LINE} bytes")
        self._outgoing.write(line)
        self._outgoing.flush()

    def receive(self) -> dict[str, Any]:
        """Reads a message, or raises `BrokenLinkError` if the other process ended or sent no message."""
        line = self._incoming.readline(_LARGEST_LINE + 1)
        if not line:
            raise BrokenLinkError("the program ended")
        try:
            message = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError) as error:
            raise BrokenLinkError(f"no reply from the program: a line that is not JSON: {error}") from error
        if not isinstance(message, dict):
            raise BrokenLinkError("no reply from the program: a line that is not a message")
        return message

    def encode(self, value: Any, depth: int = 0) -> Any:
        """Returns a value as JSON: plain, or a list of its kind and its parts."""
        kind = type(value)
        if value is None or kind in (bool, float, str) or (kind is int and -(2**63) < value < 2**63):
            return value
        if depth > _DEEPEST:
            raise WireError(f"a value nested more than {_DEEPEST} deep")
        if id(value) in self._remote_numbers:
            return ["yours", self._remote_numbers[id(value)]]
        if _MUTABLE.get(kind.__name__) is kind:
            return self._encode_container(value, kind, depth + 1)
        if kind in (tuple, frozenset):
            return [kind.__name__, *(self.encode(item, depth + 1) for item in value)]
        if _REBUILT.get(kind.__name__) is kind:
            return ["new", kind.__name__, *(self.encode(item, depth + 1) for item in _arguments_of(value, kind))]
        if value is NotImplemented:
            return ["NotImplemented"]
        return self._encode_class(value) if isinstance(value, type) else self._encode_object(value, kind, depth + 1)

    def _encode_object(self, value: Any, kind: type, depth: int) -> list[Any]:
        number = self._number_of(value)
        if isinstance(value, BaseException):
            parts = self.encode(value.args, depth), str(value)[:2000], self.encode(value.__cause__, depth)
            return ["error", number, self._encode_class(kind), *parts]
        if isinstance(value, types.CoroutineType):
            return ["coroutine", number]
        if hasattr(kind, "__next__") and kind.__module__ in ("builtins", "itertools"):
            return ["iterator", number]
        base: Any = next((ancestor for ancestor in kind.__mro__ if ancestor in CONTENT), None)
        if base is not None:
            arguments = [base.__iter__(value)] if base is frozenset else base.__getnewargs__(value)
            return ["content", number, self._encode_class(kind), self.encode(base(*arguments), depth)]
        has_class = kind.__module__ not in ("builtins", "functools", "typing")
        return ["object", number, self._encode_class(kind) if has_class else None]

    def _encode_container(self, value: Any, kind: Any, depth: int) -> list[Any]:
        number = self._numbers.get(id(value))
        if number is None or number not in self._shared:
            number = self._take_number(value)
        if number in self._sent:
            return ["same", number]
        if 2 * len(value) > _LARGEST_LINE:
            raise WireError(f"a value of more than {_LARGEST_LINE} bytes")
        self._sent.add(number)
        items = self._shared.setdefault(number, _Shared(value)).take_snapshot()
        extra = getattr(value, "maxlen" if kind is collections.deque else "default_factory", None)
        if kind in _DICTS:
            items = [[self.encode(key, depth), self.encode(item, depth)] for key, item in items]
        else:
            items = [self.encode(item, depth) for item in items]
        return [kind.__name__, number, self.encode(extra, depth), *items]

    def _encode_class(self, kind: type) -> list[Any]:
        if id(kind) in self._remote_numbers:
            return ["yours", self._remote_numbers[id(kind)]]
        if _CLASSES.get(kind.__name__) is kind:
            return ["type", kind.__name__]
        number = self._number_of(kind)
        if number in self._announced:
            return ["class", number]
        self._announced.add(number)
        bases = [self._encode_class(base) for base in kind.__bases__ if base is not object]
        return ["class", number, kind.__module__, kind.__qualname__, bases, list(vars(kind))]

    def _encode_changes(self) -> list[Any]:
        """Returns the containers that this side changed, and forgets those that it no longer uses."""
        changes = []
        for number, shared in list(self._shared.items()):
            if number not in self._sent and shared.has_changed():
                changes.append(self.encode(shared.container))
            # One reference is that of `shared`, and one that of the argument here.
            elif sys.getrefcount(shared.container) <= 2:
                del self._shared[number]
                self._numbers.pop(id(shared.container), None)
        return changes

    def _number_of(self, value: Any) -> int:
        """Returns the number of an own object, which stays alive from now on."""
        number = self._numbers.get(id(value))
        if number is None or number not in self._objects:
            number = self._take_number(value)
            self._objects[number] = value
        return number

    def _take_number(self, value: Any) -> int:
        self._next_number += 2
        self._numbers[id(value)] = self._next_number
        return self._next_number

    def decode(self, data: Any) -> Any:
        """Builds a value from its JSON, or raises `WireError` if it is none."""
        if data is None or type(data) in (bool, int, float, str):
            return data
        try:
            kind, *parts = data
            if kind in ("tuple", "frozenset"):
                return _CLASSES[kind]([self.decode(item) for item in parts])
            if kind in _MUTABLE:
                return self._decode_container(_MUTABLE[kind], *parts)
            match kind:
                case "new":
                    return _REBUILT[parts[0]](*[self.decode(item) for item in parts[1:]])
                case "NotImplemented":
                    return NotImplemented
                case "type":
                    return _CLASSES[parts[0]]
                case "yours":
                    return self._objects[parts[0]]
                case "same":
                    return self._shared[parts[0]].container
                case "coroutine":
                    return self._await(parts[0])
            return self._remote[parts[0]] if parts[0] in self._remote else self._decode_object(kind, *parts)
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, StopIteration) as error:
            raise WireError(f"data that is not a value: {error}") from error

    def _decode_container(self, kind: Any, number: int, extra: Any, *items: Any) -> Any:
        if number not in self._shared:
            extra = self.decode(extra)
            empty: Any = collections.deque(maxlen=extra) if kind is collections.deque else kind()
            if kind is collections.defaultdict:
                empty.default_factory = extra
            self._shared[number] = _Shared(empty)
            self._numbers[id(empty)] = number
        container = self._shared[number].begin()
        if type(container) is not kind:
            raise TypeError("another type of container")
        # Items may refer to the container itself, and keys may ask the other side for their hash.
        values = [tuple(map(self.decode, item)) if kind in _DICTS else self.decode(item) for item in items]
        container.clear()
        for value in values:
            if kind in _DICTS:
                container[value[0]] = value[1]
            else:
                container.add(value) if kind is set else container.append(value)
        self._shared[number].take_snapshot()
        return container

    def _decode_object(self, kind: str, number: int, *parts: Any) -> Any:
        if kind == "class":
            module, name, bases, overridden = parts
            error_class = getattr(sys.modules.get(module), name, None) if module not in ("tests", "solution") else None
            is_error = isinstance(error_class, type) and issubclass(error_class, BaseException)
            decoded: Any = (
                error_class if is_error else make_class(self, number, name, [*map(self.decode, bases)], overridden)
            )
        elif kind == "iterator":
            decoded = self._iterate(number)
        elif kind == "object":
            decoded = make_proxy(self, number, self.decode(parts[0]))
        elif kind == "error":
            decoded = make_error(self, number, self.decode(parts[0]), self.decode(parts[1]), str(parts[2]))
            decoded.__cause__ = self.decode(parts[3])
        else:
            mirror, content = map(self.decode, parts)
            decoded = next(base for base in mirror.__mro__ if base in CONTENT).__new__(mirror, content)
            decoded.__dict__.update(_peer=self, _number=number)
        self._remote[number] = decoded
        self._remote_numbers[id(decoded)] = number
        return decoded

    async def _await(self, number: int) -> Any:
        return self.ask("await", number)

    def _iterate(self, number: int) -> Generator[Any, Any, Any]:
        count = 0
        sent = None
        is_over = False
        while not is_over:
            size = 1 if count < _SINGLE_ITEMS else min(count, 1024)
            items, is_over, result = self.ask("next", number, sent, size)
            count += len(items)
            for item in items:
                sent = yield item
        if isinstance(result, Exception):
            raise result
        return result


def _arguments_of(value: Any, kind: type) -> Sequence[Any]:
    match value:
        case int():
            return hex(value), 16
        case bytes():
            return value.decode("latin-1"), "latin-1"
        case complex():
            return value.real, value.imag
    arguments: Sequence[Any] = value.__reduce__()[1]
    return arguments


class _Shared:
    """A mutable container that both sides have, with its items when they last agreed."""

    def __init__(self, container: Any) -> None:
        self.container = container
        self._snapshot: list[Any] | None = None  # while it is being filled

    def begin(self) -> Any:
        """Returns the container, of which no change is reported until the next snapshot."""
        self._snapshot = None
        return self.container

    def take_snapshot(self) -> list[Any]:
        """Remembers and returns the items as they are."""
        self._snapshot = self._items()
        return self._snapshot

    def has_changed(self) -> bool:
        """Returns whether an item is another object than it was."""
        if self._snapshot is None:
            return False
        old = self._snapshot
        new = self._items()
        if isinstance(self.container, dict):
            old = [part for pair in old for part in pair]
            new = [part for pair in new for part in pair]
        return len(old) != len(new) or not all(map(operator.is_, old, new))

    def _items(self) -> list[Any]:
        return list(self.container.items() if isinstance(self.container, dict) else self.container)
