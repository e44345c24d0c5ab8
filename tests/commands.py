"""Runs this project's commands in forks of the server from which tests/ranks.py forks its ranks.

Importing torch and DeepSpeed takes a command and its ranks several seconds of CPU time. A fork has them imported.
Otherwise a fork is like a process that `python -m` starts: it has its own environment, folder, arguments and exit code,
and its ranks are forks of its own server. Tests of what a command imports must start it as a user does.
"""

import atexit
import gc
import io
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import resource_tracker, util
from pathlib import Path

from tests import ROOT
from tests.ranks import fork_context

Completed = subprocess.CompletedProcess[str]


def run_command(
    command: Sequence[str], *, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout: float = 240.0
) -> Completed:
    """Runs a command until it ends, like `subprocess.run` with `capture_output`.

    Args:
        command: `-m`, a module and its arguments, optionally after the path of Python or `python`.
        env: complete environment; by default that of this process.

    Returns:
        The exit code (negative for a signal) and the output.
    """
    started = StartedCommand(command, cwd=cwd, env=env)
    try:
        return started.wait(timeout)
    finally:
        started.kill()


def run_python(*arguments: str, cwd: Path = ROOT, changes: Mapping[str, str] | None = None) -> Completed:
    """Runs this Python in a new process, which imports what a user's does. `changes` are those of the environment."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(changes or {})}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


class StartedCommand:
    """A command that runs in a fork and writes its output into files."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        leads_session: bool = False,
    ) -> None:
        """Starts the command, whose arguments are those of `run_command`; with `leads_session`, in a new session."""
        self._command = list(command)
        self._folder = tempfile.TemporaryDirectory(prefix="command")
        self._outputs = [f"{self._folder.name}/stdout", f"{self._folder.name}/stderr"]
        _, module, *arguments = command[1:] if command[0] in (sys.executable, "python") else command
        environment = dict(os.environ if env is None else env)
        work = (module, arguments, str(cwd), environment, *self._outputs, leads_session)
        self._process = fork_context().Process(target=_run, args=work)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def wait(self, timeout: float) -> Completed:
        self._process.join(timeout)
        stdout, stderr = (Path(path).read_text() if Path(path).exists() else "" for path in self._outputs)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._command, timeout, stdout, stderr)
        return subprocess.CompletedProcess(self._command, self._process.exitcode, stdout, stderr)

    def kill(self) -> None:
        """Kills the command if it still runs, and removes its output."""
        self._process.kill()
        self._process.join()
        self._folder.cleanup()


def _run(
    module: str,
    arguments: Sequence[str],
    cwd: str,
    environment: Mapping[str, str],
    stdout: str,
    stderr: str,
    leads_session: bool,
) -> None:
    """Runs a command's process."""
    if leads_session:
        os.setsid()
    for descriptor, path in ((1, stdout), (2, stderr)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(
        os.fdopen(2, "wb", closefd=False), encoding="utf-8", errors="backslashreplace", line_buffering=True
    )
    os.environ.clear()
    os.environ.update(environment)
    gc.freeze()  # as ranks do
    os.chdir(cwd)
    sys.argv[:] = [module, *arguments]
    sys.path[0] = cwd
    signal.signal(signal.SIGINT, signal.default_int_handler)
    util.spawnv_passfds = _fork_server  # type: ignore[assignment]
    atexit._clear()  # those of the fork server
    code = _exit_code(module)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fork_server(path: str | bytes, arguments: Sequence[str | bytes], passed: Sequence[int]) -> int:
    """Forks the server of a command's ranks instead of starting it, because this process has imported its modules.

    Args:
        arguments: arguments of Python; the last one is the server's program.

    Returns:
        The server's process.
    """
    program = os.fsdecode(arguments[-1])
    assert program.startswith("from multiprocessing.forkserver import main"), program
    pid = os.fork()
    if pid:
        return pid
    try:
        kept = sorted({*passed, resource_tracker.getfd()})  # type: ignore[type-var]
        for below, above in zip([2, *kept], [*kept, os.sysconf("SC_OPEN_MAX")], strict=True):
            os.closerange(below + 1, above)  # type: ignore[arg-type, operator]
        exec(program, {})
    finally:
        os._exit(0)


def _exit_code(module: str) -> int:
    """Runs a module like `python -m`. Returns the exit code."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return (ended.code or 0) & 0xFF
        print(ended.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
