"""The corpus, its held-out part, and progress of preparation."""

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data.chat.sources import ChatLines, ChatSource
from data.config import with_parts
from data.corpus import DataError, is_validation
from data.prepare import check_config, prepare
from data.problems import split_problems
from data.readers.sources import EmbeddedSource, FilesSource, check_source, list_files, read_documents, read_json_lines
from data.registry import DataSource
from evaluation.protocol import read_lines
from evaluation.run import read_records
from launch.generate import read_prompts
from launch.sample import FileProblemsConfig, load_problems
from launch.weights.scored_samples import read_samples
from tests.data.chat.conversations import chat_tokenizer
from tests.data.chat.test_sources import config_of

EMBEDDED = EmbeddedSource(kind="embedded")


def files(*paths: Path | str) -> FilesSource:
    return FilesSource(kind="files", paths=tuple(str(path) for path in paths), text_field="text")


def test_embedded_is_large_sorted_relative_and_without_tests() -> None:
    found = list_files(EMBEDDED)
    keys = [file.key for file in found]
    assert keys == sorted(keys) == [file.key for file in list_files(EMBEDDED)]
    assert len(set(keys)) == len(keys)
    assert sum(file.path.stat().st_size for file in found) > 5_000_000
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for key in keys:
        assert not skipped & set(key.split("/")), key
        assert not os.path.isabs(key)


def test_check_of_the_embedded_source_takes_under_a_second() -> None:
    begin = time.process_time()  # CPU time of this process, independent of other load
    check_source(EMBEDDED)
    assert time.process_time() - begin < 1.0


def test_files_are_searched_recursively_by_suffix_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.MD", "a/d.py", "a/picture.png", ".git/e.txt", "a/.hidden.txt", "f.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}), encoding="utf-8")
    assert [file.key for file in list_files(files(tmp_path))] == ["a/c.MD", "a/d.py", "b.txt", "f.jsonl"]


def test_a_file_reached_twice_counts_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("a", encoding="utf-8")
    found = list_files(files(tmp_path, tmp_path / "sub", tmp_path / "sub" / "a.txt"))
    assert [file.key for file in found] == ["sub/a.txt"]


def test_keys_do_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    keys = []
    for place in ("here", "over/there"):
        folder = tmp_path / place
        (folder / "x").mkdir(parents=True)
        (folder / "x" / "a.txt").write_text("a", encoding="utf-8")
        (folder / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n', encoding="utf-8")
        keys.append([document.key for document in read_documents(files(folder))])
    assert keys[0] == keys[1] == ["b.jsonl:1", "b.jsonl:3", "x/a.txt"]


def test_bytes_that_are_no_text_become_replacement_characters(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab\xffc")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x\xffy"}\n')
    texts = [document.text for document in read_documents(files(tmp_path))]
    assert texts == ["ab�c", "x�y"]


def chat_lines(path: Path) -> object:
    return list(read_json_lines(list_files(files(path))[0], lambda values, key, place: (key, place), None, "chats"))


READERS: dict[str, Callable[[Path], object]] = {
    "documents": lambda path: list(read_documents(files(path))),
    "chats, preferences, problems": chat_lines,
    "problems to sample": lambda path: load_problems(FileProblemsConfig(kind="file", path=str(path))),
    "evaluation": lambda path: read_lines("maths.path", str(path), lambda values, place: values),
    "records of an evaluation": lambda path: read_records(path.parent, "x"),
    "prompts": lambda path: read_prompts(None, str(path)),
    "journal of samples": read_samples,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"text": "a", "id": 1, "prompt": "a", "text": "b"}', "the key 'text' occurs twice"),
        ('{"text": "a", "id": 1, "prompt": "a", "tools": [{"x": 1, "x": 1}]}', "the key 'x' occurs twice"),
        ('{"text": "a", "id": 1, "prompt": "a\\ud83d"}', "lone surrogate .ud83d"),
        ('{"text": "a", "id": 1, "prompt": "a\\uDE00\\ud83d"}', "lone surrogate .ude00"),
        ('{"text": "a", "id": 1, "prompt": "a", "a\\ud83d": 1}', "lone surrogate .ud83d"),
    ],
)
def test_every_reader_refuses_keys_that_occur_twice_and_lone_surrogates(
    tmp_path: Path, reader: str, line: str, rule: str
) -> None:
    path = tmp_path / "samples_x.jsonl"
    good = '{"text": "a\\ud83d\\ude00", "id": 1, "prompt": "a", "answer": "b"}\n'
    path.write_text(good * 2 + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rule) as refused:
        READERS[reader](path)
    assert re.search(r"samples_x\.jsonl'?(:|, line )3\b", str(refused.value))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", ["object with a string field", "{not json"]),
        ("[1, 2]", ["object with a string field", "[1, 2]"]),
        ('{"texts": "a", "id": 3}', ["'id', 'texts'", "nearest: data.text_field='texts'"]),
        ('{"text": 7}', ["type int", "7"]),
        ('{"text": "x\\ud800y"}', ["lone surrogate \\ud800"]),
        ('{"text": "a", "id": {"b": 1, "b": 2}}', ["the key 'b' occurs twice"]),
        ("[" * 100_000, ["object with a string field"]),
    ],
)
def test_a_bad_jsonl_line_is_rejected_with_its_place(tmp_path: Path, line: str, words: list[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n', encoding="utf-8")
    for call in (check_source, lambda source: list(read_documents(source))):
        with pytest.raises(DataError) as caught:
            call(files(tmp_path))
        for word in (f"{path}:3", *words):
            assert word in str(caught.value)
        assert len(str(caught.value)) < 600


def test_a_missing_path_is_rejected_with_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("a", encoding="utf-8")
    for given, nearest in (("corpsu", "corpus"), ("corpsu/a.txt", "corpus/a.txt"), ("corpus/b.tx", None)):
        with pytest.raises(DataError) as caught:
            check_source(files(tmp_path / given))
        message = str(caught.value)
        assert message.startswith("data.paths:")
        assert "does not exist" in message
        assert str(tmp_path / given) in message
        if nearest is not None:
            assert message.endswith(f"nearest: {str(tmp_path / nearest)!r}")
        else:
            assert str(tmp_path / "corpus") in message.split(";")[-1]


@pytest.mark.parametrize("given", ["", "~no_such_user_here/x.txt", "a\0b.txt", "x" * 5000 + ".txt"])
def test_an_impossible_path_is_rejected_as_data(given: str) -> None:
    with pytest.raises(DataError, match=r"^data\.paths:"):
        check_source(files(given))


def test_sources_without_text_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.paths: at least one"):
        check_source(files())
    with pytest.raises(DataError, match="contains no readable document"):
        check_source(files(tmp_path))
    picture = tmp_path / "a.jsonll"
    picture.write_bytes(b"x")
    with pytest.raises(DataError, match=r"ends in '\.jsonll'.*nearest: '\.jsonl'"):
        check_source(files(picture))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.md").write_bytes(b" \n\n")
    (tmp_path / "blank.jsonl").write_bytes(b'\n{"text": " "}\n')
    with pytest.raises(DataError, match=r"data\.paths: .*at least one non-empty document; 3 files"):
        check_source(files(tmp_path))


def test_check_reads_a_bounded_amount(tmp_path: Path) -> None:
    line = json.dumps({"text": "word " * 200}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(line * 40_000 + b"bad\n")
    begin = time.monotonic()
    check_source(files(tmp_path))
    assert time.monotonic() - begin < 1.0
    with pytest.raises(DataError, match=r"a\.jsonl:40001: "):
        list(read_documents(files(tmp_path)))


def test_split_is_stable_across_machines_and_releases() -> None:
    held_out = [number for number in range(40) if is_validation(f"folder/file_{number}.txt", 0.1, 3)]
    assert held_out == [2, 5, 12, 23, 28]


def test_split_has_its_fraction_grows_with_it_and_follows_the_seed() -> None:
    keys = [f"k{number}" for number in range(20_000)]
    small = {key for key in keys if is_validation(key, 0.05, 0)}
    large = {key for key in keys if is_validation(key, 0.2, 0)}
    other = {key for key in keys if is_validation(key, 0.05, 1)}
    assert small < large
    # Five standard deviations of a binomial count.
    assert abs(len(small) - 1000) < 5 * (20_000 * 0.05 * 0.95) ** 0.5
    assert abs(len(large) - 4000) < 5 * (20_000 * 0.2 * 0.8) ** 0.5
    assert len(small & other) < 0.2 * len(small)


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
            return ChatLines(kind=kind, paths=paths, template="v3")
        case "problems":
            return ChatLines(kind=kind, paths=paths, template="v3")
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
    assert prepared.train.num_tokens > other.train.num_tokens
    assert 0 < prepared.validation.num_tokens < other.validation.num_tokens
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
