"""Runs real gloo ranks with watchdogs, for tests of how they end."""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.job_start import AbsentError
from comm.watchdog.membership import Membership
from comm.watchdog.rendezvous import join
from comm.watchdog.tree.rank_tree import FANOUT
from comm.watchdog.verdict import Verdict
from tests.ports import reserved_port

_PRELOADED = ["torch", "torch.distributed", "numpy", "tests.comm.watched_ranks"]
_TIMEOUT_SECONDS = 60.0
_KEY = b"the key of a test's job".ljust(32)


@dataclass(frozen=True, slots=True)
class Ended:
    """End of a rank.

    `seconds` counts from the failure, or from the last rank that joined an incomplete start.

    `error` is the error that it raised itself.
    """

    exit_code: int | None
    verdict: Verdict | None
    seconds: float
    error: str


class WatchedRanks:
    """Ranks of one job that run `function(rank, log, mark_failure)` in a gloo world with watchdogs.

    A rank calls `mark_failure` at the moment of its failure, from which seconds are counted.
    """

    def __init__(
        self,
        world_size: int,
        function: Callable[..., None],
        deadline_seconds: float,
        absent: tuple[int, ...] = (),
        fanout: int = FANOUT,
    ) -> None:
        """Starts all ranks except the `absent` ones. The start has a deadline only if ranks are absent."""
        self._folder = tempfile.TemporaryDirectory(prefix="watched")
        self._begun = time.time()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._reservation = ExitStack()
        self.port = self._reservation.enter_context(reserved_port())
        self._processes: dict[int, ForkServerProcess] = {}
        for rank in set(range(world_size)) - set(absent):
            member = Membership(
                rank, world_size, "127.0.0.1", self.port, 0, is_one_machine=True, key=_KEY, fanout=fanout
            )
            start_seconds = deadline_seconds if absent else 60.0
            arguments = (member, function, deadline_seconds, start_seconds, self._folder.name)
            self._processes[rank] = context.Process(target=_run_rank, args=arguments, daemon=True)
            self._processes[rank].start()

    @property
    def has_failed(self) -> bool:
        """Whether a rank has failed yet."""
        return (Path(self._folder.name) / "failed").exists()

    def terminate(self) -> None:
        """Sends SIGTERM to all ranks after the first failure, as a launcher does."""
        while not (Path(self._folder.name) / "failed").exists():
            time.sleep(0.02)
        for process in self._processes.values():
            process.terminate()

    def ends(self, stopped: tuple[int, ...] = ()) -> dict[int, Ended]:
        """Waits for all ranks and returns their ends by rank. Kills `stopped` and hanging ranks."""
        folder, until = Path(self._folder.name), time.time() + _TIMEOUT_SECONDS
        ended_at: dict[int, float] = {}
        while not self._processes.keys() - set(stopped) <= ended_at.keys() and time.time() < until:
            for rank, process in self._processes.items():
                if rank not in ended_at and process.exitcode is not None:
                    ended_at[rank] = time.time()
            time.sleep(0.02)
        failed = folder / "failed"
        origin = failed.stat().st_mtime if failed.exists() else self._begun
        ends = {}
        for rank, process in self._processes.items():
            exit_code = process.exitcode
            process.kill()
            process.join()
            verdict, error = folder / f"verdict_{rank}", folder / f"error_{rank}"
            ends[rank] = Ended(
                exit_code,
                Verdict.from_json(json.loads(verdict.read_text()), 64) if verdict.exists() else None,
                ended_at.get(rank, time.time()) - origin,
                error.read_text() if error.exists() else "",
            )
        self._folder.cleanup()
        self._reservation.close()
        return ends


def _run_rank(
    member: Membership, function: Callable[..., None], deadline_seconds: float, start_seconds: float, folder: str
) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    place, log = Path(folder), CollectiveLog()
    if start_seconds == deadline_seconds:
        (place / "failed").touch()

    def crash_report(verdict: Verdict) -> None:
        (place / f"verdict_{member.rank}").write_text(json.dumps(verdict.as_json()))

    try:
        job = join(member, log, deadline_seconds, crash_report, start_seconds)
    except AbsentError as error:
        crash_report(error.verdict)
        os._exit(error.verdict.code)
    try:
        distributed.init_process_group(
            "gloo", store=job.store, rank=member.rank, world_size=member.world_size, timeout=timedelta(seconds=60)
        )
        function(member.rank, log, (place / "failed").touch)
    except Exception as error:
        job.watchdog.report_error(error)
        (place / f"error_{member.rank}").write_text(f"{type(error).__name__}: {error}")
        time.sleep(0.5)
        os._exit(3)
    job.close()
    distributed.destroy_process_group()
