"""Operations, each with a reference in plain PyTorch and Triton kernels.

A function raises ValueError if its operands have an unsupported type or shape, or do not match. The shape legend of a
folder is in its `reference.py`, which Triton's files implement. Kernels use int64 offsets, and masks exclude what is
beyond the last row or column. Their tensors must be on the current device.
"""

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
