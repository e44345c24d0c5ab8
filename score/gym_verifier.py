"""Verifies answers to problems of reasoning-gym in a worker. Imports nothing of this project."""

import json
from functools import lru_cache
from typing import Any

import reasoning_gym


def score(prompt: str, answer: str, expected: str | None) -> dict[str, object]:
    """Returns the library's score, 0 to 1, of the problem that `expected` names by data set and index."""
    origin = json.loads(expected or "{}")
    dataset = _open(origin["dataset"], origin["seed"], origin["size"])
    entry = dataset[origin["index"]]
    if entry["question"] != prompt:
        raise ValueError("this version of reasoning-gym generates another question")
    value = float(dataset.score_answer(answer, entry))
    return {"score": value, "outcome": "correct" if value >= 1 else "wrong"}


@lru_cache(maxsize=16)
def _open(name: str, seed: int, size: int) -> Any:
    return reasoning_gym.create_dataset(name, seed=seed, size=size)
