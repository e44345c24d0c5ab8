"""Searched schedules, kept on disk by everything that they depend on, the searching program included."""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from dualpipe.ir import Schedule, ScheduleError, from_json, to_json
from dualpipe.simulate.costs import CostModel
from dualpipe.validate import validate

Make = Callable[[int, int, CostModel, float | None], Schedule]


def schedules_folder(cache_dir: str) -> Path:
    """Returns where in a cache folder, `~` allowed, schedules are kept."""
    return Path(cache_dir).expanduser() / "schedules"


def load_or_make(
    make: Make,
    num_ranks: int,
    num_micro_batches: int,
    costs: CostModel,
    memory_cap: float | None,
    cache_dir: Path | None,
) -> Schedule:
    """Returns what `make` gives, from the cache where it is there. A folder that cannot be written only costs time.

    What is read is proven like what is made, so a file that was cut or changed is made anew.
    """
    if cache_dir is None:
        return make(num_ranks, num_micro_batches, costs, memory_cap)
    inputs = json.dumps([make.__name__, num_ranks, num_micro_batches, asdict(costs), memory_cap])
    digest = hashlib.sha256((_program_digest(make) + inputs).encode()).hexdigest()[:24]
    path = cache_dir / f"{make.__name__}-{num_ranks}-{num_micro_batches}-{digest}.json"
    kept = _read(path)
    if kept is not None and (kept.num_ranks, kept.num_micro_batches) == (num_ranks, num_micro_batches):
        return kept
    schedule = make(num_ranks, num_micro_batches, costs, memory_cap)
    _write(path, to_json(schedule))
    return schedule


def _program_digest(make: Make) -> str:
    """Returns a digest of every source file that has a part in the search, a plugin's included.

    Another program may find another schedule.
    """
    package = Path(__file__).parents[1]
    own = sys.modules[make.__module__].__file__
    files = {*package.rglob("*.py"), *([Path(own)] if own else [])}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> Schedule | None:
    try:
        schedule = from_json(path.read_text(encoding="utf-8"))
        validate(schedule)
    except (OSError, UnicodeDecodeError, ScheduleError):
        return None
    return schedule


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
