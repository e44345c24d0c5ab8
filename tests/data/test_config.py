"""Tests of the held-out part: a share of the source, or files of its own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data.chat.sources import ChatSource, PreferencesSource
from data.config import with_parts
from data.corpus import DataError, EmbeddedSource, FilesSource, read_documents
from data.prepare import check_config, prepare
from data.problems.source import ProblemsSource, split_problems
from data.registry import DataSource
from tests.data.chat.conversations import chat_tokenizer
from tests.data.chat.test_sources import config_of

RECORDS = {
    "chat": {"prompt": "a", "answer": "b"},
    "preferences": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "problems": {"prompt": "a", "answer": "b"},
    "files": {"text": "some text"},
}


def source_of(kind: str, path: Path) -> DataSource:
    paths = (str(path),)
    match kind:
        case "chat":
            return ChatSource(kind=kind, paths=paths, template="v3", too_long="cut")
        case "preferences":
            return PreferencesSource(kind=kind, paths=paths, template="v3")
        case "problems":
            return ProblemsSource(kind=kind, paths=paths, template="v3")
        case _:
            return FilesSource(kind=kind, paths=paths, text_field="text")


def write(path: Path, kind: str, count: int) -> Path:
    path.write_text("".join(f"{json.dumps(RECORDS[kind])}\n" for _ in range(count)), "utf-8")
    return path


@pytest.mark.parametrize("kind", [*RECORDS])
def test_validation_paths_are_the_whole_held_out_part(kind: str, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", kind, 40)
    held_out = str(write(tmp_path / "held_out.jsonl", kind, 3))
    by_share = config_of(source_of(kind, train), tmp_path, chat_tokenizer(), validation_fraction=0.5)
    config = replace(by_share, validation_paths=(held_out,))
    check_config(config)
    parts = [(part, document.key.partition(":")[0]) for part, document in with_parts(config, read_documents)]
    assert parts == [("train", "train.jsonl")] * 40 + [("validation", "held_out.jsonl")] * 3
    prepared, other = prepare(config, 32), prepare(by_share, 32)
    assert prepared.train_tokens > other.train_tokens
    assert 0 < prepared.validation_tokens < other.validation_tokens
    if kind == "problems":
        assert [len(each) for each in split_problems(config)] == [40, 3]
    elif kind != "files":
        assert [prepared.counts[part].kept for part in ("train", "validation")] == [40, 3]


def test_validation_paths_that_cannot_be_held_out_are_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", "chat", 4)
    config = config_of(source_of("chat", train), tmp_path, chat_tokenizer())
    with pytest.raises(
        DataError, match=r"data\.validation_paths: must name files that data\.paths does not, names .*train"
    ):
        check_config(replace(config, validation_paths=(str(tmp_path),)))
    with pytest.raises(DataError, match=r"^data\.validation_paths: '.*absent\.jsonl' does not exist"):
        check_config(replace(config, validation_paths=(str(tmp_path / "absent.jsonl"),)))
    with pytest.raises(DataError, match=r"data\.validation_paths: must be null with data\.kind=embedded"):
        check_config(replace(config, source=EmbeddedSource(kind="embedded"), validation_paths=(str(train),)))
