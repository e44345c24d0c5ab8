"""Folders of launch.prepare as an attacker may write them: each is a function that changes a copy."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.attacks.hostile_weights import DEEP_LIST, DEEP_OBJECT, HUGE, Spoil, both, raw

NOTES = Path("sources/notes")


def report(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Changes `prepare.json`."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / "prepare.json").read_text())
        change(values)
        (folder / "prepare.json").write_text(json.dumps(values))

    return edit


def top(**values: Any) -> Spoil:
    return report(lambda record: record.update(values))


def source(**values: Any) -> Spoil:
    return report(lambda record: record["sources"]["notes"].update(values))


def part(**values: Any) -> Spoil:
    return report(lambda record: record["sources"]["notes"]["train"].update(values))


def renamed(name: str) -> Spoil:
    """Gives the source another name, everywhere."""

    def change(record: dict[str, Any]) -> None:
        record["sources"][name] = record["sources"].pop("notes")
        record["manifest"]["sources"][0]["name"] = name

    return report(change)


def file(pattern: str, make: Callable[[Path], object]) -> Spoil:
    """Puts something in place of a file of the unit, or changes it."""

    def put(folder: Path) -> None:
        (path,) = (folder / NOTES).glob(pattern)
        make(path)

    return put


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        path.unlink()
        make(path)

    return put


def link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(40 * 2**35)


def ids(value: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(np.full(path.stat().st_size // 2, value, "<u2").tobytes())


def rows(name: str, value: int) -> Callable[[Path], None]:
    """Changes a column of the index."""

    def write(path: Path) -> None:
        from data.shards.format import INDEX

        table = np.frombuffer(path.read_bytes(), INDEX).copy()
        table[name] = value
        path.write_bytes(table.tobytes())

    return write


def array(values: Any, **header: Any) -> Callable[[Path], None]:
    """Writes an `.npy` file, with another shape or type in its header."""

    def write(path: Path) -> None:
        content = np.asarray(values)
        with path.open("wb") as stream:
            np.lib.format.write_array_header_1_0(
                stream, {**np.lib.format.header_data_from_array_1_0(content), **header}
            )
            stream.write(content.tobytes())

    return write


def drops(make: Callable[[Path], object]) -> Spoil:
    """Adds a file of dropped documents."""

    def put(folder: Path) -> None:
        (index,) = (folder / NOTES).glob("*.index")
        make(index.with_name(f"{index.stem}.drop.npy"))

    return put


def stored_counts(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Changes the numbers of sequences that an earlier run has stored."""

    def edit(folder: Path) -> None:
        (path,) = folder.glob("sequences-*.json")
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return edit


PACKED = "train-*.sequences-*.npy"
LINE = "is one line"
NO_EFFECT = "has no effect"

FOLDERS: Mapping[str, tuple[Spoil, str]] = {
    "report of nothing": (raw("prepare.json", ""), LINE),
    "report is a list": (raw("prepare.json", "[]"), LINE),
    "report is deep": (raw("prepare.json", DEEP_OBJECT), LINE),
    "report is a deep list": (raw("prepare.json", DEEP_LIST), LINE),
    "report is a pipe": (lambda folder: instead(os.mkfifo)(folder / "prepare.json"), LINE),
    "report is a device": (lambda folder: instead(device)(folder / "prepare.json"), LINE),
    "report is sparse": (lambda folder: sparse(folder / "prepare.json"), LINE),
    "no sources": (top(sources={}), LINE),
    "sources are a list": (top(sources=["notes"]), LINE),
    "no manifest": (top(manifest=None), LINE),
    "source is above": (renamed("../../escaped"), LINE),
    "source is absolute": (renamed("/tmp/escaped"), LINE),
    "source is the folder": (renamed("."), LINE),
    "unit is above": (source(units=["../../escaped"]), LINE),
    "unit is absolute": (source(units=["/etc/passwd"]), LINE),
    "units are a number": (source(units=7), LINE),
    "units are objects": (source(units=[{}]), LINE),
    "unit is absent": (source(units=["0" * 16]), LINE),
    "unit twice": (report(lambda record: record["sources"]["notes"]["units"].extend(["0" * 16] * 2)), LINE),
    "type of objects": (top(token_dtype="O"), LINE),
    "type is a number": (top(token_dtype=7), LINE),
    "vocabulary is huge": (top(vocab_size=HUGE), LINE),
    "vocabulary is negative": (top(vocab_size=-1), LINE),
    "vocabulary is another": (top(vocab_size=301), LINE),
    "tokens are text": (part(tokens="many"), LINE),
    "tokens are negative": (part(tokens=-5), LINE),
    "tokens are huge": (part(tokens=HUGE), LINE),
    "tokens as documents": (
        report(lambda record: record["sources"]["notes"]["validation"].update(documents=9)),
        NO_EFFECT,
    ),
    "tokens are a pipe": (file("train-*.tokens", instead(os.mkfifo)), LINE),
    "tokens are a link": (file("train-*.tokens", instead(link)), LINE),
    "tokens are a device": (file("train-*.tokens", instead(device)), LINE),
    "tokens are cut": (file("train-*.tokens", lambda path: os.truncate(path, 10)), LINE),
    "tokens are sparse": (file("train-*.tokens", sparse), LINE),
    "tokens above the vocabulary": (file("train-*.tokens", ids(65535)), LINE),
    "index is a link": (file("*.index", instead(link)), LINE),
    "index is sparse": (file("*.index", sparse), LINE),
    "index is cut": (file("*.index", lambda path: os.truncate(path, 41)), LINE),
    "index is empty": (file("*.index", lambda path: os.truncate(path, 0)), LINE),
    "documents are longer": (file("*.index", rows("length", 2**32 - 1)), LINE),
    "documents of another part": (file("*.index", rows("part", 9)), LINE),
    "drops are huge": (drops(array(np.zeros(1, np.uint8), shape=(2**45,))), LINE),
    "drops are larger": (drops(array(np.zeros(1, np.uint8), shape=(2**70,))), LINE),
    "drops are objects": (drops(array(np.zeros(1, np.uint8), descr="|O")), LINE),
    "drops are too few": (drops(array(np.zeros(1, np.uint8))), LINE),
    "drops are a pipe": (drops(os.mkfifo), LINE),
    "sequences are a link": (file(PACKED, instead(link)), LINE),
    "sequences are a pipe": (file(PACKED, instead(os.mkfifo)), LINE),
    "sequences are huge": (file(PACKED, array(np.zeros(1, np.uint32), shape=(2**45,))), NO_EFFECT),
    "sequences of nothing": (file(PACKED, lambda path: os.truncate(path, 0)), NO_EFFECT),
    "sequences are fractions": (file(PACKED, array(np.ones(8))), NO_EFFECT),
    "sequences of absent documents": (file(PACKED, array(np.array([1, 0, 1, 2**31, 0, 5], np.uint32))), NO_EFFECT),
    "sequences beyond documents": (file(PACKED, array(np.array([1, 0, 1, 0, 2**31, 5], np.uint32))), NO_EFFECT),
    "sequences beyond their length": (file(PACKED, array(np.array([1, 0, 1, 0, 0, 2**31], np.uint32))), NO_EFFECT),
    "sequences that claim more": (file(PACKED, array(np.array([2**32 - 1, 0, 1, 0, 0, 5], np.uint32))), NO_EFFECT),
    "stored counts are huge": (
        stored_counts(lambda counts: counts["train"].update({"notes": [HUGE] * len(counts["train"]["notes"])})),
        NO_EFFECT,
    ),
    "stored counts are others": (
        stored_counts(lambda counts: counts["train"].update({"notes": [n + 1 for n in counts["train"]["notes"]]})),
        LINE,
    ),
    "stored counts are text": (stored_counts(lambda counts: counts["train"].update(notes="1")), NO_EFFECT),
    "stored counts lack a part": (stored_counts(lambda counts: counts.pop("validation")), NO_EFFECT),
    "entropy is text": (stored_counts(lambda counts: counts.update(entropy_nats="x")), NO_EFFECT),
    "link to another folder": (
        both(
            lambda folder: (folder / NOTES).rename(folder / "moved"),
            lambda folder: (folder / NOTES).symlink_to(folder / "moved"),
        ),
        LINE,
    ),
    "sources are a link": (
        both(
            lambda folder: (folder / "sources").rename(folder / "moved"),
            lambda folder: (folder / "sources").symlink_to(folder / "moved"),
        ),
        LINE,
    ),
    "tokenizer is a pipe": (lambda folder: instead(os.mkfifo)(folder / "tokenizer.json"), LINE),
    "tokenizer's names are a pipe": (lambda folder: os.mkfifo(folder / "tokenizer_config.json"), LINE),
    "tokenizer is text": (raw("tokenizer.json", "{}"), LINE),
}


def settings(**values: Any) -> Spoil:
    def edit(folder: Path) -> None:
        record = json.loads((folder / "settings.json").read_text())
        (folder / "settings.json").write_text(json.dumps({**record, **values}))

    return edit


def unit(**values: Any) -> Spoil:
    """Changes the description of the unit."""

    def edit(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return file("*.json", edit)


CONTINUED: Mapping[str, tuple[Spoil, str]] = {
    "settings are a list": (raw("settings.json", "[]"), LINE),
    "settings are deep": (raw("settings.json", DEEP_OBJECT), LINE),
    "settings are a pipe": (lambda folder: instead(os.mkfifo)(folder / "settings.json"), LINE),
    "units of nothing": (settings(unit_bytes=0), LINE),
    "units of a byte": (settings(unit_bytes=1), LINE),
    "units of text": (settings(unit_bytes="4"), LINE),
    "unit without counts": (unit(counts=None), NO_EFFECT),
    "unit with other counts": (unit(counts={"rows": "many"}), NO_EFFECT),
    "unit with a list": (unit(dropped=[1]), NO_EFFECT),
    "unit is deep": (file("*.json", lambda path: path.write_text(DEEP_OBJECT)), NO_EFFECT),
    "lock is a link": (
        lambda folder: ((folder / ".lock").unlink(), (folder / ".lock").symlink_to(folder.parent / "made")),
        LINE,
    ),
}
