"""How this project's packages are found beside Jupyter's, which also has one that is called `comm`."""

import importlib
import sys
from pathlib import Path

_COMM = Path(__file__).parents[1] / "comm"


def share_comm() -> None:
    """Lets the package `comm` find this project's modules if it is Jupyter's, which keeps all that it has.

    Every package of this project calls this when it is imported. A notebook's kernel imports Jupyter's `comm` before
    the first cell runs, so that `import comm.protocol` would look there alone.
    """
    loaded = sys.modules.get("comm") or importlib.import_module("comm")
    if str(_COMM) not in loaded.__path__:
        loaded.__path__.append(str(_COMM))
