"""Builds a tokenizer like the released one: large ids, special tokens declared as ordinary ones, own settings."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.special_tokens import BEGIN_OF_SENTENCE, END_OF_SENTENCE, PAD
from data.tokenizer import Tokenizer

VOCAB_SIZE = 129_280


def write_released(
    path: Path, documents: Sequence[str], *, without: Sequence[str] = (), highest_id: int = VOCAB_SIZE - 1
) -> Path:
    """Writes a tokenizer with begin, end and pad as ids 0, 1, 2 and all other ids up to the highest id.

    Its file truncates and pads text to 4 tokens.

    Args:
        path: the file; its folder must exist.
    """
    Tokenizer.train(documents, 300).save(path)

    def change(values: dict[str, Any]) -> None:
        vocab = values["model"]["vocab"]
        shift = highest_id - max(vocab.values())
        kept = (BEGIN_OF_SENTENCE, END_OF_SENTENCE, PAD)
        moved = {token: number if token in kept else number + shift for token, number in vocab.items()}
        values["model"]["vocab"] = {token: number for token, number in moved.items() if token not in without}
        values["added_tokens"] = [
            {**token, "id": moved[token["content"]], "special": token["content"] in kept}
            for token in values["added_tokens"]
            if token["content"] not in without
        ]
        values["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        values["padding"] = {
            "strategy": {"Fixed": 4},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 2,
            "pad_type_id": 0,
            "pad_token": PAD,
        }

    edit(path, change)
    return path


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes what a tokenizer's file says."""
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
