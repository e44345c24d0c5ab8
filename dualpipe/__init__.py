"""Generates, validates, simulates, draws and executes pipeline schedules.

Only `dualpipe.runtime` needs torch; the rest runs on the standard library.
"""

from base import share_comm

share_comm()  # before the modules below, which import other packages

from dualpipe.api import BuiltSchedule, CostsChangedWarning, Drawing, ScheduleComparison, build, compare  # noqa: E402
from dualpipe.registry import ModelCosts  # noqa: E402

__all__ = ["BuiltSchedule", "CostsChangedWarning", "Drawing", "ModelCosts", "ScheduleComparison", "build", "compare"]
