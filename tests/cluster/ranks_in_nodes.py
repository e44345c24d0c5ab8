"""Runs real ranks in the nodes of a cluster: processes inside namespaces with rate-limited links."""

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from base.workers import end_with_parent
from tests.cluster.namespaces import Cluster, enter
from tests.ranks import RanksFailedError

_PRELOADED = ("torch", "torch.distributed", "numpy", "bench.overlap", "tests.train.job")
_GRACE_SECONDS = 0.3
_START_DELAY_SECONDS = 0.02
_NICENESS = -20


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """End of a rank, `seconds` after the start, with a result or a failure.

    `exit_code` is None if it has not ended.
    """

    result: Any
    failure: str | None
    exit_code: int | None
    seconds: float


@dataclass(frozen=True, slots=True)
class _Job:
    """Arguments of a rank's process."""

    rank: int
    world_size: int
    namespace: str
    work: bytes
    folder: Path
    timeout_seconds: float
    collective_timeout_seconds: float


class RanksInNodes:
    """Running ranks, `ranks_per_node` consecutive ones in each node.

    The context manager kills the remaining ones.
    """

    def __init__(
        self,
        cluster: Cluster,
        ranks_per_node: int,
        function: Callable[..., Any],
        *args: Any,
        timeout_seconds: float = 120.0,
        collective_timeout_seconds: float = 60.0,
        preloaded: Sequence[str] = _PRELOADED,
    ) -> None:
        """Starts the ranks.

        Args:
            function: called as `function(rank, world_size, *args)` on one thread of torch, within a gloo process
                group that is initialized before and destroyed after it; importable by name.
            args: arguments of every rank, sent by pickle.
            timeout_seconds: time after which a rank that has not returned is killed.
            preloaded: modules that are imported once for all ranks; only the first call in a process has an effect.
        """
        self._timeout_seconds = timeout_seconds
        self._folder = tempfile.TemporaryDirectory(prefix="ranks")
        self._begun = time.monotonic()
        world_size = ranks_per_node * len(cluster.nodes)
        work = pickle.dumps((function, args))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preloaded))
        self._processes = []
        self._receivers: list[Connection] = []
        try:
            for rank in range(world_size):
                job = _Job(
                    rank=rank,
                    world_size=world_size,
                    namespace=cluster.nodes[rank // ranks_per_node].path,
                    work=work,
                    folder=Path(self._folder.name),
                    timeout_seconds=timeout_seconds,
                    collective_timeout_seconds=collective_timeout_seconds,
                )
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_run_rank, args=(job, sender), daemon=True)
                process.start()
                sender.close()
                self._processes.append(process)
                self._receivers.append(receiver)
        except BaseException:
            self.close()
            raise
        self.pids = [process.pid for process in self._processes]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for receiver in self._receivers:
            receiver.close()
        self._folder.cleanup()

    def outcomes(self, grace_seconds: float | None = None) -> list[Outcome]:
        """Waits until every rank has ended, the timeout, or `grace_seconds` after the first failure."""
        pending = {receiver: rank for rank, receiver in enumerate(self._receivers)}
        found: list[Outcome | None] = [None] * len(pending)
        # A rank that hangs first writes its stack, at the timeout.
        deadline = self._begun + self._timeout_seconds + 0.5
        while pending:
            ready = multiprocessing.connection.wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                found[rank] = outcome = self._receive(rank, connection)
                if outcome.failure is not None and grace_seconds is not None:
                    deadline = min(deadline, time.monotonic() + grace_seconds)
        return [outcome or self._hanging(rank) for rank, outcome in enumerate(found)]

    def _receive(self, rank: int, connection: Connection) -> Outcome:
        """Receives a rank's report, which may be missing, and its exit. A hang during the exit is a failure."""
        process = self._processes[rank]
        try:
            succeeded, value = pickle.loads(connection.recv_bytes())
        except EOFError:
            process.join()
            succeeded, value = False, f"died with exit code {process.exitcode}"
        seconds = time.monotonic() - self._begun
        process.join(max(0.0, self._begun + self._timeout_seconds - time.monotonic()))
        if succeeded and process.exitcode != 0:
            succeeded, value = False, f"returned, then left with {process.exitcode}"
        return Outcome(
            result=value if succeeded else None,
            failure=None if succeeded else value,
            exit_code=process.exitcode,
            seconds=seconds,
        )

    def _hanging(self, rank: int) -> Outcome:
        seconds = time.monotonic() - self._begun
        stack = _stack(Path(self._folder.name), rank)
        known = stack.read_text() if stack.exists() else "it never started"
        return Outcome(
            result=None, failure=f"no result after {seconds:.1f} s; {known}", exit_code=None, seconds=seconds
        )


def run_in_nodes(
    cluster: Cluster, ranks_per_node: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 120.0
) -> list[Any]:
    """Calls a function on ranks in all nodes and returns the results in rank order. See `RanksInNodes`."""
    with RanksInNodes(cluster, ranks_per_node, function, *args, timeout_seconds=timeout_seconds) as ranks:
        outcomes = ranks.outcomes(_GRACE_SECONDS)
    failed = [(rank, outcome) for rank, outcome in enumerate(outcomes) if outcome.failure is not None]
    # Ranks that had not ended when another failed waited for it; they are named only if no rank failed.
    causes = [(rank, outcome) for rank, outcome in failed if outcome.exit_code is not None] or failed
    if causes:
        raise RanksFailedError("\n".join(f"rank {rank} of {len(outcomes)}: {of.failure}" for rank, of in causes))
    return [outcome.result for outcome in outcomes]


def begin_together() -> float:
    """Waits for a common start time of all ranks and returns it (`time.monotonic`). All ranks call it."""
    import torch
    import torch.distributed

    # The ranks are on one machine and share its clock.
    start = torch.tensor([time.monotonic() + _START_DELAY_SECONDS], dtype=torch.float64)
    torch.distributed.broadcast(start, 0)
    time.sleep(max(0.0, start.item() - time.monotonic()))
    return start.item()


def _run_rank(job: _Job, sender: Connection) -> None:
    # Before any socket is made, and before any thread that could make one.
    enter(job.namespace)
    with suppress(PermissionError):
        # Real nodes have separate cores. Here, at least other processes of the machine should not slow ranks down.
        os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
    end_with_parent()
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    with open(_stack(job.folder, job.rank), "w") as stack:
        faulthandler.dump_traceback_later(job.timeout_seconds, file=stack)
        try:
            # A file store survives the end of any rank, and needs no host names.
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{job.folder}/rendezvous",
                rank=job.rank,
                world_size=job.world_size,
                timeout=timedelta(seconds=job.collective_timeout_seconds),
            )
            function, args = pickle.loads(job.work)
            report = pickle.dumps((True, function(job.rank, job.world_size, *args)))
            succeeded = True
        except BaseException:
            report = pickle.dumps((False, traceback.format_exc()))
            succeeded = False
        # Sent before the group is destroyed, so that the first report is the cause and not a consequence.
        sender.send_bytes(report)
        sender.close()
        if not succeeded:
            sys.exit(1)
        torch.distributed.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


def _stack(folder: Path, rank: int) -> Path:
    """Returns the file in which a hanging rank writes its stack."""
    return folder / f"stack_{rank}"
