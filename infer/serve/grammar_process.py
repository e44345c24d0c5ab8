"""Builds grammars and computes the tokens that they allow, each in a process forked from this program.

It is started by path with a Unix socket and a tokenizer, and imports only llguidance. A grammar that overflows the
stack, or takes too much memory or time, ends its process and nothing else.
"""

import contextlib
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

BEGUN = b"."
HEADER = struct.Struct("=ii")
"""Number of a copy of the matcher, and the number of its next tokens, which follow; -1 drops the copy."""
MOST_BYTES = 2**27  # memory of a grammar
_CPU_SECONDS = (10, 600)  # while a grammar is built; later, if the server has ended without it


def main() -> None:
    """Forks a process for each pair of descriptors that arrives, until the server closes the socket."""
    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # answers in progress are drained
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children leave no zombies
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    settings = json.load(sys.stdin)
    from llguidance import LLTokenizer

    tokenizer = LLTokenizer(settings["tokenizer"], n_vocab=settings["vocab_size"], eos_token=settings["end_ids"])
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 2)
        if not descriptors:
            return
        if os.fork() == 0:
            control.close()
            with contextlib.suppress(BaseException):
                _run_grammar(tokenizer, *descriptors)
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def _run_grammar(tokenizer: Any, descriptor: int, lifetime: int) -> None:
    """Builds the grammar that arrives, and answers with the allowed tokens after each message."""
    # The end of the request closes the other end of the pipe, and that signal ends this process, also in native code.
    fcntl.fcntl(lifetime, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifetime, fcntl.F_SETFL, fcntl.fcntl(lifetime, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifetime], [], [], 0)[0]:
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
        used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used_bytes + MOST_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, _CPU_SECONDS)
    connection = socket.socket(fileno=descriptor)
    connection.sendall(BEGUN)
    stream = connection.makefile("rb")
    matcher, problem = _build(tokenizer, **json.loads(stream.readline()))
    num_bytes = 0 if problem else len(matcher.compute_bitmask())
    connection.sendall(json.dumps({"problem": problem, "num_bytes": num_bytes}).encode() + b"\n")
    resource.setrlimit(resource.RLIMIT_CPU, _CPU_SECONDS[1:] * 2)
    copies: dict[int, Any] = {}
    while len(header := stream.read(HEADER.size)) == HEADER.size:
        number, count = HEADER.unpack(header)
        if count < 0:
            copies.pop(number, None)
            continue
        tokens = struct.unpack(f"={count}i", stream.read(4 * count))
        if number not in copies:
            copies[number] = matcher.deep_copy()
        for token in tokens:
            copies[number].consume_token(token)
        mask = copies[number].compute_bitmask()
        connection.sendall(struct.pack("=i", number) + (bytes(len(mask)) if copies[number].is_error() else mask))


def _build(tokenizer: Any, kind: str, text: str, start: str) -> tuple[Any, str]:
    """Returns the matcher of a grammar, and its problem; `start` is a Lark rule around its name `@answer`."""
    from llguidance import LLMatcher, LLParserLimits, grammar_from

    try:
        if kind == "json_schema":  # without white space, which a model may write without end
            definition = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_flexible": False})
        else:
            definition = grammar_from(kind, text)  # type: ignore[arg-type]
        is_lark = kind in ("lark", "grammar", "choice")
        answer = {"lark_grammar": definition} if is_lark else json.loads(definition)["grammars"][0]
    except (ValueError, TypeError, RecursionError) as error:
        return None, "nested too deeply" if "recursion" in str(error) else str(error)
    grammars = [{"lark_grammar": start}] if start else []
    grammars.append({**answer, "name": "answer"})
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(tokenizer, json.dumps({"grammars": grammars}), log_level=0, limits=limits)
    matcher.compute_bitmask()  # finds most problems
    problem = matcher.get_error()
    return matcher, "satisfied by no text" if "NoExtension" in problem else problem


if __name__ == "__main__":
    main()
