"""Joins a rank to its job: waits for all other ranks and starts the watchdog."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from torch.distributed.distributed_c10d import Store

from comm.groups import GROUP_TIMEOUT_MARGIN_SECONDS
from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.job_start import START, JobStart, Termination
from comm.watchdog.membership import Membership
from comm.watchdog.tree.address_exchange import AddressExchange
from comm.watchdog.verdict import Verdict
from comm.watchdog.watchdog import Watchdog
from comm.watchdog.watchdog_socket import WatchdogSocket

_LOOPBACK = "127.0.0.1"


class Job:
    """Job of a rank: the store for process groups, and the watchdog."""

    def __init__(self, store: Store, watchdog: Watchdog, restore: Callable[[], None]) -> None:
        """Stores the parts; `restore` reinstalls the earlier handler of SIGTERM."""
        self.store = store
        self.watchdog = watchdog
        self._restore = restore

    def close(self) -> None:
        """Leaves the job without an error."""
        self._restore()
        self.watchdog.close()


def join(
    member: Membership,
    log: CollectiveLog,
    deadline_seconds: float,
    crash_report: Callable[[Verdict], None],
    start_seconds: float | None = None,
    key_folder: Path | None = None,
) -> Job:
    """Waits for all other ranks and starts the watchdog. Every rank calls it on its main thread.

    After that, SIGTERM makes the watchdog check whether a rank was lost. If none was, the earlier handler of the
    process handles the signal. Without such a handler, the watchdog ends the process.

    Args:
        log: log of the rank's collectives.
        deadline_seconds: longest wait for other ranks.
        crash_report: see `Watchdog`.
        start_seconds: longest wait at the start; `deadline_seconds` by default.
        key_folder: folder in which rank 0 writes the file with the job's key, if it must.

    Raises:
        AbsentError: if not all ranks joined in time.
        JobKeyError: if the ranks have no common key.
    """
    watchdog_socket = WatchdogSocket(member.rank, _LOOPBACK if member.is_one_machine else member.host)
    termination = Termination()
    restore = termination.install(watchdog_socket.wakeup_file)
    start = JobStart(member, deadline_seconds if start_seconds is None else start_seconds, termination)
    with log.phase("world", range(member.world_size), START):
        store = start.open_store()
        AddressExchange(start, store, watchdog_socket, key_folder).run()
    store.set_timeout(timedelta(seconds=deadline_seconds + GROUP_TIMEOUT_MARGIN_SECONDS))
    watchdog = Watchdog(
        member.rank, watchdog_socket, log, deadline_seconds, crash_report, ends_by_signal=termination.is_only_handler
    )
    watchdog.start()
    return Job(store, watchdog, restore)
