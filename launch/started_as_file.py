"""Explains how to start a command that was started as a file, as in `python launch/train.py`."""

import shlex
import sys
from pathlib import Path


def advice(path: Path) -> str:
    """Returns the error message for a command's file, or for the folder of commands."""
    file = path / "__main__.py" if path.is_dir() else path
    root = file.resolve().parents[1]
    command = "launch" if file.stem == "__main__" else f"launch.{file.stem}"
    folder = "" if Path.cwd() == root else f"cd {shlex.quote(str(root))} && "
    return f"error: {path}: must be started as a module; write {folder}python -m {command} ..."


# Python searches a script's own folder for imports, so it finds this module without its package.
if __package__ == "":
    print(advice(Path(sys.argv[0])), file=sys.stderr, flush=True)
    sys.exit(2)
