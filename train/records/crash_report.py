"""Writes the crash report of a rank: the reason, its stacks, and its last collectives and transfers."""

import faulthandler
import json
import logging
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from comm.exit_codes import EXIT_OTHER
from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.ranks import RankSet
from comm.watchdog.verdict import Verdict
from data.progress import printable_on
from train.errors import LOG_FOLDER, ExitReason, write_error
from train.files.rank_files import RankFiles
from train.files.status import write_end

LOGGER = logging.getLogger("train")
_MAX_LISTED = 64


class CrashReporter:
    """The writer of a rank's crash report, which the watchdog calls once."""

    out_dir: Path | None

    def __init__(self, files: RankFiles, log: CollectiveLog, *, reports_on_stderr: bool) -> None:
        """Writes nothing yet. Without `reports_on_stderr`, the launcher prints the report."""
        self.out_dir = None
        self._files = files
        self._log = log
        self._reports_on_stderr = reports_on_stderr

    def write(self, verdict: Verdict) -> None:
        """Writes `log/rank_*.error.log` and `.operations.jsonl`, unless another rank's own error is the cause."""
        if self._reports_on_stderr:
            # One write, because all ranks may print at the same time and the launcher gave them one stderr.
            with suppress(OSError):
                line = f"error: rank {self._files.rank} ends: {verdict.text}\n"
                os.write(sys.stderr.fileno(), printable_on(sys.stderr, line).encode())
        LOGGER.info("ends with exit code %d: %s", verdict.code, verdict.text)
        if self.out_dir is None or verdict.code == EXIT_OTHER:
            return
        if self._files.rank in (0, verdict.judge):
            # If rank 0 is lost, the rank that detected it writes the status.
            with suppress(OSError):
                write_end(self.out_dir, "lost", verdict.code, verdict.text)
        # A deleted folder is not created again, and an error here must not keep the watchdog from ending the process.
        with suppress(OSError):
            self._write_files(self.out_dir, verdict)

    def _write_files(self, out_dir: Path, verdict: Verdict) -> None:
        waits = [f"awaited for {seconds:.1f} s: {operation}\n" for operation, seconds in self._log.awaited()]
        reason, details = ExitReason(verdict.text, verdict.code), f"{''.join(waits)}\n{_stacks()}"
        write_error(out_dir, self._files, reason, details)
        path = self._files.folder(out_dir / LOG_FOLDER) / f"{self._files.stem}.operations.jsonl"
        path.write_text(self._operations(), encoding="utf-8")

    def _operations(self) -> str:
        """Returns the last collectives and transfers, one JSON object per line, the oldest first."""
        awaited, progress = {operation for operation, _ in self._log.awaited()}, self._log.progress()
        lines = []
        for started, operation in self._log.recent():
            is_over = operation not in awaited and operation.number <= progress[operation.group].finished
            state = "awaited" if operation in awaited else "finished" if is_over else "started"
            line = {"time": started, "group": operation.group, "number": operation.number, "operation": operation.name}
            label = None if operation.label is None else str(operation.label)
            lines.append(json.dumps({**line, "of": label, "state": state, "ranks": _ranks(operation.ranks)}))
        return "".join(f"{line}\n" for line in lines)


def _ranks(ranks: RankSet) -> list[int] | str:
    """Returns the ranks of a group: as a list, or as progressions in one text if there are many."""
    return sorted(ranks) if len(ranks) <= _MAX_LISTED else str(ranks)


def _stacks() -> str:
    """Returns the Python stack of every thread."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read()
