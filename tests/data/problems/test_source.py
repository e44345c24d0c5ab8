"""Tests of problems as data: prompts reach prepared sequences, and both split alike."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.chat.encode import encode_prompt
from data.chat.templates import CHAT_TEMPLATES
from data.corpus import DataError
from data.prepare import Prepared, check_config, prepare
from data.problems.source import ProblemsSource, split_problems
from data.registry import DATA_SOURCES
from data.samples.pack import WEIGHTS
from data.samples.show import sample_lines
from tests.data.chat.conversations import chat_tokenizer
from tests.data.chat.test_sources import config_of, write_lines
from tests.data.test_arithmetic import config_of as arithmetic_config

L = 40


def source_of(path: Path) -> ProblemsSource:
    return ProblemsSource(kind="problems", paths=(str(path),), template="v3")


def read_prompts(prepared: Prepared) -> list[list[int]]:
    """Returns the prompts of the training part."""
    found = []
    for tokens, positions in zip(prepared.train_tokens_NL, prepared.train_positions_NL, strict=True):
        used = int((positions >= 0).sum())
        pieces = np.split(tokens[:used], np.flatnonzero(positions[:used] == 0)[1:])
        found.extend(piece.tolist() for piece in pieces)
    return found


def test_problems_become_prompts_without_targets_and_split_as_their_samples(tmp_path: Path) -> None:
    lines = [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(60)]
    lines += [{"prompt": "long " * 40, "answer": "dropped"}]
    config = config_of(source_of(write_lines(tmp_path / "p.jsonl", lines)), tmp_path, chat_tokenizer())
    check_config(config)
    prepared = prepare(config, L)
    train, held_out = split_problems(config)
    records = {record.answer: record for record in (*train, *held_out)}
    assert list(records) != [line["answer"] for line in lines]
    assert [each.place for each in train] == sorted((each.place for each in train), key=lambda p: int(p.split(":")[-1]))
    assert prepared.counts["train"].dropped + prepared.counts["validation"].dropped == 1
    # The samples of the training part are exactly the prompts of its problems.
    encoded = [encode_prompt(each.messages, CHAT_TEMPLATES.get("v3"), prepared.tokenizer) for each in train]
    assert sorted(read_prompts(prepared)) == sorted(ids for ids in encoded if len(ids) <= L)
    assert 0 < len(held_out) < len(train)
    assert not prepared.train_values[WEIGHTS].any()
    assert prepared.counts["train"].targets == 0
    assert prepared.bytes_per_token > 0
    shown = list(sample_lines(prepared, 0, reads_weights=True))
    assert any(line.startswith("prompt: ") and line.endswith(", 0 targets") for line in shown)
    assert shown[-1].endswith("<｜Assistant｜>")
    assert prepare(config, L).fingerprint == prepared.fingerprint


def test_arithmetic_problems_split_as_its_samples(tmp_path: Path) -> None:
    config = arithmetic_config(tmp_path, num_samples=300, num_digits=4)
    entry = DATA_SOURCES.get("arithmetic")
    train, held_out = split_problems(config)
    keys = {record.key for record in (*train, *held_out)}
    assert len(keys) == len(train) + len(held_out)  # four digits repeat among 300
    counts = prepare(config, 64).counts
    assert entry.samples is not None
    assert entry.tokenizer is not None
    samples = [sample.key for sample in entry.samples(config.source, entry.tokenizer(config.source))]
    assert keys == set(samples)
    assert sum(key in {record.key for record in held_out} for key in samples) == counts["validation"].kept
    assert all("".join(sorted(record.prompt[:-1])) == record.answer for record in train)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a"}, "p.jsonl:1: answer or tests: must be given"),
        ({"prompt": "a", "anwser": "b"}, "nearest: answer instead of anwser"),
        ({"answer": "b"}, "p.jsonl:1: prompt: must be given"),
    ],
)
def test_problem_that_is_not_valid_is_refused_by_line(tmp_path: Path, line: dict, message: str) -> None:
    config = config_of(source_of(write_lines(tmp_path / "p.jsonl", [line])), tmp_path, chat_tokenizer())
    with pytest.raises(DataError, match=message):
        check_config(config)


def test_problem_without_an_answer_says_so(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a", "answer": None}])
    [record] = split_problems(config_of(source_of(path), tmp_path, chat_tokenizer(), validation_fraction=0.0001))[0]
    assert (record.answer, record.tests, record.key) == (None, None, "p.jsonl:1")


def test_split_refuses_sources_without_problems_and_an_empty_training_part(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a", "answer": "b"}])
    with pytest.raises(DataError, match=r"validation_fraction: 0\.9999 of 1 problems"):
        split_problems(config_of(source_of(path), tmp_path, validation_fraction=0.9999))
    (tmp_path / "notes.txt").write_text(json.dumps("text"))
    files = DATA_SOURCES.get("files").config(kind="files", paths=(str(tmp_path),), text_field="text")  # type: ignore[call-arg]
    with pytest.raises(
        DataError, match="must be a source with problems, is files; nearest valid: problems, reasoning_gym"
    ):
        split_problems(config_of(files, tmp_path))
