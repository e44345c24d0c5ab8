"""Finds ranks that torch's elastic launcher would wait for forever."""

import multiprocessing
from pathlib import Path

from launch.ranks.supervisor import Keeper

PID_PREFIX = "pid_"


class VanishedError(RuntimeError):
    """Ranks have ended with exit code 0 and left no result."""


class RankCheck:
    """Finds ranks that ended with exit code 0 and left no result: torch's launcher takes them for well.

    To be called after each look that the launcher takes at its ranks. Between two calls it finds every rank that ended
    with another code, and a rank that left its result stays until all have. So a rank that is missing twice has
    vanished.
    """

    def __init__(self, world_size: int, keeper: Keeper) -> None:
        """Expects `world_size` ranks, each with a file `pid_*` that holds its rank in the keeper's folder."""
        self._world_size = world_size
        self._keeper = keeper
        self._num_missing = 0

    def __call__(self) -> None:
        """Looks once.

        Raises:
            VanishedError: ranks were missing the last time, and still are.
        """
        alive = {child.pid for child in multiprocessing.active_children()}
        num_missing = self._world_size - len(alive)
        if num_missing > 0 and self._num_missing > 0:
            self._keeper.end_ranks_soon()
            from comm.watchdog.verdict import name_ranks

            ranks = name_ranks(self._ranks_without(alive))
            raise VanishedError(f"{ranks} ended with exit code 0 before the run was done")
        self._num_missing = num_missing

    def _ranks_without(self, alive: set[int | None]) -> list[int]:
        return sorted(
            int(path.read_text()) for path in self._keeper.scratch.glob(f"{PID_PREFIX}*") if pid_of(path) not in alive
        )


def write_pid_file(scratch: Path, pid: int, rank: int) -> None:
    """Writes the file by which a rank's process is known, complete or not at all."""
    partial = scratch / f"partial_{pid}"
    partial.write_text(str(rank))
    partial.rename(scratch / f"{PID_PREFIX}{pid}")


def pid_of(path: Path) -> int:
    """Returns the process number that a file of `write_pid_file` stands for."""
    return int(path.name.removeprefix(PID_PREFIX))
