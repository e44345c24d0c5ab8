"""Lets this project's packages be found next to Jupyter's, which also has one called `comm`."""

import importlib
import sys
from pathlib import Path

_COMM = Path(__file__).parents[1] / "comm"


def share_comm() -> None:
    """Extends Jupyter's package `comm`, which a notebook's kernel has loaded, by this project's modules."""
    loaded = sys.modules.get("comm") or importlib.import_module("comm")
    if str(_COMM) not in loaded.__path__:
        loaded.__path__.append(str(_COMM))
