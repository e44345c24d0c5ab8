"""A rank joins its job: it meets all other ranks, and its watchdog runs from here on."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from torch.distributed.distributed_c10d import Store

from comm.groups import GROUP_TIMEOUT_MARGIN_SECONDS
from comm.watchdog.addresses import AddressExchange
from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.job_start import START, JobStart, Termination
from comm.watchdog.membership import Membership
from comm.watchdog.verdict import Verdict
from comm.watchdog.watchdog import Watchdog
from comm.watchdog.watchdog_socket import WatchdogSocket

_LOOPBACK = "127.0.0.1"


class Job:
    """A rank's job: the store through which process groups are made, and the watchdog."""

    def __init__(self, store: Store, watchdog: Watchdog, restore: Callable[[], None]) -> None:
        """Keeps the parts; `restore`: gives SIGTERM back to the handler that was there before."""
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
    """Meets all other ranks and starts the watchdog. Called by every rank, on its main thread.

    From here on SIGTERM makes the watchdog find out if a rank was lost. If none was, the handler that the process had
    before handles the signal; without such a handler, the watchdog ends the process.

    Args:
        member: this rank.
        log: of its collectives.
        deadline_seconds: for which it waits for others.
        crash_report: see `Watchdog`.
        start_seconds: for which it waits at the start, if not for as long.
        key_folder: in which rank 0 writes the file with the job's key, if it has to.

    Raises:
        AbsentError: not all ranks arrived.
        JobKeyError: the ranks have no common key.
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
