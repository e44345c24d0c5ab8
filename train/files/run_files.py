"""Writes files of a run's folder: ranks' files and errors, text without secrets, `status.json`.

No torch here. Secrets are found by their names and values.
"""

import json
import logging
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal, get_args

from base.files import replace_text
from comm.exits import EXIT_HANG, EXIT_LOST

STATUS_NAME = "status.json"
ON_END_NAME = "on_end"
"""Empty file in the folder of logs that says that `track.on_end` was called in this attempt."""
LOG_FOLDER = "log"
"""Folder of a run with the logs of ranks."""

VERDICT_CODES = (EXIT_HANG, EXIT_LOST)
"""Exit codes of ranks that have detected which rank is missing."""
_CHECKOUT = Path(__file__).resolve().parents[2]
_LARGEST_BYTES = 2**20
_RECENT_STEPS = 20
_FIGURES = ("loss", "validation_loss", "reward", "tokens_per_second")
"""Numbers of a step's record that the status has."""
LOGGER = logging.getLogger("train")
State = Literal["starting", "running", "done", "preempted", "stopped", "lost"]
HIDDEN = "***"
_WORDS = frozenset(
    [
        "key",
        "keys",
        "apikey",
        "token",
        "password",
        "passwd",
        "passphrase",
        "pwd",
        "secret",
        "secrets",
        "credential",
        "credentials",
        "auth",
        "bearer",
    ]
)
_FOLDERS = ("PWD", "OLDPWD")
"""Variables that look like passwords by their names, but in which a shell stores folders."""
# Shorter values of environment variables may be common words.
_SHORTEST_VALUE = 8
# A name, = or :, and a word in the syntax of a shell: quoted parts, and other parts up to a space or an operator.
_ASSIGNMENT = re.compile(
    r"""(?P<name>[A-Za-z_][\w.-]*)(?P<sign>\s*[=:]\s*)(?P<value>(?>"(?:[^"\\]|\\.)*"|'[^']*'|[^\s;&|])+)"""
)
_IN_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://[^\s/:@]*:)[^\s/@]+@")
MOST_FLAT_RANKS = 1024
"""Largest number of ranks whose files share a folder."""
_NODE_FOLDER = re.compile(r"node_[0-9]{6}")
# Held from reading a status to writing the next one, because the watchdog writes while the main thread may do so too.
_STATUS_LOCK = Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """The status of a run.

    `state` is `stopped` by the guard, an error or the user, and `lost` if a rank ended or did not respond.
    `checkpoint` is the newest one; `exit_code` is None while the run continues; `time` and `started` are in seconds
    since 1970. Losses, reward and speed are the last ones that were measured, in this attempt or an earlier one.
    `command` and `commit` are those of this attempt; `num_local_ranks` ranks may use the `num_cores` cores of `host`.
    """

    state: State
    step: int = 0
    checkpoint: str | None = None
    exit_code: int | None = None
    reason: str = ""
    time: float = 0.0
    num_steps: int | None = None
    num_ranks: int | None = None
    missing_ranks: tuple[int, ...] = ()
    loss: float | None = None
    validation_loss: float | None = None
    reward: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    host: str = ""
    started: float | None = None
    command: str = ""
    commit: str = ""
    num_cores: int | None = None
    num_local_ranks: int | None = None


def write_status(out_dir: Path, status: Status) -> None:
    """Writes the status with the present time: atomically, or in place on a full disk."""
    dated = replace(status, time=time.time(), reason=redact(status.reason))
    path = out_dir / STATUS_NAME
    text = json.dumps(asdict(dated), indent=2) + "\n"
    try:
        replace_text(path, text)
    except OSError:
        with path.open("r+", encoding="utf-8") as file:  # has its block of the disk already
            file.write(text)
            file.truncate()


def read_status(out_dir: Path) -> Status | None:
    """Reads the status; returns None if there is none, or the file is invalid."""
    path = out_dir / STATUS_NAME
    try:
        # The file may have been replaced by one that is too large for memory.
        if not path.is_file() or path.stat().st_size > _LARGEST_BYTES:
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        status = Status(**{**values, "missing_ranks": tuple(values.get("missing_ranks", ()))})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return status if _has_types(status) else None


def _has_types(status: Status) -> bool:
    is_code = status.exit_code is None or (type(status.exit_code) is int and 0 <= status.exit_code < 256)
    is_step = type(status.step) is int and 0 <= status.step < 2**53
    times = (status.time, 0.0 if status.started is None else status.started)
    is_dated = all(type(seconds) in (int, float) and 0 <= seconds < 2**33 for seconds in times)
    strings = (
        status.reason,
        status.host,
        status.command,
        status.commit,
        "" if status.checkpoint is None else status.checkpoint,
    )
    is_text = all(type(text) is str for text in strings)
    sizes = (status.num_steps, status.num_ranks, status.num_cores, status.num_local_ranks)
    counts = [count for count in (*sizes, *status.missing_ranks) if count is not None]
    is_counted = all(type(count) is int and 0 <= count < 2**53 for count in counts)
    measured = (getattr(status, name) for name in (*_FIGURES, "seconds_left"))
    is_measured = all(value is None or (type(value) in (int, float) and abs(value) < 1e300) for value in measured)
    is_named = is_text and status.state in get_args(State)
    return is_code and is_step and is_dated and is_counted and is_measured and is_named


def write_end(out_dir: Path, state: State, exit_code: int, reason: str, missing_ranks: Sequence[int] = ()) -> None:
    """Writes how a run ended, and keeps the step, checkpoint and figures of the present status."""
    with _STATUS_LOCK:
        status = read_status(out_dir) or Status(state=state)
        missing = tuple(missing_ranks) or status.missing_ranks
        ended = replace(status, state=state, exit_code=exit_code, reason=reason, seconds_left=None)
        write_status(out_dir, replace(ended, missing_ranks=missing))


class StatusFile:
    """The file `status.json` of a running job. Rank 0 writes it, but not over a verdict."""

    def __init__(
        self,
        out_dir: Path,
        *,
        is_writer: bool,
        every_seconds: float = 5.0,
        num_steps: int | None = None,
        num_ranks: int | None = None,
    ) -> None:
        """Opens nothing yet. New steps alone are written at most every `every_seconds`."""
        self._out_dir = out_dir
        self._is_writer = is_writer
        self._every_seconds = every_seconds
        self._written_at = 0.0
        self._status = Status(state="starting", num_steps=num_steps, num_ranks=num_ranks)
        self._times: deque[tuple[int, float]] = deque(maxlen=_RECENT_STEPS)
        self._has_failed = False

    @property
    def step(self) -> int:
        """The number of steps done at the last update."""
        return self._status.step

    def starting(self) -> None:
        """Writes that the run starts, and keeps step, checkpoint and figures of an earlier attempt."""
        if not self._is_writer:
            return
        with suppress(OSError):
            (self._out_dir / LOG_FOLDER / ON_END_NAME).unlink()
        before = read_status(self._out_dir) or self._status
        kept = {name: getattr(before, name) for name in ("step", "checkpoint", *_FIGURES)}
        here = replace(
            self._status,
            host=socket.gethostname(),
            started=time.time(),
            command=_command_line(),
            commit=_commit_of_checkout(),
            num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            num_local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        )
        self._write(replace(here, **kept), is_first=True)

    def measured(self, record: Mapping[str, Any]) -> None:
        """Keeps the figures of a step's record for the next write, and the time that the remaining steps take."""
        figures = {**record.get("rollouts", {}), **record}
        news = {name: figures[name] for name in _FIGURES if math.isfinite(figures.get(name, math.nan))}
        step = record["step"]
        if self._times and step <= self._times[-1][0]:  # the run has rolled back
            self._times.clear()
        self._times.append((step, time.monotonic()))
        first, began = self._times[0]
        pace = (self._times[-1][1] - began) / (step - first) if step > first else record["step_seconds"]
        num_steps = self._status.num_steps
        left = None if num_steps is None else pace * (num_steps - step)
        self._status = replace(self._status, seconds_left=left, **news)

    def running(self, step: int, checkpoint: str | None = None) -> None:
        """Writes the number of steps done, and a new checkpoint if there is one."""
        is_news = checkpoint is not None or self._status.state != "running"
        status = replace(self._status, state="running", step=step, checkpoint=checkpoint or self._status.checkpoint)
        self._status = status
        if is_news or time.monotonic() - self._written_at >= self._every_seconds:
            self._write(status)

    def ended(self, state: State, exit_code: int, reason: str = "") -> None:
        """Writes how the run ended."""
        self._write(replace(self._status, state=state, exit_code=exit_code, reason=reason, seconds_left=None))

    def _write(self, status: Status, *, is_first: bool = False) -> None:
        self._status = status
        self._written_at = time.monotonic()
        if not self._is_writer:
            return
        try:
            with _STATUS_LOCK:
                present = None if is_first else read_status(self._out_dir)
                if present is None or present.exit_code is None:
                    write_status(self._out_dir, status)
        except OSError as error:  # the folder was deleted or the disk is full, which must not end the run
            if not self._has_failed:
                LOGGER.warning("%s cannot be written: %s", STATUS_NAME, error)
            self._has_failed = True


def _command_line() -> str:
    """Returns the command of this process as it can be repeated from the checkout, without secrets."""
    script = Path(sys.argv[0])
    is_module = script.suffix == ".py" and script.is_relative_to(_CHECKOUT)
    words = ["-m", ".".join(script.relative_to(_CHECKOUT).with_suffix("").parts)] if is_module else [str(script)]
    return redact(shlex.join(["python", *words, *sys.argv[1:]]))


def _commit_of_checkout() -> str:
    """Returns the commit of this checkout, with `-dirty` after changes; empty without a checkout."""
    words = ["git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    if not (_CHECKOUT / ".git").exists():
        return ""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def is_secret_name(name: str) -> bool:
    """Returns whether a key or variable is named like a secret, such as `WANDB_API_KEY` or `hubToken`."""
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    return any(word in _WORDS for word in re.split(r"[^a-z0-9]+", spaced.lower()))


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Returns a text with `***` in place of secrets.

    It hides the value after a name that looks secret (`export HF_TOKEN=...`, `password: ...`), passwords in URLs, and
    every occurrence of the value of an environment variable whose name looks secret.
    """
    for value in _values(os.environ if environment is None else environment):
        text = text.replace(value, HIDDEN)
    text = _IN_URL.sub(rf"\g<scheme>{HIDDEN}@", text)
    return _ASSIGNMENT.sub(_hide, text)


def redact_values(values: Any, name: str = "") -> Any:
    """Returns nested plain values with `***` in place of secrets. Numbers and None are not secrets."""
    if isinstance(values, Mapping):
        return {key: redact_values(value, str(key)) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [redact_values(value, name) for value in values]
    if isinstance(values, str):
        return HIDDEN if values and is_secret_name(name) else redact(values)
    return values


def _hide(match: re.Match[str]) -> str:
    name = match["name"]
    sign = match["sign"]
    value = match["value"].rstrip(",)]}")
    tail = match["value"][len(value) :]
    if not is_secret_name(name):
        # The assigned value may itself contain an assignment.
        return f"{name}{sign}{_ASSIGNMENT.sub(_hide, value)}{tail}" if value[:1] not in "\"'" else _unquoted(match)
    is_plain = re.fullmatch(r"[\d.e+-]+|null|none|true|false|", value.lower()) is not None
    # After a colon, prose is more likely than a secret.
    is_prose = (
        ":" in sign and value[:1] not in "\"'" and not (len(value) >= _SHORTEST_VALUE and re.search(r"\d", value))
    )
    return match[0] if is_plain or is_prose else f"{name}{sign}{HIDDEN}{tail}"


def _unquoted(match: re.Match[str]) -> str:
    value = match["value"]
    return f"{match['name']}{match['sign']}{value[:1]}{_ASSIGNMENT.sub(_hide, value[1:])}"


def _values(environment: Mapping[str, str]) -> list[str]:
    """Returns the secret values of the environment, the longest first."""
    values = {
        value
        for name, value in environment.items()
        if is_secret_name(name) and name not in _FOLDERS and len(value) >= _SHORTEST_VALUE
    }
    return sorted(values, key=len, reverse=True)


@dataclass(frozen=True, slots=True)
class RankFiles:
    """Places and names of the files of one rank of a job; a node has `ranks_per_node` consecutive ranks."""

    rank: int
    num_ranks: int
    ranks_per_node: int

    @property
    def subfolder(self) -> str:
        """Subfolder of the rank's files, such as `node_000012`; empty if the job has no subfolders."""
        return f"node_{self.rank // self.ranks_per_node:06d}" if self.num_ranks > MOST_FLAT_RANKS else ""

    @property
    def stem(self) -> str:
        """First part of a file's name, such as `rank_00003`. Names of all ranks of a job sort by rank."""
        return f"rank_{self.rank:06d}" if self.subfolder else f"rank_{self.rank:05d}"

    def folder(self, parent: Path) -> Path:
        """Returns the folder of the rank's files in a folder of the run."""
        return parent / self.subfolder

    def make_folder(self, parent: Path) -> Path:
        """Creates the folder of the rank's files, but not the run's folder, which contains `parent`."""
        parent.mkdir(exist_ok=True)
        self.folder(parent).mkdir(exist_ok=True)
        return self.folder(parent)


def find_rank_files(parent: Path, pattern: str) -> list[Path]:
    """Returns the files of all ranks in a folder of a run that match a pattern, in any order."""
    return [*parent.glob(pattern), *parent.glob(f"node_*/{pattern}")]


def is_node_folder(name: str) -> bool:
    """Returns whether a name is that of a subfolder for the ranks of a node."""
    return _NODE_FOLDER.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class ExitReason:
    """The reason why a rank ended, in one line, and its exit code."""

    text: str
    code: int


def write_error(out_dir: Path, files: RankFiles, reason: ExitReason, details: str) -> None:
    """Writes why a rank failed to `rank_NNNNN.error.log`, if the run's folder exists."""
    path = files.make_folder(out_dir / LOG_FOLDER) / f"{files.stem}.error.log"
    replace_text(path, redact(f"{reason.text}\nexit code {reason.code}\n\n{details}"))


def read_error(path: Path) -> ExitReason:
    """Reads the reason and the exit code that `write_error` wrote."""
    text, code = path.read_text(encoding="utf-8").splitlines()[:2]
    return ExitReason(text, int(code.rpartition(" ")[2]))


def find_errors(out_dir: Path) -> list[Path]:
    """Returns the files of ranks that failed, in the order in which they were written."""
    return sorted(find_rank_files(out_dir / LOG_FOLDER, "rank_*.error.log"), key=lambda path: path.stat().st_mtime_ns)


def find_verdict(out_dir: Path) -> tuple[Path, ExitReason] | None:
    """Returns the first file that says which rank is missing, and its reason; None if there is none."""
    reasons = [(path, read_error(path)) for path in find_errors(out_dir)]
    return next(((path, reason) for path, reason in reasons if reason.code in VERDICT_CODES), None)
