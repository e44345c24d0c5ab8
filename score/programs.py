"""Scores programs: the last block of Python in an answer is run with the problem's tests in a sandbox.

The verdict never comes from the process that runs the program. Assertions run in a second sandbox, which calls the
program's functions through a pipe, and printed output is compared here.

Without bubblewrap, nothing runs unless the user accepts the risk. As root, guests run as an unused user, because the
kernel does not limit the number of root's processes.
"""

import json
import logging
import math
import os
import platform
import pwd
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from base.ranges import PositiveFloat, PositiveInt
from data.problems import StdinTest
from score.sandbox import (
    PYTHON_NAME,
    GuestLimits,
    GuestProgram,
    Interpreter,
    Isolation,
    Sandbox,
    memory_file,
    open_pipe,
)
from score.score import (
    SKIPPED,
    Answer,
    Problem,
    RatingScorer,
    Score,
    ScorerConfig,
    ScoringError,
    failure,
    final_text,
    last_code,
    verdict,
)
from score.supervision import Finished, Guest, wait_for_guests

LONGEST_PROGRAM = 2**18
_LONGEST_VERDICT = 4096


IsolationChoice = Literal["bubblewrap", "accept_risk"]
"""bubblewrap: programs run in it or not at all. accept_risk: with limits alone if bubblewrap does not hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeConfig(ScorerConfig):
    """The configuration of the sandbox.

    Attributes:
        cpu_seconds: processor time of a program with its children for one test, or for all assertions together.
        wall_seconds: time after which a program without a verdict is stopped. If it slept, this is a timeout. If it
            waited for a processor, the machine was busy: it is run once more, and then the outcome is unknown.
        memory_mib: address space of each process.
        isolation: bubblewrap, or accept_risk, which takes limits alone if bubblewrap is missing or does not hold.
    """

    cpu_seconds: PositiveFloat
    wall_seconds: PositiveFloat
    memory_mib: PositiveInt
    num_sandboxes: PositiveInt
    isolation: IsolationChoice = "bubblewrap"

    def __post_init__(self) -> None:
        if self.wall_seconds < self.cpu_seconds:
            rule = f"of kind code must be at least cpu_seconds ({self.cpu_seconds:g})"
            raise ScoringError.broken("wall_seconds", rule, f"{self.wall_seconds:g}", f"{self.cpu_seconds:g}")


class CodeScorer(RatingScorer):
    """Runs programs with tests. A sandbox ends with its call."""

    def __init__(self, config: CodeConfig) -> None:
        """Finds the sandbox, or raises `ScoringError` if this machine has none that holds."""
        self._config = config
        self._sandbox = find_sandbox(config.isolation)
        # More programs than cores would only wait for each other, and reach the limit of wall time.
        self._places = threading.BoundedSemaphore(config.num_sandboxes)
        # `wait_for_guests` measures the limit. The kernel's own, a second later, holds if this process is too slow: it
        # counts ticks, which on a busy machine differ from the time that a process had by more than a tenth.
        seconds = math.ceil(config.cpu_seconds) + 1
        self._limits = GuestLimits(cpu_seconds=seconds, memory_bytes=config.memory_mib * 2**20)

    @property
    def isolation(self) -> Isolation:
        """The level of isolation in which programs run."""
        return self._sandbox.isolation

    def score(self, answer: Answer, problem: Problem) -> Score:
        """Returns 1 if the program passes every test; an answer without a program is missing."""
        if problem.tests is None:
            return SKIPPED
        program = last_code(final_text(answer.text))
        if program is None or not program.strip():
            return failure("missing", "no block of code after the thoughts")
        return self.score_program(program, problem.tests)

    def score_program(self, program: str, tests: str | tuple[StdinTest, ...]) -> Score:
        """Returns 1 if a program passes every test: assertions as Python source, or inputs with outputs."""
        if len(program) > LONGEST_PROGRAM:
            return verdict(is_correct=False, detail=f"the program has more than {LONGEST_PROGRAM} characters")
        score = self._run(program, tests)
        return self._run(program, tests) if score.outcome == "unknown" else score

    def _run(self, program: str, tests: str | tuple[StdinTest, ...]) -> Score:
        if isinstance(tests, str):
            with self._places:
                return self._run_assertions(program, tests)
        for number, test in enumerate(tests, 1):
            with self._places:
                score = self._run_script(program, test)
            if score.outcome != "correct":
                return failure(score.outcome, f"test {number} of {len(tests)}: {score.detail}")
        return verdict(is_correct=True, detail=f"{len(tests)} tests")

    def _run_script(self, program: str, test: StdinTest) -> Score:
        script = GuestProgram(name="script", limits=self._limits, files={"program.py": program}, stdin=test.stdin)
        finished = self._wait(script)
        (result,) = finished.guests
        if stopped := self._stopped(result, finished):
            return stopped
        if result.code != 0:
            return verdict(is_correct=False, detail=f"exit code {result.code}{_last_line(result.stderr)}")
        printed = result.stdout.decode("utf-8", "replace")
        is_equal = _lines(printed) == _lines(test.stdout)
        return verdict(is_correct=is_equal, detail="" if is_equal else f"printed {printed[:60]!r}")

    def _run_assertions(self, program: str, tests: str) -> Score:
        """Runs a program and its tests in two sandboxes, and in one if a failure may be due to that."""
        nonce = secrets.token_hex(16)
        with ExitStack() as opened:
            verdict_file = memory_file(opened, b"")
            finished = self._run_apart(program, tests, nonce, verdict_file)
            state = os.pread(verdict_file, _LONGEST_VERDICT, 0).decode("utf-8", "replace").strip()
        message = _read_verdict(state, nonce)
        score = self._score_apart(finished, state, message)
        doubt = message["doubt"] if message else state.partition(" ")[2]
        if not doubt or score.outcome in ("correct", "error"):
            return score
        return self._run_together(program, tests, doubt, score)

    def _run_apart(self, program: str, tests: str, nonce: str, verdict_file: int) -> Finished:
        with ExitStack() as opened:
            request_reader, request_writer = open_pipe(opened)
            reply_reader, reply_writer = open_pipe(opened)
            candidate = GuestProgram(
                name="candidate",
                limits=self._limits,
                arguments=(str(request_reader), str(reply_writer)),
                files={"program.py": program},
                inherited=(request_reader, reply_writer),
            )
            tester = GuestProgram(
                name="tests",
                limits=self._limits,
                arguments=(str(request_writer), str(reply_reader), str(verdict_file)),
                files={"tests.py": tests},
                stdin=nonce,
                inherited=(request_writer, reply_reader, verdict_file),
            )
            guests = self._sandbox.start_all((candidate, tester))
        # The guests see the end of a pipe only if this process does not hold it.
        return wait_for_guests(guests, [self._config.cpu_seconds] * 2, self._config.wall_seconds)

    def _score_apart(self, finished: Finished, state: str, message: dict[str, str]) -> Score:
        ran, tested = finished.guests
        if ran.is_flooded or ran.is_out_of_cpu:
            return self._stopped(ran, finished) or failure("unknown", "")
        if not ran.has_begun and message.get("outcome") != "error":
            return _not_begun(ran)
        if tested.is_out_of_cpu and (not state or state.startswith("started")):
            return failure("error", "the tests used too much processor time")
        if finished.is_late and finished.has_slept and not state.startswith("asking"):
            return failure("error", "the tests did not end")
        if stopped := self._stopped(tested, finished):
            return stopped
        match message.get("outcome"):
            case "correct" | "wrong" as outcome:
                return verdict(is_correct=outcome == "correct", detail=message["detail"])
            case "error":
                return failure("error", message["detail"])
        return failure("error", "the tests ended without a verdict")

    def _run_together(self, program: str, tests: str, doubt: str, apart: Score) -> Score:
        """Confirms a failure in one process with the tests. A program can pass by itself there: no verdict."""
        nonce = secrets.token_hex(16)
        with ExitStack() as opened:
            passed = memory_file(opened, b"")
            guest = GuestProgram(
                name="script",
                limits=self._limits,
                arguments=(str(passed),),
                files={"program.py": program, "tests.py": tests},
                stdin=nonce,
                inherited=(passed,),
            )
            finished = self._wait(guest)
            has_passed = os.pread(passed, len(nonce), 0) == nonce.encode()
        if has_passed:
            return failure("error", f"passes in one process with its tests only: {doubt}")
        return self._stopped(finished.guests[0], finished) or apart

    def _wait(self, program: GuestProgram) -> Finished:
        return wait_for_guests([self._sandbox.start(program)], [self._config.cpu_seconds], self._config.wall_seconds)

    def _stopped(self, result: Guest, finished: Finished) -> Score | None:
        """Returns the score of a program that was stopped or did not begin, or None if it ended by itself."""
        if result.is_out_of_cpu:
            return failure("timeout", f"more than {self._config.cpu_seconds:g} s of processor time")
        if result.is_flooded:
            return verdict(is_correct=False, detail="printed too much")
        if finished.is_late and finished.has_slept:
            return failure("timeout", f"slept until {self._config.wall_seconds:g} s were over")
        if finished.is_late:
            return failure("unknown", f"no verdict after {self._config.wall_seconds:g} s on a busy machine")
        return None if result.has_begun else _not_begun(result)


def _not_begun(guest: Guest) -> Score:
    return failure("unknown", f"the sandbox did not start{_last_line(guest.stderr)}")


def _read_verdict(state: str, nonce: str) -> dict[str, str]:
    """Returns what the tests' sandbox wrote after the last test, or nothing if it is not from there."""
    try:
        message: dict[str, str] = json.loads(state)
        return message if message["nonce"] == nonce else {}
    except (ValueError, KeyError, TypeError):
        return {}


def _lines(text: str) -> list[str]:
    """Returns a text's lines without white space at their ends and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _last_line(output: bytes) -> str:
    lines = output.decode("utf-8", "replace").strip().splitlines()
    return f": {lines[-1][:100]}" if lines else ""


LOGGER = logging.getLogger("infer")

_STAGED = "/mnt/python"
_FIRST_UID, _LAST_UID = 61184, 65519  # the range that systemd reserves for users without an account
_PROBE_SECONDS = 60.0
_NAMESPACE_ADVICE = (
    "allow user namespaces (in Docker: a seccomp profile that allows unshare; on Ubuntu: an AppArmor profile for bwrap)"
)


class _MissingError(Exception):
    """Something that the sandbox needs and this machine does not have."""


def find_sandbox(choice: IsolationChoice = "bubblewrap") -> Sandbox:
    """Finds a way to run guests, and checks that a guest cannot leave it; `ScoringError` says why not."""
    try:
        sandbox = _build_bubblewrap()
        _check(sandbox)
        return sandbox
    except _MissingError as error:
        if choice == "accept_risk" and sys.platform.startswith("linux"):
            LOGGER.warning("programs can read and change what their user can: %s", error)
            return _build_limits()
        raise ScoringError(
            f"isolation: kind code runs programs in a sandbox only: {error}; nearest valid: install bubblewrap "
            f"(apt-get install bubblewrap), or isolation=accept_risk: generated programs then have limits of time and "
            f"memory only, and can read, change and delete what this user can, and use the network"
        ) from error


def _build_bubblewrap() -> Sandbox:
    if not sys.platform.startswith("linux"):
        raise _MissingError("the sandbox needs Linux")
    if shutil.which("bwrap") is None:
        raise _MissingError("bubblewrap is not installed")
    interpreter = _this_interpreter()
    prefix = _with_equal_addresses()
    if os.geteuid() != 0:
        return Sandbox("bubblewrap", prefix, interpreter)
    prefix = [*_as_unused_user(), *prefix]
    if not _is_open_to_all(interpreter):
        # Root binds it to another place, in a mount namespace that only guests see.
        staged = Interpreter(program=f"{_STAGED}/{PYTHON_NAME}", library=f"{_STAGED}/lib")
        outer = ["bwrap", "--die-with-parent", *("--bind", "/", "/"), *("--tmpfs", "/mnt")]
        outer += ["--perms", "0755", "--dir", _STAGED]
        outer += ["--ro-bind", interpreter.program, staged.program, "--ro-bind", interpreter.library, staged.library]
        interpreter = staged
        prefix = [*outer, "--", *prefix]
    return Sandbox("bubblewrap", prefix, interpreter)


def _build_limits() -> Sandbox:
    """Returns a sandbox of limits alone. As root it runs as an unused user if that is possible."""
    interpreter = _this_interpreter()
    prefix = _with_equal_addresses()
    if shutil.which("setpriv") is not None:
        if os.geteuid() == 0 and _is_open_to_all(interpreter):
            prefix = [*_as_unused_user(), *prefix]
        prefix = [*prefix, "setpriv", "--no-new-privs", "--pdeathsig", "KILL"]
    return Sandbox("limits", prefix, interpreter)


def _this_interpreter() -> Interpreter:
    """Returns where this interpreter is: of a virtual environment, that from which it was made."""
    program = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    return Interpreter(program=program, library=os.path.realpath(Path(os.__file__).parents[1]))


def _with_equal_addresses() -> list[str]:
    """Returns a command that makes addresses, which order some sets, repeatable; empty if refused."""
    command = ["setarch", platform.machine(), "-R"]
    try:
        is_allowed = subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return []
    return command if is_allowed else []


def _as_unused_user() -> list[str]:
    """Returns the command with which root becomes an unused user."""
    if shutil.which("setpriv") is None:
        raise _MissingError("as root, setpriv (util-linux) is needed; install it, or run as another user")
    uid = str(_unused_uid())
    return ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "--inh-caps=-all", "--no-new-privs"]


def _check(sandbox: Sandbox) -> None:
    """Runs the probe in the sandbox. It must find neither this machine's files nor a network."""
    limits = GuestLimits(cpu_seconds=5, memory_bytes=2**29)
    with tempfile.NamedTemporaryFile(prefix="canary-") as canary:
        os.chmod(canary.name, 0o666)
        probe = GuestProgram(name="limits", limits=limits, arguments=(canary.name,), files={})
        result = wait_for_guests([sandbox.start(probe)], [limits.cpu_seconds], _PROBE_SECONDS)
    (guest,) = result.guests
    if result.is_late:
        raise _MissingError(f"the sandbox did not start within {_PROBE_SECONDS:g} s")
    try:
        leaks = json.loads(guest.stdout)
    except ValueError:
        reason = guest.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {guest.code}"]
        raise _MissingError(f"bubblewrap cannot start a sandbox: {reason[-1][:200]}; {_NAMESPACE_ADVICE}") from None
    if leaks:
        raise _MissingError(f"the sandbox does not hold: {', '.join(leaks)}")


def _unused_uid() -> int:
    used = set()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                used.add(entry.stat().st_uid)
            except OSError:
                continue
    for uid in range(_FIRST_UID, _LAST_UID + 1):
        if uid not in used:
            try:
                pwd.getpwuid(uid)
            except KeyError:
                return uid
    raise _MissingError(f"as root, an unused user id between {_FIRST_UID} and {_LAST_UID} is needed")


def _is_open_to_all(interpreter: Interpreter) -> bool:
    paths = [Path(interpreter.program), Path(interpreter.library)]
    folders = {folder for path in paths for folder in path.parents} | {paths[1]}
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in folders) and all(
        path.stat().st_mode & stat.S_IROTH for path in paths
    )
