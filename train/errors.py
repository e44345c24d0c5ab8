"""Defines the errors of a run: what ends it on all ranks, and why one rank failed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from base.files import replace_text
from comm.exits import EXIT_HANG, EXIT_LOST
from train.files.run_files import RankFiles, find_rank_files, redact

LOG_FOLDER = "log"
"""Folder of a run with the logs of ranks."""

VERDICT_CODES = (EXIT_HANG, EXIT_LOST)
"""Exit codes of ranks that have detected which rank is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRefusal:
    """The reason why the guard refuses a step, equal on all ranks.

    `ranks` are those with their own non-finite losses or gradients; if all are finite, the rank with the largest
    gradients; none if the reason is the same on all ranks.
    `last_good` is the number of updates after which the weights were still good; None: the batch is the reason.
    With `ends_run`, neither another batch nor other weights would help.
    """

    step: int
    reason: str
    values: Mapping[str, float] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()
    last_good: int | None = None
    ends_run: bool = False


class RefusedStepError(RuntimeError):
    """The guard refuses a step. Raised on every rank; nothing was updated."""

    def __init__(self, refusal: StepRefusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


class StoppedError(RuntimeError):
    """The guard ends the run. Raised on every rank."""


class UnscoredError(StoppedError):
    """The answers of a rollout cannot be scored. Raised on every rank."""


class UnsavedError(OSError):
    """The run's folder did not take a checkpoint. Raised on every rank at the same point."""


class RescuedError(RuntimeError):
    """The run ends because its folder takes no checkpoint. The text says where the state is."""


class CallbackError(RuntimeError):
    """A callback failed. Raised on every rank at the same point; the text says which and why."""


class DeadRankError(RuntimeError):
    """A rank of a command on this machine died."""


class PreemptedError(RuntimeError):
    """The run is preempted. Raised on every rank at the same point, where each can leave."""


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
