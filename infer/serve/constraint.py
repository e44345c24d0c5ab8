"""Structured output: grammars that limit the tokens of an answer, each in a process. Imports no torch.

A grammar may crash its library, and take any memory and time to build. So the server never builds one: a process that
has read the tokenizer forks another for each request (`grammar_process`), which also computes the allowed tokens.
"""

import asyncio
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.chat.messages import ToolDefinition
from data.chat.templates import ChatTemplate, Pieces
from data.corpus import describe, refusal
from data.tokenizer import Tokenizer
from infer.serve import grammar_process
from infer.serve.fields import ApiError, internal_error
from infer.serve.grammar_process import BEGUN, HEADER, MOST_BYTES

COMPACT = {"x-guidance": {"whitespace_flexible": False}}
"""What a schema says for JSON without white space, which a model may write without end."""
_FORMATS = {"json": "json_schema"}
_MOST_CHARACTERS = 2**18
_MOST_OPEN = 32  # processes
MOST_DESCRIPTORS = 2 * _MOST_OPEN + 8  # of all of them, in the server
_MOST_BUILT = 2  # of these, grammars that are built at a time
_START_SECONDS = 60.0
_BUILD_SECONDS = 5.0
_MASK_SECONDS = 0.02  # of each token, which llguidance's limits keep; a request may exceed it by _SPARE_SECONDS in all
_SPARE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """A grammar of a request that is not built yet.

    Attributes:
        place: field of the request that has it.
        start: Lark rule around its name `@answer`; empty if nothing precedes it.
    """

    place: str
    kind: str
    text: str
    start: str = ""


class OpenGrammar:
    """The process of a grammar that was built. The engine's thread exchanges tokens and masks with it."""

    def __init__(self, connection: socket.socket, lifetime: int) -> None:
        """Takes over a socket, and a descriptor that keeps the process alive."""
        self._num_bytes = 0  # size of a mask, once it is built
        self.numbers = itertools.count()
        self.ended: list[int] = []  # copies that no sequence uses
        self._connection = connection
        self._stream = connection.makefile("rb")
        self._lifetime = lifetime
        self._lock = threading.Lock()
        self._spare_seconds = _SPARE_SECONDS
        self._masks: dict[int, bytes] = {}

    async def build(self, structure: Structure) -> None:
        """Builds the grammar, or raises ApiError: it is wrong, or takes too much memory or time."""
        loop = asyncio.get_running_loop()
        self._connection.settimeout(0)
        message = json.dumps({"kind": structure.kind, "text": structure.text, "start": structure.start})
        begun = reply = b""
        with suppress(OSError):  # also TimeoutError
            async with asyncio.timeout(_START_SECONDS):
                begun = await loop.sock_recv(self._connection, len(BEGUN))
            async with asyncio.timeout(_BUILD_SECONDS):
                await loop.sock_sendall(self._connection, message.encode() + b"\n")
                while not reply.endswith(b"\n") and (part := await loop.sock_recv(self._connection, 2**16)):
                    reply += part
        if not begun:
            raise ApiError(503, "no grammar can be built now; try again later", code="structure_unavailable")
        if not reply.endswith(b"\n"):
            limits = f"not built within {_BUILD_SECONDS:g} s and {MOST_BYTES >> 20} MiB"
            raise ApiError.of_field(refusal(structure.place, "must be a grammar", limits, "a simpler one"))
        values: dict[str, Any] = json.loads(reply)
        if values["problem"]:
            error = refusal(structure.place, "must be a grammar that can be built", "not", "a simpler one")
            raise internal_error(400, str(error), "invalid_grammar", values["problem"], structure.place)
        self._num_bytes = int(values["num_bytes"])

    def send(self, number: int, tokens: Sequence[int]) -> None:
        """Sends the next tokens of a copy, to which the process answers with a mask."""
        ended = [self.ended.pop() for _ in range(len(self.ended))]
        message = b"".join(HEADER.pack(copy, -1) for copy in ended)
        message += HEADER.pack(number, len(tokens)) + struct.pack(f"={len(tokens)}i", *tokens)
        with self._lock, suppress(OSError):  # `receive` reports a process that has ended
            self._connection.settimeout(_MASK_SECONDS + max(self._spare_seconds, 0))
            self._connection.sendall(message)

    def receive(self, number: int) -> bytes:
        """Returns the tokens that may be next in a copy, a bit each; none if time or process have ended."""
        began = time.monotonic()
        with self._lock, suppress(OSError, ValueError):
            while number not in self._masks and self._spare_seconds > 0:
                self._connection.settimeout(_MASK_SECONDS + self._spare_seconds)
                frame = self._stream.read(4 + self._num_bytes)
                if len(frame) < 4 + self._num_bytes:
                    break
                self._masks[int.from_bytes(frame[:4], sys.byteorder)] = frame[4:]
        self._spare_seconds -= max(0.0, time.monotonic() - began - _MASK_SECONDS)
        return self._masks.pop(number, b"")

    def close(self) -> None:
        """Ends the process, also while it computes."""
        os.close(self._lifetime)
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # the engine's thread may wait for it
        with self._lock:
            self._stream.close()
            self._connection.close()


class GrammarConstraint:
    """The tokens that a grammar allows after those that were accepted. Implements `TokenConstraint`."""

    def __init__(self, grammar: OpenGrammar, vocab_size: int) -> None:
        self._grammar = grammar
        self._vocab_size = vocab_size
        self._number = next(grammar.numbers)
        self._unsent: list[int] = []
        self._is_asked = False
        self._allowed: NDArray[np.bool_] | None = None

    def allowed(self) -> NDArray[np.bool_]:
        """Returns whether each token may be next, [V]; none if the grammar became too complex."""
        if self._allowed is None:
            mask = self._grammar.receive(self._number) if self._is_asked else b""
            if self._unsent or not self._is_asked:
                self._ask()
                mask = self._grammar.receive(self._number)
            self._is_asked = False
            packed = np.frombuffer(mask, dtype=np.uint8)
            self._allowed = np.unpackbits(packed, count=self._vocab_size, bitorder="little").astype(np.bool_)
        return self._allowed

    def accept(self, token: int) -> None:
        """Advances by a token that was chosen. The process computes the next ones meanwhile."""
        self._allowed = None
        self._unsent.append(token)
        if not self._is_asked:
            self._ask()

    def _ask(self) -> None:
        self._grammar.send(self._number, self._unsent)
        self._unsent = []
        self._is_asked = True

    def __del__(self) -> None:
        self._grammar.ended.append(self._number)


class Grammars:
    """Reads grammars of requests, and opens their processes."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._end_ids = list(end_ids)
        self._vocab_size = vocab_size
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self.is_draining = False
        self._slots = asyncio.Semaphore(_MOST_OPEN)
        self._builds = asyncio.Semaphore(_MOST_BUILT)

    @property
    def is_available(self) -> bool:
        """Whether the package that builds grammars is installed."""
        return find_spec("llguidance") is not None

    def start(self) -> socket.socket:
        """Starts the process that forks others, if it does not run, and returns its socket."""
        if self._control is not None and self._process is not None and self._process.poll() is None:
            return self._control
        self.close()
        settings = {"tokenizer": self._tokenizer.serialized, "vocab_size": self._vocab_size, "end_ids": self._end_ids}
        self._control, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as stdin:
            stdin.write(json.dumps(settings).encode())
            stdin.seek(0)
            # Not in the folder of the program: its modules would hide those of Python.
            command = [sys.executable, "-P", grammar_process.__file__, str(theirs.fileno())]
            environment = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            self._process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # each crash of a grammar would print lines
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,
            )
        return self._control

    def close(self) -> None:
        """Ends the process that forks others."""
        if self._control is not None and self._process is not None:
            self._control.close()
            self._process.kill()
            self._process.wait()

    @asynccontextmanager
    async def open(self, structure: Structure | None) -> AsyncIterator[Callable[[], GrammarConstraint] | None]:
        """Builds a grammar in a process that ends with the context; yields a maker of constraints, or None.

        Raises:
            ApiError: the grammar is wrong, or takes too much memory or time.
        """
        if structure is None:
            yield None
            return
        async with self._slots:
            async with self._builds:
                if self.is_draining:  # the server ends when the grammars that are being built are
                    raise ApiError(503, "the server is shutting down", code="shutting_down")
                grammar = self._fork()
                try:
                    await grammar.build(structure)
                except BaseException:
                    grammar.close()
                    raise
            try:
                yield lambda: GrammarConstraint(grammar, self._vocab_size)
            finally:
                grammar.close()

    def _fork(self) -> OpenGrammar:
        """Starts the process of a grammar."""
        connection, theirs = socket.socketpair()
        their_lifetime, lifetime = os.pipe()
        with theirs, open(their_lifetime):
            grammar = OpenGrammar(connection, lifetime)
            with suppress(OSError):  # the next request starts another process; `build` reports it for this one
                socket.send_fds(self.start(), [b"g"], [theirs.fileno(), their_lifetime])
        return grammar

    def read(self, place: str, kind: str, value: Any, thoughts_end: Pieces = ()) -> Structure:
        """Returns a grammar: `json` (a schema), `regex`, `choice`, `grammar` or `lark`.

        Args:
            place: field of the request that has the grammar.
            thoughts_end: pieces that end thoughts, which precede the constrained answer.
        """
        types = {"json": dict | str, "choice": list}
        if value == [] or not isinstance(value, types.get(kind, str)):
            rule = f"must be {'an object' if kind == 'json' else 'text, or a list that is not empty'}"
            raise refusal(place, rule, describe(value), "{}")
        if not self.is_available:
            message = f"{place}: structured output needs the extra structured: pip install '.[structured]'"
            raise ApiError(400, message, place, "missing_extra")
        text = value if isinstance(value, str) else json.dumps(value)
        if len(text) > _MOST_CHARACTERS:  # llguidance takes quadratic time for choices
            rule = f"must be a grammar of at most {_MOST_CHARACTERS} characters"
            raise refusal(place, rule, f"of {len(text)}", "a simpler one")
        start = f"start: THOUGHTS {self._literal(thoughts_end)} @answer\nTHOUGHTS: /(?s:.*)/" if thoughts_end else ""
        return Structure(place=place, kind=_FORMATS.get(kind, kind), text=text, start=start)

    def read_call(self, tools: Iterable[ToolDefinition], template: ChatTemplate, thoughts_end: Pieces) -> Structure:
        """Returns the grammar of one call of one of the tools, as the template writes it."""
        form = template.tools
        options = []
        for tool in tools:
            name = json.dumps(tool.name)
            schema = json.dumps({"type": "object", **json.loads(tool.parameters), **COMPACT})
            begin = self._literal((*form.calls_begin, *form.call_begin))
            end = self._literal((*form.call_end, *form.calls_end))
            options.append(f"{begin} {name} {self._literal(form.separator)} %json {schema} {end}")
        return self.read("tool_choice", "lark", f"start: {' | '.join(options)}", thoughts_end)

    def _literal(self, pieces: Pieces) -> str:
        """Returns pieces of a template in the grammar's syntax."""
        names = self._tokenizer.placed_names.values()
        parts = (
            f"<[{self._tokenizer.special_id(piece)}]>" if piece in names else json.dumps(piece, ensure_ascii=False)
            for piece in pieces
        )
        return " ".join(parts)
