"""Runs a program in the sandbox, and then performs what the tests ask for.

The tests run in another sandbox. This process gets the arguments of each call and returns a value. It never gets a
verdict, and an expected value only among others, where an operator of the program itself decides (`tests`).
"""

import io
import json
import os
import sys
from collections.abc import ItemsView, KeysView, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, BinaryIO

from score.guest.limits import apply_limits, read_source
from score.guest.proxies import perform_special
from score.guest.wire import BrokenLinkError, Peer

_LONGEST_PRINTED = 2**16
_MUTABLE: tuple[Any, ...] = (list, dict, set, bytearray)


def main(limits: str, request_fd: str, reply_fd: str) -> None:
    """Runs `program.py` as a module and serves requests over two file descriptors until the tests end."""
    values = json.loads(limits)
    source = read_source(values, "program.py")
    apply_limits(values)
    module = sys.modules["solution"] = ModuleType("solution")
    peer = _ProgramPeer(module, os.fdopen(int(request_fd), "rb"), os.fdopen(int(reply_fd), "wb"))
    sys.stdout = io.StringIO()
    problem = ""
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"[:200]
    try:
        peer.send({"problem": problem})
        while True:
            peer.serve(peer.receive())
    except BrokenLinkError:
        pass  # the tests have ended


def take_items(iterator: Any, sent: Any, size: int) -> tuple[list[Any], bool, Any]:
    """Returns some items of an iterator, whether it is over, and its result or its error."""
    items: list[Any] = []
    try:
        for _ in range(size):
            items.append(next(iterator) if sent is None else iterator.send(sent))
    except StopIteration as end:
        return items, True, end.value
    except Exception as error:
        return items, True, error
    return items, False, None


def await_coroutine(coroutine: Any) -> Any:
    """Runs a coroutine to its end in another thread, because a loop may be running in this one."""
    import asyncio

    with ThreadPoolExecutor(1) as threads:
        return threads.submit(asyncio.run, coroutine).result()


class _ProgramPeer(Peer):
    """The program's end of the link. It allows the tests everything."""

    def __init__(self, module: ModuleType, incoming: BinaryIO, outgoing: BinaryIO) -> None:
        super().__init__(incoming, outgoing, parity=1)
        self._module = module

    def perform(self, name: str, target: Any, arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        target = self._module if target is None else target
        match name:
            case "get":
                return getattr(target, *arguments)
            case "set":
                return setattr(target, *arguments)
            case "special":
                return perform_special(target, arguments[0], arguments[1:], named)
            case "next":
                return take_items(target, *arguments)
            case "await":
                return await_coroutine(target)
            case "content":
                return _content_of(target)
            case _:
                return [_try(target, arguments[0], operand) for operand in arguments[1]]

    def take_printed(self) -> str:
        if not isinstance(sys.stdout, io.StringIO):
            return ""
        printed = sys.stdout.getvalue()
        sys.stdout.seek(0)
        sys.stdout.truncate()
        return printed[:_LONGEST_PRINTED]


def _content_of(value: Any) -> Any:
    """Returns the items of a mutable value, also of a subclass; None of any other object."""
    if isinstance(value, KeysView | ItemsView):
        return set(value)
    base: Any = next((kind for kind in type(value).__mro__ if kind in _MUTABLE), None)
    return None if base is None else base(dict.items(value) if base is dict else base.__iter__(value))


def _try(target: Any, name: str, operand: Any) -> Any:
    try:
        return perform_special(target, name, [operand], {})
    except Exception as error:
        return error
