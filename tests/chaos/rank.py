"""A rank that notes what it does and which samples it reads, and is hit at its moment."""

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

from tests.chaos.faults import DAMAGES, Kind
from train.checkpoint.locate import CHECKPOINTS_NAME, checkpoints_in
from train.checkpoint.verify import is_whole
from train.config import TrainConfig

FILLER_NAME = "filler"
PLAN_NAME, STRUCK_NAME, DAMAGED_NAME = "plan.json", "struck", "damaged"

_LONGEST_WAIT_SECONDS = 20.0


def notes_of(out_dir: Path) -> Path:
    """The folder beside a run's in which all is noted: the run's own may be on a full disk."""
    return out_dir.with_name(f"{out_dir.name}.notes")


def started_at(pid: int) -> str | None:
    """When a process was started, in ticks since the machine was; None where there is none any more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def rank_of_chaos(config: TrainConfig) -> int:
    """What each rank does: the whole run, until it is hit."""
    from train.run import main as run

    out_dir, rank = Path(config.out_dir), int(os.environ["RANK"])
    notes = notes_of(out_dir)
    life = len(list(notes.glob(f"pid-*-{rank}")))
    (notes / f"pid-{life}-{rank}").write_text(f"{os.getpid()} {started_at(os.getpid())}")
    _speak_into(notes / f"said-{life}-{rank}")
    plan = json.loads((notes / PLAN_NAME).read_text())
    moments: list[tuple[str, bool]] = []
    strike = _Strike(plan, out_dir, life) if plan is not None and plan["rank"] == rank else None
    counts: dict[str, int] = {}
    lock = threading.Lock()

    def come(name: str, label: Hashable | None) -> None:
        with lock:
            moments.append((name, threading.current_thread() is threading.main_thread()))
            counts[name] = counts.get(name, 0) + 1
            is_due = strike is not None and (name, counts[name]) == (plan["name"], plan["count"])
        if is_due and strike is not None:
            strike()

    _watch(come, notes / f"samples-{life}-{rank}")
    try:
        return run(config)
    finally:
        (notes / f"moments-{life}-{rank}").write_text(json.dumps(moments))


def _watch(come: Callable[[str, Hashable | None], None], samples: Path) -> None:
    from data.loader import Batch, Loader
    from tests.train.strikes import watch_drawing, watch_operations, watch_writing

    watch_operations(come)
    watch_drawing(come)
    watch_writing(come)
    plain, file = Loader.batch, samples.open("w", buffering=1)

    def batch(loader: Loader, step: int, first: int, count: int) -> Batch:
        read = plain(loader, step, first, count)
        for index, tokens in enumerate(read.tokens_BT):
            file.write(f"{step + 1} {first + index} {hashlib.sha256(tokens.numpy().tobytes()).hexdigest()}\n")
        return read

    Loader.batch = batch  # type: ignore[method-assign]


class _Strike:
    """The fault itself, once in a run."""

    def __init__(self, plan: dict[str, Any], out_dir: Path, life: int) -> None:
        self._life = life
        self._kind: Kind = plan["kind"]
        self._share: float = plan["share"]
        self._hits_command: bool = plan["hits_command"]
        self._out_dir = out_dir
        self._notes = notes_of(out_dir)

    def __call__(self) -> None:
        if (self._notes / STRUCK_NAME).exists():
            return
        if self._kind in DAMAGES:
            self._damage()
        (self._notes / STRUCK_NAME).write_text(str(self._life))
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
            time.sleep(_LONGEST_WAIT_SECONDS)  # this rank ends with its command, and should not be ahead of it

    def _damage(self) -> None:
        """To a file of the newest checkpoint."""
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
        """It is there, or about to be: another thread may be moving it into its place."""
        folder, until = self._out_dir / CHECKPOINTS_NAME, time.monotonic() + _LONGEST_WAIT_SECONDS
        while time.monotonic() < until:
            whole = [each for each in checkpoints_in(folder) if is_whole(each)]
            if whole:
                return whole[-1]
            time.sleep(0.05)
        raise AssertionError(f"{folder} holds no whole checkpoint to be damaged")

    def _fill(self) -> None:
        """The file system of the run's folder, but for the share of a checkpoint's size."""
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


def _speak_into(path: Path) -> None:
    """What this rank prints."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
