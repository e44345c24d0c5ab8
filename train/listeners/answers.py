"""Writes and reads a run's answers to held-out prompts. No torch here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ANSWERS_NAME = "answers.json"
_LARGEST_FILE_BYTES = 2**22


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutAnswer:
    """A held-out prompt, the answer of the data, and the model's answer, as text with special tokens."""

    prompt: str
    reference: str
    answer: str

    def __str__(self) -> str:
        """Returns lines for the terminal."""
        return f"held-out prompt {self.prompt!r}\n  reference {self.reference!r}\n  answer    {self.answer!r}"


def write_answers(folder: Path, answers: Sequence[HeldOutAnswer]) -> None:
    """Writes `answers.json` into a run's folder, from which the report reads it."""
    partial = folder / f"{ANSWERS_NAME}.partial"
    partial.write_text(json.dumps([asdict(answer) for answer in answers], indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / ANSWERS_NAME)


def read_answers(folder: Path) -> list[HeldOutAnswer]:
    """Returns the answers of a run's folder; none if there is no file of this form."""
    path = folder / ANSWERS_NAME
    if not path.is_file() or path.stat().st_size > _LARGEST_FILE_BYTES:
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return []
    return [_answer(record) for record in records if isinstance(record, dict)] if isinstance(records, list) else []


def _answer(record: Mapping[str, Any]) -> HeldOutAnswer:
    return HeldOutAnswer(**{name: str(record.get(name, "")) for name in ("prompt", "reference", "answer")})
