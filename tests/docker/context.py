"""Build context for images: a copy of the checkout, with files that no image may contain."""

import shutil
from pathlib import Path

from tests.docker.pins import PINS, ROOT, pins_text

DECOYS = (
    ".git/config",
    ".venv/bin/python",
    "outputs/run/metrics.jsonl",
    ".env",
    "data/__pycache__/mix.pyc",
    "docs/x.svg",
)
"""Files that the context holds and that no image may."""

_NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "outputs", "__pycache__", ".*_cache", ".hypothesis", "wandb")


def copy_context(folder: Path, own_pins: bool) -> Path:
    """Copies the checkout and adds `DECOYS`.

    Args:
        own_pins: whether to pin the versions of this environment instead of the recorded ones, so that pip has
            nothing to install if it finds this environment's packages.
    """
    copy = folder / "context"
    shutil.copytree(ROOT, copy, ignore=_NOT_COPIED, symlinks=True)
    for name in DECOYS:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("no image may hold this\n")
    if own_pins:
        (copy / PINS.relative_to(ROOT)).write_text(pins_text())
    return copy
