"""What the launcher prints about ranks that failed: the first cause, in one line."""

import signal
import sys
from pathlib import Path

from comm.exit_codes import EXIT_LOST
from comm.preemption import Preemption
from launch.command import EXIT_CONFIGURATION
from launch.ranks.interrupt import EXIT_INTERRUPTED
from train.errors import find_errors, find_verdict, read_error
from train.records.secrets import redact


def report_vanished(folder: Path, reason: str) -> tuple[int, str]:
    """Reports ranks that ended without a result: by the verdict of the others, if there is one."""
    if (verdict := find_verdict(folder)) is None:
        say(f"error: {reason}")
        return EXIT_LOST, reason
    say(f"error: {verdict[1].text}", f"what each rank did last is in {verdict[0].parent}")
    return verdict[1].code, verdict[1].text


def report_failure(folder: Path, rank: int, exit_code: int, request: Preemption) -> tuple[int, str]:
    """Prints once and shortly which rank failed first, and why. Returns the run's exit code and the reason.

    Args:
        folder: of the run.
        rank: that the launcher saw fail first.
        exit_code: of its process; -n if signal n ended it.
        request: whether the run was asked to end.
    """
    signalled = _signal_of(exit_code)
    if signalled is signal.SIGINT:
        return EXIT_INTERRUPTED, "ended by SIGINT"
    if signalled is not None and signalled.name == request.signal_name:
        return 128 + signalled, f"ended by {signalled.name}, which they did not heed yet"
    # A rank that fails takes others with it: the first to say so is the cause.
    words = [(path, read_error(path)) for path in find_errors(folder)]
    if (verdict := find_verdict(folder)) is not None:
        path, word = verdict
        ended = f" (rank {rank} was ended by {signalled.name})" if signalled else ""
        say(f"error: {word.text}{ended}", f"what each rank did last is in {path.parent}")
        return word.code, f"{word.text}{ended}"
    if signalled is not None:
        reason = f"rank {rank} is lost: it was ended by {signalled.name}"
        say(f"error: {reason}")
        return EXIT_LOST, reason
    if not words:
        reason = f"rank {rank} ended with exit code {exit_code}"
        say(f"error: {reason}")
        return exit_code, reason
    path, word = words[0]
    first = int(path.name.removeprefix("rank_").removesuffix(".error.log"))
    place = "" if word.code == EXIT_CONFIGURATION else f"rank {first}: "
    say(f"error: {place}{word.text}", f"the whole traceback is in {path}")
    return word.code, f"{place}{word.text}"


def say(*lines: str) -> None:
    for line in lines:
        print(redact(line), file=sys.stderr, flush=True)


def _signal_of(exit_code: int) -> signal.Signals | None:
    """The signal that ended a rank; one that heeds SIGTERM leaves by itself, as a shell would tell of it."""
    if exit_code == 128 + signal.SIGTERM:
        return signal.SIGTERM
    return signal.Signals(-exit_code) if exit_code < 0 else None
