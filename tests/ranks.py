"""Runs a function on several real processes joined in a process group, for tests of what ranks do together."""

import faulthandler
import multiprocessing
import multiprocessing.connection
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_PRELOADED = [
    "torch",
    "torch.distributed",
    "numpy",
    "pytest",
    "torch._dynamo",
    "deepspeed.runtime.zero.stage_1_and_2",
    "train.step",
]
_GRACE_SECONDS = 0.3
_COLLECTIVE_TIMEOUT = timedelta(seconds=60)


class RanksFailedError(AssertionError):
    """A rank raised, died or did not return; the message holds every traceback that had arrived."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_seconds: float = 120.0,
    backend: str = "gloo",
) -> list[Any]:
    """Calls `function(rank, world_size, *args)` on every rank of a fresh world, one thread each.

    Args:
        world_size: number of processes.
        function: importable by name; its process group is initialised before and destroyed after it.
        args: passed to every rank, by pickle.
        timeout_seconds: after which the ranks that have not returned are killed and named.
        backend: of `torch.distributed.init_process_group`.

    Returns:
        What each rank returned, in rank order, by pickle.

    Raises:
        RanksFailedError: soon after the first rank fails; the others are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    job = pickle.dumps((function, args))
    processes: list[ForkServerProcess] = []
    pending: dict[Connection, int] = {}
    with tempfile.TemporaryDirectory(prefix="ranks") as folder:
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                arguments = (rank, world_size, job, folder, backend, timeout_seconds, sender)
                process = context.Process(target=_run_rank, args=arguments, daemon=True)
                process.start()
                sender.close()
                processes.append(process)
                pending[receiver] = rank
            return _collect(pending, processes, Path(folder), timeout_seconds)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _collect(
    pending: dict[Connection, int], processes: list[ForkServerProcess], folder: Path, timeout_seconds: float
) -> list[Any]:
    world_size = len(processes)
    results: list[Any] = [None] * world_size
    failures: list[str] = []
    deadline = time.monotonic() + timeout_seconds + 0.5
    while pending:
        ready = multiprocessing.connection.wait(list(pending), max(0.0, deadline - time.monotonic()))
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = pending.pop(connection)
            try:
                succeeded, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                processes[rank].join()
                succeeded, value = False, f"died with exit code {processes[rank].exitcode}"
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
    # A rank leaves by itself once its result is sent; killing it would hide a hang on the way out.
    for rank, process in enumerate(processes):
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode != 0:
            raise RanksFailedError(f"rank {rank} of {world_size}: returned, then left with {process.exitcode}")
    return results


def _stack(folder: Path, rank: int) -> str:
    path = folder / f"stack_{rank}"
    return path.read_text() if path.exists() else "it never started"


def _run_rank(
    rank: int, world_size: int, job: bytes, folder: str, backend: str, timeout_seconds: float, sender: Connection
) -> None:
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    with open(Path(folder) / f"stack_{rank}", "w") as stack:
        faulthandler.dump_traceback_later(timeout_seconds, file=stack)
        try:
            torch.distributed.init_process_group(
                backend,
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=world_size,
                timeout=_COLLECTIVE_TIMEOUT,
            )
            function, args = pickle.loads(job)
            report = pickle.dumps((True, function(rank, world_size, *args)))
            succeeded = True
        except BaseException:
            report = pickle.dumps((False, traceback.format_exc()))
            succeeded = False
        # Sent before the group goes, so that the first report to arrive is the cause and not its echo.
        sender.send_bytes(report)
        sender.close()
        if succeeded:
            torch.distributed.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
