"""Runs a rank that records its moments and samples, and injects the fault at its moment."""

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from bench.chaos.faults import DAMAGES, Kind
from train.checkpoint.locate import CHECKPOINTS_NAME, checkpoints_in, is_whole
from train.config import TrainConfig

FILLER_NAME = "filler"
PLAN_NAME, INJECTED_NAME, DAMAGED_NAME = "plan.json", "injected", "damaged"

_LONGEST_WAIT_SECONDS = 20.0


def notes_of(out_dir: Path) -> Path:
    """Returns the folder of records next to the run folder, which may be on a full disk."""
    return out_dir.with_name(f"{out_dir.name}.notes")


def started_at(pid: int) -> str | None:
    """Returns the start time of a process in ticks since boot, or None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def rank_of_chaos(config: TrainConfig) -> int:
    from train.run import main as run

    out_dir, rank = Path(config.out_dir), int(os.environ["RANK"])
    notes = notes_of(out_dir)
    attempt = len(list(notes.glob(f"pid-*-{rank}")))
    (notes / f"pid-{attempt}-{rank}").write_text(f"{os.getpid()} {started_at(os.getpid())}")
    _redirect_output(notes / f"output-{attempt}-{rank}")
    plan = json.loads((notes / PLAN_NAME).read_text())
    moments: list[tuple[str, bool]] = []
    inject = _FaultInjector(plan, out_dir, attempt) if plan is not None and plan["rank"] == rank else None
    counts: dict[str, int] = {}
    lock = threading.Lock()

    def on_moment(name: str, label: Hashable | None) -> None:
        with lock:
            moments.append((name, threading.current_thread() is threading.main_thread()))
            counts[name] = counts.get(name, 0) + 1
            is_due = inject is not None and (name, counts[name]) == (plan["name"], plan["count"])
        if is_due and inject is not None:
            inject()

    _watch(on_moment, notes / f"samples-{attempt}-{rank}")
    try:
        return run(config)
    finally:
        (notes / f"moments-{attempt}-{rank}").write_text(json.dumps(moments))


def _watch(on_moment: Callable[[str, Hashable | None], None], samples: Path) -> None:
    from data.loader import Batch, Loader
    from tests.train.operation_hooks import watch_drawing, watch_operations, watch_writing

    watch_operations(on_moment)
    watch_drawing(on_moment)
    watch_writing(on_moment)
    plain, file = Loader.batch, samples.open("w", buffering=1)

    def batch(loader: Loader, step: int, first: int, count: int) -> Batch:
        read = plain(loader, step, first, count)
        for index, tokens in enumerate(read.tokens_BT):
            file.write(f"{step + 1} {first + index} {hashlib.sha256(tokens.numpy().tobytes()).hexdigest()}\n")
        return read

    Loader.batch = batch  # type: ignore[assignment, method-assign]


class _FaultInjector:
    """Injector of the fault, once in a run."""

    def __init__(self, plan: dict[str, Any], out_dir: Path, attempt: int) -> None:
        self._attempt = attempt
        self._kind: Kind = plan["kind"]
        self._share: float = plan["share"]
        self._hits_command: bool = plan["hits_command"]
        self._out_dir = out_dir
        self._notes = notes_of(out_dir)

    def __call__(self) -> None:
        if (self._notes / INJECTED_NAME).exists():
            return
        if self._kind in DAMAGES:
            self._damage()
        (self._notes / INJECTED_NAME).write_text(str(self._attempt))
        if self._kind == "full disk":
            self._fill()
            return
        number = signal.SIGKILL if self._kind in DAMAGES else signal.Signals[self._kind]
        launcher = multiprocessing.parent_process()
        if not self._hits_command or launcher is None or launcher.pid is None:
            os.kill(os.getpid(), number)
            return
        os.kill(launcher.pid, number)
        if number == signal.SIGKILL:
            time.sleep(_LONGEST_WAIT_SECONDS)  # this rank must not end before its command

    def _damage(self) -> None:
        """Damages a file of the newest checkpoint."""
        newest = self._newest()
        files = sorted(path for path in newest.iterdir() if path.stat().st_size)
        path = files[int(self._share * 1e6) % len(files)]
        content = bytearray(path.read_bytes())
        place = int(self._share * len(content))
        if self._kind == "torn file":
            content = content[:place]
        else:
            content[place] ^= 1 << (place % 8)
        path.write_bytes(content)
        (self._notes / DAMAGED_NAME).write_text(f"{newest.name}/{path.name}")

    def _newest(self) -> Path:
        """Waits for the newest complete checkpoint, which another thread may be moving."""
        folder, until = self._out_dir / CHECKPOINTS_NAME, time.monotonic() + _LONGEST_WAIT_SECONDS
        while time.monotonic() < until:
            whole = [each for each in checkpoints_in(folder) if is_whole(each)]
            if whole:
                return whole[-1]
            time.sleep(0.05)
        raise AssertionError(f"{folder} has no complete checkpoint to damage")

    def _fill(self) -> None:
        """Fills the file system of the run folder, except a part of a checkpoint's size."""
        saved = checkpoints_in(self._out_dir / CHECKPOINTS_NAME)
        size_bytes = sum(path.stat().st_size for path in saved[-1].iterdir()) if saved else 1 << 20
        left = int(self._share * 1.2 * size_bytes)
        with (self._out_dir / FILLER_NAME).open("wb", buffering=0) as file:
            for chunk in (1 << 20, 1 << 12):
                try:
                    while True:
                        file.write(bytes(chunk))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
            file.truncate(max(file.tell() - left, 0))


def _redirect_output(path: Path) -> None:
    """Redirects this rank's output to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
