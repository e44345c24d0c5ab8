"""Caches searched schedules on disk. The key covers all inputs and the source files of the search."""

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
    """Returns the folder of schedules in a cache folder; `~` is expanded."""
    return Path(cache_dir).expanduser() / "schedules"


def load_or_make(
    make: Make,
    num_ranks: int,
    num_micro_batches: int,
    costs: CostModel,
    memory_cap: float | None,
    cache_dir: Path | None,
) -> Schedule:
    """Returns the schedule of `make`, from the cache if possible; a cached schedule is validated."""
    if cache_dir is None:
        return make(num_ranks, num_micro_batches, costs, memory_cap)
    inputs = json.dumps([make.__name__, num_ranks, num_micro_batches, asdict(costs), memory_cap])
    digest = hashlib.sha256((_program_digest(make) + inputs).encode()).hexdigest()[:24]
    path = cache_dir / f"{make.__name__}-{num_ranks}-{num_micro_batches}-{digest}.json"
    cached = _read(path)
    if cached is not None and (cached.num_ranks, cached.num_micro_batches) == (num_ranks, num_micro_batches):
        return cached
    schedule = make(num_ranks, num_micro_batches, costs, memory_cap)
    write_if_possible(path, to_json(schedule))
    return schedule


def _program_digest(make: Make) -> str:
    """Returns a digest of every file of the search, its presets and a plugin's file included."""
    package = Path(__file__).parents[1]
    own = sys.modules[make.__module__].__file__
    files = {*package.rglob("*.py"), *package.rglob("*.json"), *([Path(own)] if own else [])}
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


def write_if_possible(path: Path, text: str) -> None:
    """Writes a file of a cache at once, or nothing if its folder cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
