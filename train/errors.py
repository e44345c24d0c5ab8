"""What ends a run by itself, and the file in which a rank leaves word of it."""

from dataclasses import dataclass
from pathlib import Path


class NonFiniteError(RuntimeError):
    """A step's loss or gradient norm is infinite or no number. Equal on all ranks, and nothing was updated."""


@dataclass(frozen=True, slots=True)
class LastWord:
    """Why a rank ended: one line, and its exit code."""

    text: str
    code: int


def error_path(out_dir: Path, rank: int) -> Path:
    """Where a rank of a run leaves word when it fails."""
    return out_dir / "log" / f"rank_{rank:05d}.error.log"


def write_error(path: Path, word: LastWord, details: str) -> None:
    """Writes the line, the code, then everything else; complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(f"{word.text}\nexit code {word.code}\n\n{details}", encoding="utf-8")
    partial.replace(path)


def read_error(path: Path) -> LastWord:
    """What `write_error` wrote, without the details."""
    text, code = path.read_text(encoding="utf-8").splitlines()[:2]
    return LastWord(text, int(code.rpartition(" ")[2]))


def find_errors(out_dir: Path) -> list[Path]:
    """The files of ranks that failed, in the order in which they were written."""
    return sorted((out_dir / "log").glob("rank_*.error.log"), key=lambda path: path.stat().st_mtime_ns)
