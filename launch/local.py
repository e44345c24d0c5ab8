"""A job's ranks as processes of this machine, through torch's elastic launcher.

A fork server imports the heavy modules while the parent still prepares data, and every rank is a fork
of it: ranks start in tenths of a second instead of seconds.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver, process, resource_tracker
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from comm.config import ClusterConfig
from comm.exit_codes import EXIT_HANG, EXIT_LOST
from launch.environment import apply_rank_environment
from launch.folder import read_folder
from launch.report import EXIT_CONFIGURATION, EXIT_INTERRUPTED, user_errors
from train.config import TrainConfig
from train.errors import LastWord, error_path, find_errors, read_error, write_error

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

Entry = Callable[[TrainConfig], int]
"""What a rank does; gives its exit code. A function of a module, as ranks find it by its name."""

# Longer than the launcher's look at its ranks, so that a rank killed by a signal is seen before those that
# only lost their connection to it.
_NOTICE_SECONDS = 1.0
# After the first rank's last words, by which the others should know, or learn from the launcher. The elastic launcher
# would give each of them 30, and a stopped one takes all it is given.
_VERDICT_SECONDS = 1.2
_ERROR_SECONDS = 3.0
_VERDICTS = (EXIT_HANG, EXIT_LOST)
_CALM_LOGGERS = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.elastic.multiprocessing.api",
    "torch.multiprocessing.spawn",
)


def preload_modules(cluster: ClusterConfig) -> list[str]:
    """Modules that every rank needs and that are slow to import, in this order."""
    # Not launch.train itself: ranks run it again under another name, to find what they do.
    modules = ["torch", "train.run", "launch.compose", "launch.local"]
    # With CUDA, DeepSpeed is left to the ranks: what it touches at import must not happen before the fork.
    return [*modules, "deepspeed.runtime.zero.stage_1_and_2"] if cluster.device == "cpu" else modules


def start_fork_server(cluster: ClusterConfig, modules: Sequence[str]) -> None:
    """Starts the process that ranks are forked from; returns at once, it imports `modules` by itself.

    Call it before this process imports torch, so that both import at the same time.

    Args:
        cluster: for the environment that the modules are imported under.
        modules: to import; one that does not exist is passed over.
    """
    apply_rank_environment(cluster)
    multiprocessing.set_forkserver_preload(list(modules))
    # Ctrl-C reaches every process of the terminal: blocked here, it waits until a rank can die of it quietly.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def run_ranks(folder: Path, world_size: int, entry: Entry) -> int:
    """Runs a job's ranks to their end. None of them outlives this call, or this process.

    Args:
        folder: of the run: ranks read `config.yaml` there and leave `log/rank_*.error.log` when they fail.
        world_size: ranks to start.
        entry: what each rank does.

    Returns:
        The exit code: a rank's own, 78 when a rank was ended by a signal, 128 + n when this process was by signal n.
    """
    for stale in (folder / "log").glob("rank_*.error.log"):
        stale.unlink()
    try:
        with TemporaryDirectory(prefix="launch-") as scratch, _stragglers_killed(folder, Path(scratch)):
            return _run_elastic(folder, world_size, entry, scratch)
    finally:
        for child in multiprocessing.active_children():
            child.kill()


def _run_elastic(folder: Path, world_size: int, entry: Entry, scratch: str) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in _CALM_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=scratch),
    )
    try:
        codes = elastic_launch(launch, _rank)(entry, str(folder), scratch)
    except SignalException as ended:
        return 128 + int(ended.sigval)
    except ChildFailedError as failure:
        return _report_failure(folder, failure)
    return next((code for _, code in sorted(codes.items()) if code), 0)


def _report_failure(folder: Path, failed: "ChildFailedError") -> int:
    """Says once and shortly which rank failed first, and why. Gives the exit code."""
    rank, failure = failed.get_first_failure()
    signalled = _signal_of(failure.exitcode)
    if signalled is signal.SIGINT:
        return EXIT_INTERRUPTED
    # A rank that fails takes others with it: the first to say so is the cause.
    words = [(path, read_error(path)) for path in find_errors(folder)]
    verdict = next(((path, word) for path, word in words if word.code in _VERDICTS), None)
    if verdict is not None:
        path, word = verdict
        ended = f" (rank {rank} was ended by {signalled.name})" if signalled else ""
        print(f"error: {word.text}{ended}", file=sys.stderr, flush=True)
        print(f"what each rank did last is in {path.parent}", file=sys.stderr, flush=True)
        return word.code
    if signalled is not None:
        print(f"error: rank {rank} is lost: it was ended by {signalled.name}", file=sys.stderr, flush=True)
        return EXIT_LOST
    if not words:
        print(f"error: rank {rank} ended with exit code {failure.exitcode}", file=sys.stderr, flush=True)
        return int(failure.exitcode)
    path, word = words[0]
    first = int(path.name.removeprefix("rank_").removesuffix(".error.log"))
    place = "" if word.code == EXIT_CONFIGURATION else f"rank {first}: "
    print(f"error: {place}{word.text}", file=sys.stderr, flush=True)
    print(f"the whole traceback is in {path}", file=sys.stderr, flush=True)
    return word.code


def _signal_of(exit_code: int) -> signal.Signals | None:
    """The signal that ended a rank; one that heeds SIGTERM leaves by itself, as a shell would tell of it."""
    if exit_code == 128 + signal.SIGTERM:
        return signal.SIGTERM
    return signal.Signals(-exit_code) if exit_code < 0 else None


@contextmanager
def _stragglers_killed(folder: Path, scratch: Path) -> Iterator[None]:
    """Meanwhile, ranks that go on after one has left its last words are killed, stopped ones too."""
    if not hasattr(os, "pidfd_open"):
        yield
        return
    is_over = threading.Event()
    thread = threading.Thread(target=_kill_stragglers, args=(folder, scratch, is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _kill_stragglers(folder: Path, scratch: Path, is_over: threading.Event) -> None:
    ranks: dict[Path, int] = {}
    while not is_over.wait(0.25):
        for path in scratch.glob("pid_*"):
            if path not in ranks:
                # A number may be another process' by then; an open descriptor never is.
                with suppress(ProcessLookupError):
                    ranks[path] = os.pidfd_open(int(path.read_text()))
        paths = find_errors(folder)
        grace = _VERDICT_SECONDS if any(read_error(path).code in _VERDICTS for path in paths) else _ERROR_SECONDS
        if paths and time.time() - paths[0].stat().st_mtime > grace:
            for descriptor in ranks.values():
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    for descriptor in ranks.values():
        os.close(descriptor)


def _rank(entry: Entry, folder: str, scratch: str) -> int:
    """The life of one rank. Runs in a fork of the fork server."""
    partial = Path(scratch) / f"partial_{os.getpid()}"
    partial.write_text(str(os.getpid()))
    partial.rename(partial.with_name(f"pid_{os.getpid()}"))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # Ranks only talk among themselves, whatever this machine's name resolves to.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return entry(read_folder(Path(folder)))
    except Exception as error:
        code = EXIT_CONFIGURATION if isinstance(error, user_errors()) else 1
        text = str(error) if code == EXIT_CONFIGURATION else f"{type(error).__name__}: {error}"
        first_line = next(iter(text.splitlines()), type(error).__name__)
        path = error_path(Path(folder), int(os.environ["RANK"]))
        write_error(path, LastWord(first_line, code), "".join(traceback.format_exception(error)))
        time.sleep(_NOTICE_SECONDS)
        sys.exit(code)


def _die_with_parent() -> None:
    """Ends this rank when the launcher is gone, even one that was killed: the fork server would keep it alive."""
    parent = process.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)
