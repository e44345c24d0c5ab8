"""Calls the command or the URL of `track.on_end` when a run has ended. No torch here."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

from base.refusal import ConfigError
from train.files.run_files import LOG_FOLDER, ON_END_NAME, Status, read_status, redact, write_end

_MOST_SECONDS = 10.0
_URL = re.compile(r"https?://[^\s/]+\S*")
_UNSET = re.compile(r"\$(\w+|\{\w+\})")
_print = partial(print, file=sys.stderr, flush=True)


def is_last_attempt(environment: Mapping[str, str]) -> bool:
    """Returns whether torchrun starts no further attempt if this one fails."""
    counts = [int(environment.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS")]
    return counts[0] >= counts[1]


def words_of(target: str) -> list[str]:
    """Returns a command's words, or one URL, with environment variables replaced by their values.

    Raises:
        ConfigError: a quote is open, a variable has no value, or there is no such command.
    """
    try:
        words = [os.path.expandvars(word) for word in shlex.split(target)]
    except ValueError as error:
        raise ConfigError(f"track.on_end: must be a command or a URL, is {target!r}: {error}") from error
    if unset := next((word for word in words if _UNSET.search(word)), None):
        raise ConfigError(f"track.on_end: must name variables of the environment that have a value, has {unset!r}")
    is_url = len(words) == 1 and _URL.fullmatch(words[0])
    if not words or not (is_url or shutil.which(words[0])):
        rule = "must be a command on PATH, or an http or https URL"
        raise ConfigError(
            f"track.on_end: {rule}, is {target!r}; nearest valid: null, or the path of an executable file"
        )
    return words


def report_end(
    target: str | None, out_dir: Path, error: BaseException | None = None, say: Callable[[str], None] = _print
) -> None:
    """Calls `track.on_end` with the final status, once in an attempt of a run whichever rank calls first.

    A command gets the status as JSON on its standard input, and folder, state, exit code and reason as variables
    `RUN_*`. A URL gets the JSON as the body of a POST, with a sentence as `text`. A failure is one line.

    Args:
        error: what ends this process; it becomes the reason if the run has no other verdict.
    """
    status = read_status(out_dir)
    if error is not None and (status is None or status.exit_code is None):
        with suppress(OSError):
            write_end(out_dir, "stopped", 1, f"{type(error).__name__}: {error}")
        status = read_status(out_dir)
    if not target or status is None:
        return
    try:
        os.close(os.open(out_dir / LOG_FOLDER / ON_END_NAME, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        _call(words_of(target), out_dir, status)
    except FileExistsError:
        return
    except (OSError, ValueError, subprocess.SubprocessError) as problem:
        say(redact(f"track.on_end: {type(problem).__name__}: {problem}"))


def _call(words: list[str], out_dir: Path, status: Status) -> None:
    reason = f": {status.reason}" if status.reason else ""
    text = f"{out_dir}: {status.state} with exit code {status.exit_code} after step {status.step}{reason}"
    body = json.dumps({"text": text, "folder": str(out_dir), **asdict(status)}).encode()
    if _URL.fullmatch(words[0]):
        from urllib.request import Request, urlopen  # takes a hundredth of the start of a command

        request = Request(words[0], body, {"Content-Type": "application/json"}, method="POST")
        with urlopen(request, timeout=_MOST_SECONDS):
            return
    variables = {"FOLDER": str(out_dir), "STATE": status.state, "REASON": status.reason}
    variables["EXIT_CODE"] = str(status.exit_code)
    environment = {**os.environ, **{f"RUN_{name}": value for name, value in variables.items()}}
    subprocess.run(words, input=body, env=environment, timeout=_MOST_SECONDS, check=True, stdout=sys.stderr.fileno())
