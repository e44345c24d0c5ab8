"""Runs real gloo ranks with watchdogs, and opens sockets of watchdogs, for tests of how ranks end."""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from base.decode import encode
from comm.protocol import Label
from comm.watchdog.collective_log import CollectiveLog, group_name
from comm.watchdog.job_start import AbsentError
from comm.watchdog.membership import Membership
from comm.watchdog.messages import AddressBook, WatchdogSocket
from comm.watchdog.ranks import FANOUT, RankTree
from comm.watchdog.rendezvous import join
from comm.watchdog.verdict import Verdict
from comm.watchdog.wire import SocketAddress, decode_fields
from tests.ports import reserved_port

KEY = b"the key of a test's job".ljust(32)
DEADLINE_SECONDS = 2.0
MarkFailure = Callable[[], None]
Scenario = Callable[[int, CollectiveLog, MarkFailure], None]
_PRELOADED = ["torch", "torch.distributed", "numpy", "tests.comm.watched_ranks"]
_TIMEOUT_SECONDS = 60.0


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
                rank, world_size, "127.0.0.1", self.port, 0, is_one_machine=True, key=KEY, fanout=fanout
            )
            start_seconds = deadline_seconds if absent else 60.0
            arguments = (member, function, deadline_seconds, start_seconds, self._folder.name)
            self._processes[rank] = context.Process(target=_run_rank, args=arguments, daemon=True)
            self._processes[rank].start()

    @property
    def has_failed(self) -> bool:
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
                decode_fields(Verdict, json.loads(verdict.read_text()), 64) if verdict.exists() else None,
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
        (place / f"verdict_{member.rank}").write_text(json.dumps(encode(verdict)))

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


def reduce(log: CollectiveLog, ranks: Sequence[int], name: str = "exchange", label: Label | None = None) -> None:
    """Takes part in a collective of all ranks of the job."""
    import torch
    from torch import distributed

    with log.awaiting(log.start(group_name("world", ranks), ranks, name, label)):
        distributed.all_reduce(torch.ones(3))


def receive(log: CollectiveLog, ranks: tuple[int, int], source: int, name: str = "transfer") -> None:
    """Waits for a rank that never sends."""
    import torch
    from torch import distributed

    with log.awaiting(log.start(group_name("pair", ranks), ranks, name)):
        distributed.recv(torch.ones(1), src=source)


def compute_forever() -> None:
    """Never returns."""
    while True:
        time.sleep(0.01)


def signalled(
    world_size: int, victim: int, number: int, name: str, label: Label | None = None, compute_seconds: float = 0.0
) -> Scenario:
    """Returns a scenario in which a rank gets a signal after one collective; the others then start another one."""
    return partial(_signal_after_one, world_size, victim, number, name, label, compute_seconds)


def _signal_after_one(
    world_size: int,
    victim: int,
    number: int,
    name: str,
    label: Label | None,
    compute_seconds: float,
    rank: int,
    log: CollectiveLog,
    mark_failure: MarkFailure,
) -> None:
    reduce(log, range(world_size))
    if rank == victim:
        time.sleep(0.5)  # until the others have ended it
        mark_failure()
        os.kill(os.getpid(), number)
    time.sleep(compute_seconds)
    reduce(log, range(world_size), name, label)


def run_jobs(jobs: Mapping[str, WatchedRanks], stopped: Mapping[str, int]) -> dict[str, dict[int, Ended]]:
    """Returns the ends of jobs that run at once, as they mostly wait. A `stopped` rank does not end by itself."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        ends = pool.map(lambda name: jobs[name].ends((stopped[name],) if name in stopped else ()), jobs)
        return dict(zip(jobs, ends, strict=True))


def same_verdict(
    ends: dict[int, Ended], survivors: Sequence[int], code: int, culprits: tuple[int, ...] | None = None
) -> str:
    """Returns the text of the verdict, after checking that all survivors have it and ended in time."""
    texts = set()
    for rank in survivors:
        verdict = ends[rank].verdict
        assert verdict is not None, (rank, ends)
        assert (ends[rank].exit_code, verdict.code) == (code, code), ends
        assert ends[rank].seconds < DEADLINE_SECONDS + (5 if len(ends) <= 3 else 6), ends
        assert culprits is None or tuple(verdict.culprits) == culprits
        texts.add(verdict.text)
    assert len(texts) == 1, texts
    return texts.pop()


def full_book(addresses: Sequence[SocketAddress], tree: RankTree | None = None) -> AddressBook:
    """Returns the addresses of all ranks, in order."""
    book = AddressBook(tree or RankTree(len(addresses)))
    book.add(range(len(addresses)), addresses)
    return book


@contextmanager
def open_sockets(num_ranks: int, fanout: int = FANOUT, *, complete: bool = True) -> Iterator[list[WatchdogSocket]]:
    """Opens sockets of all ranks, with all addresses or only with those that ranks have after the start."""
    endpoints = [WatchdogSocket(rank, "127.0.0.1") for rank in range(num_ranks)]
    addresses = [(endpoint.host, endpoint.port) for endpoint in endpoints]
    tree = RankTree(num_ranks, fanout)
    for rank, endpoint in enumerate(endpoints):
        book = AddressBook(tree)
        levels = [tree.group(level, index) for level, index in enumerate(tree.path(rank), 1)]
        for ranks in [range(num_ranks)] if complete or rank == 0 else levels:
            book.add(ranks, [addresses[other] for other in ranks])
        endpoint.open(book, KEY)
    try:
        yield endpoints
    finally:
        for endpoint in endpoints:
            endpoint.close()


def wait_until(is_over: Callable[[], bool], seconds: float = 20.0) -> None:
    """Returns as soon as a condition holds, or after some seconds."""
    until = time.monotonic() + seconds
    while not is_over() and time.monotonic() < until:
        time.sleep(0.05)
