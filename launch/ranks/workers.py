"""Runs a function on local ranks of one job, which import torch, and returns the result of rank 0."""

import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path
from typing import Any

from comm.config import ClusterConfig
from data.progress import escape_terminals
from kernels.registry import loaded_plugins
from launch.config.compose import load_plugin_files, user_errors
from launch.ranks.local import die_with_parent
from launch.ranks.machine import apply_rank_environment, local_rank_environment

Send = Callable[..., None]  # sends a message to the parent; on all ranks except rank 0 it does nothing
RankFunction = Callable[[Send], Any]  # what every rank runs. Its module is imported on the ranks; pickle sends it.


class RankError(RuntimeError):
    """Raised if a rank failed with an error that is not the user's, or died."""


def run_on_local_ranks(
    function: RankFunction,
    cluster: ClusterConfig,
    num_ranks: int,
    preloaded: Sequence[str],
    receive: Callable[..., None] = lambda *message: None,
) -> Any:
    """Starts ranks on this machine and returns the result of rank 0. No rank outlives the call."""
    apply_rank_environment(cluster)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", *preloaded])
    processes = []
    ends = dict[connection.Connection, int]()
    with tempfile.TemporaryDirectory(prefix="ranks") as scratch:
        try:
            for rank in range(num_ranks):
                ours, theirs = context.Pipe(duplex=False)
                place = (rank, num_ranks, str(Path(scratch) / "store"))
                process = context.Process(
                    target=_run_rank, args=(function, place, theirs, loaded_plugins()), daemon=True
                )
                process.start()
                theirs.close()
                processes.append(process)
                ends[ours] = rank
            return _await_results(ends, receive)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _await_results(ends: "dict[connection.Connection, int]", receive: Callable[..., None]) -> Any:
    """Waits for the results of all ranks and returns that of rank 0. Raises the first error."""
    result: Any = None
    while ends:
        for end in connection.wait(list(ends)):
            assert isinstance(end, connection.Connection)
            try:
                kind, found = end.recv()
            except (EOFError, ConnectionResetError) as error:
                raise RankError(f"rank {ends[end]} died before it returned") from error
            if kind == "message":
                receive(*found)
                continue
            rank = ends.pop(end)
            if isinstance(found, ValueError) and kind == "user error":
                raise found
            if kind == "error":
                raise RankError(f"rank {rank} failed\n{found}")
            result = found if rank == 0 else result
    return result


def _run_rank(
    function: RankFunction, place: tuple[int, int, str], end: "connection.Connection", plugins: Sequence[Path]
) -> None:
    rank, num_ranks, store_file = place
    escape_terminals()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the ranks
    threading.Thread(target=die_with_parent, daemon=True).start()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= local_rank_environment(Path(store_file))

    def send(*message: Any) -> None:
        if rank == 0:
            end.send(("message", message))

    try:
        load_plugin_files([str(path) for path in plugins])
        result = function(send)
        end.send(("result", result if rank == 0 else None))
    except Exception as error:
        is_users = isinstance(error, user_errors())
        found = ("user error", type(error)(str(error))) if is_users else ("error", traceback.format_exc())
        with suppress(OSError):
            end.send(found)
