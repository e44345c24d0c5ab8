"""What every package uses: choices by name, ranges, errors and files. Imports no torch."""

import importlib
import sys
from pathlib import Path

_COMM = Path(__file__).parents[1] / "comm"


def share_comm() -> None:
    """Extends Jupyter's package `comm`, which a notebook's kernel has loaded, by this project's modules."""
    loaded = sys.modules.get("comm") or importlib.import_module("comm")
    if str(_COMM) not in loaded.__path__:
        loaded.__path__.append(str(_COMM))


share_comm()
