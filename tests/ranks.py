"""Runs a function on several real processes in a process group, for distributed tests.

Ranks are forks of a server that has imported torch. They stay alive between calls, so that a call needs neither forks
nor imports. Every call has its own process group. A rank serves another call only if its last call returned and left
nothing behind (`rank_worker` compares threads, environment, signals, definitions and more).
"""

import atexit
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from tests.rank_worker import Call, serve

_GRACE_SECONDS = 0.3
_MOST_IDLE_RANKS = 8
"""Ranks that this process keeps between calls; each holds some 100 MB of its own after a training step."""


class RanksFailedError(AssertionError):
    """A rank raised, died or did not return; the message holds every traceback that had arrived."""


def fork_context() -> ForkServerContext:
    """Starts the server from which ranks and commands of tests are forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


class _Rank:
    """One process that serves calls."""

    def __init__(self) -> None:
        context = fork_context()
        self.connection, theirs = context.Pipe()
        self.process: ForkServerProcess = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


_idle: list[_Rank] = []


@atexit.register
def kill_idle_ranks() -> None:
    """Ends the ranks that no call uses."""
    while _idle:
        _idle.pop().kill()


def _take_rank() -> _Rank:
    while _idle:
        rank = _idle.pop()
        if rank.process.is_alive():
            return rank
        rank.kill()
    return _Rank()


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_seconds: float = 120.0,
    backend: str = "gloo",
    fresh: bool = False,
) -> list[Any]:
    """Calls `function(rank, world_size, *args)` on every rank of a fresh world, one thread each.

    Args:
        function: importable by name; its process group is initialized before and destroyed after the call.
        args: arguments for every rank, sent by pickle.
        timeout_seconds: seconds after which ranks that have not returned are killed and named in the error.
        fresh: whether every rank is a new process that ends with the call.

    Returns:
        The result of each rank, in rank order, sent by pickle.
    """
    job = pickle.dumps((function, args))
    ranks: list[_Rank] = []
    reusable: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="ranks") as folder:
        try:
            for rank in range(world_size):
                ranks.append(_Rank() if fresh else _take_rank())
                call = Call(
                    rank=rank,
                    world_size=world_size,
                    job=job,
                    folder=folder,
                    directory=os.getcwd(),
                    backend=backend,
                    timeout_seconds=timeout_seconds,
                )
                ranks[-1].connection.send(call)
            deadline = time.monotonic() + timeout_seconds + 0.5
            results = _collect(ranks, Path(folder), timeout_seconds, deadline)
            clean = _clean_ranks(ranks, deadline)
            reusable = [] if fresh else clean
            return results
        finally:
            kept = reusable[: max(0, _MOST_IDLE_RANKS - len(_idle))]
            _idle.extend(kept)
            for each in ranks:
                if each not in kept:
                    each.kill()


def _collect(ranks: list[_Rank], folder: Path, timeout_seconds: float, deadline: float) -> list[Any]:
    """Returns every rank's result. Raises the failures that occur up to `_GRACE_SECONDS` after the first."""
    world_size = len(ranks)
    pending = {each.connection: rank for rank, each in enumerate(ranks)}
    results: list[Any] = [None] * world_size
    failures: list[str] = []
    while pending:
        ready = multiprocessing.connection.wait(list(pending), max(0.0, deadline - time.monotonic()))
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = pending.pop(connection)
            try:
                succeeded, value = pickle.loads(connection.recv_bytes())
            except (EOFError, ConnectionResetError):
                ranks[rank].process.join()
                succeeded, value = False, f"died with exit code {ranks[rank].process.exitcode}"
            if succeeded:
                results[rank] = value
            else:
                failures.append(f"rank {rank} of {world_size}: {value}")
                # A dead rank may be noticed by its peers before it is noticed here.
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if not ready:
            break
    if pending and not failures:
        for rank in pending.values():
            stack = _stack(folder, rank)
            failures.append(f"rank {rank} of {world_size}: no result after {timeout_seconds} s; {stack}")
    if failures:
        raise RanksFailedError("\n".join(failures))
    return results


def _clean_ranks(ranks: list[_Rank], deadline: float) -> list[_Rank]:
    """Waits until every rank has destroyed its group. Returns those on which the call left nothing behind."""
    clean = []
    for each in ranks:
        with suppress(BrokenPipeError):  # noticed below, with its exit code
            each.connection.send("leave")
    for rank, each in enumerate(ranks):
        try:
            if not each.connection.poll(max(0.0, deadline - time.monotonic())):
                raise RanksFailedError(f"rank {rank} of {len(ranks)}: returned, then did not leave its group")
            left_behind = each.connection.recv()
        except (EOFError, ConnectionResetError):
            each.process.join()
            code = each.process.exitcode
            raise RanksFailedError(f"rank {rank} of {len(ranks)}: returned, then left with {code}") from None
        if not left_behind:
            clean.append(each)
    return clean


def _stack(folder: Path, rank: int) -> str:
    path = folder / f"stack_{rank}"
    return path.read_text() if path.exists() else "it never started"
