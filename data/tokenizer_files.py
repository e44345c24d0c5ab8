"""Finds tokenizer files in folders. Imports no torch."""

from pathlib import Path

from data.tiktoken_file import TIKTOKEN_NAME
from data.tokenizer import TOKENIZER_NAME


def find_tokenizer_file(folder: Path) -> Path | None:
    """Returns the tokenizer file in a folder, or None if there is none in a supported format."""
    paths = (folder / name for name in (TOKENIZER_NAME, TIKTOKEN_NAME))
    return next((path for path in paths if path.is_file()), None)


def other_tokenizer(folder: Path) -> str:
    """Returns which unsupported tokenizer a folder contains and how to convert it; empty if there is none."""
    names = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).is_file()]
    if not names:
        return ""
    return (
        f'holds {names[0]}, which must first be saved as {TOKENIZER_NAME}: python -c "from transformers import '
        f"AutoTokenizer; AutoTokenizer.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')\""
    )
