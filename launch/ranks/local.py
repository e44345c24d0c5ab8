"""Built-in launcher: starts a job's ranks on this machine through torch's elastic launcher.

A fork server imports slow modules while the parent prepares data. Each rank is a fork of this server, so that ranks
start in tenths of a second instead of seconds. A supervisor next to torch's launcher forwards preemption requests to
the ranks, kills ranks that keep running after another one failed, and detects vanished ranks.
"""

import logging
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from multiprocessing import connection, forkserver, process, resource_tracker, util
from pathlib import Path
from tempfile import TemporaryDirectory

from base.files import replace_text
from base.refusal import ConfigError
from base.registry import loaded_plugins
from base.workers import end_with_parent
from comm.config import ClusterConfig
from comm.exits import EXIT_CONFIGURATION, EXIT_HANG, EXIT_LOST, EXIT_MEMORY, SIGNALS, Preemption, handled_signals
from comm.watchdog.membership import KEY_VARIABLE
from launch import EXIT_INTERRUPTED, signals_handled
from launch.config.compose import load_plugin_files, user_errors
from launch.config.folder import read_folder, write_run_folder
from launch.config.memory import is_out_of_memory, out_of_memory_line
from launch.config.rules import check_rules
from launch.ranks.machine import apply_rank_environment, local_rank_environment
from train.checkpoint.locate import AUTO
from train.config import TrainConfig
from train.files.json_lines import append_event
from train.files.run_files import (
    VERDICT_CODES,
    ExitReason,
    RankFiles,
    find_errors,
    find_verdict,
    read_error,
    read_status,
    redact,
    write_end,
    write_error,
)
from train.files.run_lock import LockedError, Owner, read_lock
from train.records.display import guard_terminal

Entry = Callable[[TrainConfig], int]
"""Main function of a rank; returns its exit code. A module-level function, because ranks import it by name."""

# Longer than the launcher's polling interval, so that the launcher sees a rank that was killed by a signal before it
# sees ranks that only lost their connection to that rank.
_NOTICE_SECONDS = 1.0
_WAITING = {signal.SIGINT, *SIGNALS}
# Signals on which the elastic launcher ends all ranks at once. Without pidfd, no supervisor can forward SIGTERM to the
# ranks, so it is one of them.
_ENDING = ("SIGINT", "SIGQUIT") if hasattr(os, "pidfd_open") else ("SIGINT", "SIGQUIT", "SIGTERM")
_SILENCED_LOGGERS = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.elastic.multiprocessing.api",
    "torch.multiprocessing.spawn",
)


def preload_modules(cluster: ClusterConfig) -> list[str]:
    """Returns the modules that every rank needs and that are slow to import, in import order."""
    # Without launch.train: ranks import it under another name to find their main function.
    modules = ["torch", "train.run", "launch.config.compose", "launch.ranks.local"]
    # With CUDA, the ranks import DeepSpeed themselves, because its import must not initialize CUDA before the fork.
    # DeepSpeed imports the last module in its first step. With 8 ranks on two cores, this took 7 s.
    deepspeed = ["deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.zero.muon.muon_optimizer"]
    return [*modules, *deepspeed] if cluster.device == "cpu" else modules


def start_fork_server(cluster: ClusterConfig, modules: Sequence[str]) -> None:
    """Starts the fork server, which imports `modules` in the background. Returns immediately.

    Call it before this process imports torch, so that both processes import at the same time.
    """
    apply_rank_environment(cluster)
    _own_socket_folder()
    multiprocessing.set_forkserver_preload(list(modules))
    # Ctrl-C reaches every process of the terminal, and a scheduler may send preemption signals to all processes of a
    # job. A blocked signal stays pending until a rank can handle it.
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAITING)
    try:
        resource_tracker.ensure_running()  # unblocks SIGINT and SIGTERM, which are blocked again below
        signal.pthread_sigmask(signal.SIG_BLOCK, _WAITING)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAITING)


def stop_fork_server() -> None:
    """Kills the fork server, even during its imports. Its ranks must have ended."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _has_lost_fork_server() -> bool:
    """Returns whether the fork server has ended. It stays unreaped, so that a new one is started."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return pid is not None and hasattr(os, "waitid") and os.waitid(os.P_PID, pid, flags) is not None


def run_ranks(folder: Path, world_size: int, entry: Entry) -> int:
    """Runs a job's ranks until they end. No rank outlives this call or this process.

    SIGTERM, SIGUSR1 and SIGHUP request preemption; the ranks have `cluster.grace_seconds` to save and end. If a rank is
    lost or does not respond, all ranks restart from the newest complete checkpoint, up to `cluster.max_restarts` times.

    Returns a rank's own exit code, 78 if a signal ended a rank, or 128 + n if signal n ended this process or requested
    preemption and the ranks did not end in time.
    """
    config = read_folder(folder)
    request = Preemption()
    with signals_handled(dict.fromkeys(handled_signals(), request)):
        for restart in range(config.cluster.max_restarts + 1):
            code, reason = _run_once(folder, world_size, entry, config.cluster, request)
            if code not in VERDICT_CODES or request.is_requested or restart == config.cluster.max_restarts:
                break
            try:
                _start_again(folder, config, restart + 1, code, reason)
            except (OSError, ConfigError) as error:
                print_redacted(f"error: ranks cannot restart: {error}")
                break
    _write_status(folder, code, reason)
    if code in (1, EXIT_MEMORY, *VERDICT_CODES) and folder.is_dir():
        from train.report.page import Report

        Report(config).try_to_write()  # it says at its top that the run has failed
    return code


def _start_again(folder: Path, config: TrainConfig, restart: int, code: int, reason: str) -> None:
    status = read_status(folder)
    append_event(folder, "restarted", 0 if status is None else status.step, reason, restart=restart, exit_code=code)
    print_redacted(f"all ranks restart ({restart} of {config.cluster.max_restarts}) from the newest checkpoint")
    write_run_folder(replace(config, resume=AUTO), datetime.now())
    start_fork_server(config.cluster, getattr(forkserver._forkserver, "_preload_modules", ()))  # if it was lost


def _run_once(
    folder: Path, world_size: int, entry: Entry, cluster: ClusterConfig, request: Preemption
) -> tuple[int, str]:
    """Runs one attempt; returns the exit code, and the reason for a failure that no rank reported."""
    for stale in find_errors(folder):
        stale.unlink()
    try:
        with scratch_folder() as scratch:
            supervisor = RankSupervisor(folder, scratch, request, cluster.grace_seconds)
            with supervisor.running():
                code, reason = _run_elastic(folder, world_size, entry, supervisor, request)
    finally:
        for child in multiprocessing.active_children():
            child.kill()
    if supervisor.has_grace_expired:
        reason = f"{request.signal_name} was received, and ranks did not end within {cluster.grace_seconds:g} s"
        return 128 + signal.Signals[request.signal_name], reason
    return code, reason


def _write_status(folder: Path, code: int, reason: str) -> None:
    """Writes the run's status if the ranks did not write it, for example because a rank was killed."""
    status = read_status(folder)
    if code and (status is None or status.exit_code != code):
        # On a full disk, the exit code is the only report.
        with suppress(OSError):
            write_end(folder, "lost" if code in VERDICT_CODES else "stopped", code, reason)


def _run_elastic(
    folder: Path, world_size: int, entry: Entry, supervisor: "RankSupervisor", request: Preemption
) -> tuple[int, str]:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from comm.groups import PRIVATE_RENDEZVOUS, register_private_rendezvous

    register_private_rendezvous()
    for name in _SILENCED_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend=PRIVATE_RENDEZVOUS,
        rdzv_configs={"check_ranks": RankCheck(world_size, supervisor)},
        local_addr="localhost",
        max_restarts=0,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(supervisor.scratch)),
        signals_to_handle=",".join(_ENDING),
    )
    # The ranks get their arguments through the fork server's pipe, so that no other process can read the key. They load
    # the plugin files that this process has loaded, not those that a file in the run's folder names.
    key = secrets.token_hex(32)
    try:
        codes = elastic_launch(launch, _rank)(entry, str(folder), str(supervisor.scratch), key, loaded_plugins())
    except SignalException as ended:
        return 128 + int(ended.sigval), f"ended by {ended.sigval.name}"
    except (VanishedError, ChildFailedError, EOFError, ConnectionError) as failed:
        if _has_lost_fork_server():
            supervisor.kill_ranks()  # multiprocessing takes them for ended, but they run
            return report_lost(folder, EXIT_LOST, "the fork server of the ranks is lost: its process has ended")
        if isinstance(failed, VanishedError):
            return report_lost(folder, EXIT_LOST, str(failed))
        if not isinstance(failed, ChildFailedError):
            raise
        rank, failure = failed.get_first_failure()
        return report_failure(folder, rank, int(failure.exitcode), request)
    return next((code for _, code in sorted(codes.items()) if code), 0), ""


def _rank(entry: Entry, folder: str, scratch: str, key: str, plugins: Sequence[Path]) -> int:
    """Runs one rank, from fork to exit. Called in a fork of the fork server."""
    guard_terminal()
    write_pid_file(Path(scratch), os.getpid(), int(os.environ["RANK"]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    Preemption.of_process()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAITING)
    end_with_parent()
    # The key leaves the environment before the run begins.
    os.environ |= {KEY_VARIABLE: key, **local_rank_environment(Path(scratch) / "store")}
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        load_plugin_files([str(path) for path in plugins])
        return entry(read_folder(Path(folder)))
    except Exception as error:
        code = EXIT_CONFIGURATION if isinstance(error, user_errors()) else EXIT_MEMORY if is_out_of_memory(error) else 1
        text = str(error) if code == EXIT_CONFIGURATION else f"{type(error).__name__}: {error}"
        first_line = next(iter(text.splitlines()), type(error).__name__)
        rank = int(os.environ["RANK"])
        details = "".join(traceback.format_exception(error))
        files = RankFiles(rank, int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"]))
        try:
            write_error(Path(folder), files, ExitReason(first_line, code), details)
        except OSError as unwritten:  # for example a full disk, which may also be the original error
            print_redacted(f"rank {rank}: {first_line}", f"{details}This report cannot be written: {unwritten}")
        time.sleep(_NOTICE_SECONDS)
        sys.exit(code)


PID_PREFIX = "pid_"
_SCRATCH_PREFIX = "launch-"
_SOCKET_PREFIX = "pymp-"  # of multiprocessing
_OWNER_NAME = "owner.json"
_LOOK_SECONDS = 0.25
# Time after the first error report until the other ranks are killed; by then they should know the verdict. The elastic
# launcher would wait 30 s for each rank, and a stopped rank uses all of it.
_VERDICT_SECONDS = 1.2
_ERROR_SECONDS = 3.0
# Time after a rank has vanished until the others are killed; by then they should have a verdict.
_VANISHED_SECONDS = 4.0


class RankSupervisor:
    """Thread that supervises ranks next to the launcher. Each rank writes a file `pid_*` into `scratch`."""

    def __init__(self, folder: Path, scratch: Path, request: Preemption, grace_seconds: float) -> None:
        self._folder = folder
        self.scratch = scratch
        self._request = request
        self._grace_seconds = grace_seconds
        self._ranks: dict[Path, int] = {}
        self._signalled: set[Path] = set()
        self._requested_at: float | None = None
        self.vanished_at: float | None = None
        self._is_over = threading.Event()
        self.has_grace_expired = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Runs the supervisor while the context is active, if the system has pidfd (safe against pid reuse)."""
        if not hasattr(os, "pidfd_open"):
            yield
            return
        thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            thread.join()
            for descriptor in self._ranks.values():
                os.close(descriptor)

    def kill_ranks(self) -> None:
        """Kills all ranks, and waits for their end at most a few seconds each."""
        for descriptor in list(self._ranks.values()):
            _send(descriptor, signal.SIGKILL)
            connection.wait([descriptor], _VANISHED_SECONDS)

    def _supervise(self) -> None:
        while not self._is_over.wait(_LOOK_SECONDS):
            for path in self.scratch.glob(f"{PID_PREFIX}*"):
                if path not in self._ranks:
                    # The kernel may reuse a pid for another process, but never an open pidfd.
                    with suppress(ProcessLookupError):
                        self._ranks[path] = os.pidfd_open(pid_of(path))
            if self._request.is_requested:
                self._forward_request()
            if self._is_time_up():
                for descriptor in self._ranks.values():
                    _send(descriptor, signal.SIGKILL)

    def _forward_request(self) -> None:
        if self._requested_at is None:
            self._requested_at = time.monotonic()
        for path in self._ranks.keys() - self._signalled:
            self._signalled.add(path)
            _send(self._ranks[path], signal.Signals[self._request.signal_name])

    def _is_time_up(self) -> bool:
        """Returns whether ranks run too long after another rank's error or after a preemption request."""
        if self._requested_at is not None and time.monotonic() - self._requested_at > self._grace_seconds:
            self.has_grace_expired = True
            return True
        if self.vanished_at is not None and time.monotonic() - self.vanished_at > _VANISHED_SECONDS:
            return True
        try:
            paths = find_errors(self._folder)
            is_known = any(read_error(path).code in (EXIT_HANG, EXIT_LOST) for path in paths)
            grace = _VERDICT_SECONDS if is_known else _ERROR_SECONDS
            return bool(paths) and time.time() - paths[0].stat().st_mtime > grace
        except FileNotFoundError:  # the run's folder was deleted in the meantime
            return False


def _send(descriptor: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(descriptor, number)


class VanishedError(RuntimeError):
    """Ranks ended with exit code 0 without returning a result."""


@dataclass(slots=True)
class RankCheck:
    """Detects ranks that ended with exit code 0 but without a result, which torch's launcher ignores.

    Call it after each poll of the launcher. Between two calls, the launcher finds every rank that ended with another
    exit code, and a rank with a result waits for all others. So a rank that is missing in two calls has vanished.
    """

    world_size: int
    supervisor: RankSupervisor
    num_missing: int = 0

    def __call__(self) -> None:
        """Checks the ranks once."""
        alive = {child.pid for child in multiprocessing.active_children()}
        num_missing = self.world_size - len(alive)
        if num_missing > 0 and self.num_missing > 0:
            self.supervisor.vanished_at = time.monotonic()  # ends the others after a few seconds
            from comm.watchdog.ranks import name_ranks

            files = self.supervisor.scratch.glob(f"{PID_PREFIX}*")
            ranks = name_ranks(sorted(int(path.read_text()) for path in files if pid_of(path) not in alive))
            raise VanishedError(f"{ranks} ended with exit code 0 before the run was done")
        self.num_missing = num_missing


def write_pid_file(scratch: Path, pid: int, rank: int) -> None:
    """Writes the file that registers a rank's process, atomically."""
    replace_text(scratch / f"{PID_PREFIX}{pid}", str(rank))


def pid_of(path: Path) -> int:
    """Returns the process id in the name of a file that `write_pid_file` wrote."""
    return int(path.name.removeprefix(PID_PREFIX))


def report_lost(folder: Path, code: int, reason: str, effect: str = "") -> tuple[int, str]:
    """Prints and returns the verdict of the other ranks with its effect, or code and reason without one."""
    if (verdict := find_verdict(folder)) is None:
        print_redacted(f"error: {reason}")
        return code, reason
    path, report = verdict
    print_redacted(f"error: {report.text}{effect}", f"the log of each rank is in {path.parent}")
    return report.code, f"{report.text}{effect}"


def report_failure(folder: Path, rank: int, exit_code: int, request: Preemption) -> tuple[int, str]:
    """Prints one short report of why a rank failed first; exit code -n says that signal n ended it."""
    signalled = _signal_of(exit_code)
    if signalled is signal.SIGINT:
        return EXIT_INTERRUPTED, "ended by SIGINT"
    if signalled is not None and signalled.name == request.signal_name:
        return 128 + signalled, f"ended by {signalled.name} before the ranks could handle it"
    # A failed rank causes failures of other ranks, so the first report names the cause.
    reports = [(path, read_error(path)) for path in find_errors(folder)]
    if signalled is not None:
        ended = f"ended by {signalled.name}"
        reason = f"rank {rank} is lost: it was {ended}"
        return report_lost(folder, EXIT_LOST, reason, f" (rank {rank} was {ended})")
    if not reports or find_verdict(folder) is not None:
        return report_lost(folder, exit_code, f"rank {rank} ended with exit code {exit_code}")
    path, report = reports[0]
    first = int(path.name.removeprefix("rank_").removesuffix(".error.log"))
    text = report.text if report.code == EXIT_CONFIGURATION else f"rank {first}: {report.text}"
    if report.code == EXIT_MEMORY:
        text = out_of_memory_line(read_folder(folder), check_rules, first, report.text)
    print_redacted(f"error: {text}", f"the full traceback is in {path}")
    return report.code, text


def print_redacted(*lines: str) -> None:
    """Prints lines to stderr with secrets removed."""
    for line in lines:
        print(redact(line), file=sys.stderr, flush=True)


def _signal_of(exit_code: int) -> signal.Signals | None:
    """Returns the signal that ended a rank, or None. A rank that handles SIGTERM exits with 128 + SIGTERM."""
    if exit_code == 128 + signal.SIGTERM:
        return signal.SIGTERM
    return signal.Signals(-exit_code) if exit_code < 0 else None


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Creates a temporary folder that is removed on exit, and removes leftover ones of ended commands."""
    remove_leftovers(Path(tempfile.gettempdir()))
    _own_socket_folder()
    with TemporaryDirectory(prefix=_SCRATCH_PREFIX, ignore_cleanup_errors=True) as name:
        (Path(name) / _OWNER_NAME).write_text(Owner.of_this_process().to_text(), encoding="utf-8")
        yield Path(name)


def _own_socket_folder() -> None:
    """Writes the owner of the folder of multiprocessing's sockets. A child uses that of its parent."""
    path = Path(util.get_temp_dir()) / _OWNER_NAME
    if process.parent_process() is None and not path.exists():
        path.write_text(Owner.of_this_process().to_text(), encoding="utf-8")


def remove_leftovers(place: Path) -> None:
    """Removes leftover folders of this user if their owner on this machine has ended. Follows no links."""
    with suppress(OSError):
        for entry in list(os.scandir(place)):
            with suppress(OSError, LockedError):
                if entry.name.startswith((_SCRATCH_PREFIX, _SOCKET_PREFIX)) and _is_left_over(entry):
                    shutil.rmtree(entry.path, ignore_errors=True)


def _is_left_over(entry: "os.DirEntry[str]") -> bool:
    if not entry.is_dir(follow_symlinks=False) or entry.stat(follow_symlinks=False).st_uid != os.geteuid():
        return False
    owner = read_lock(Path(entry.path) / _OWNER_NAME)
    return owner is not None and owner.owner is not None and owner.owner.is_gone
