"""Tests of prepared folders from somebody else: one line or no effect, and nothing is written outside of them."""

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data.corpus import DataError
from data.prepare import prepare
from data.shards.open import MixtureSource, Prepared
from tests.attacks.hostile_prepared import CONTINUED, FOLDERS, LINE
from tests.tiny import data_config

L = 32


def opened(home: Path, folder: Path | None, manifest: Path | None = None) -> Prepared:
    """Opens a folder as a run does, and reads all of it."""
    names = [None if path is None else str(path) for path in (manifest, folder)]
    source = MixtureSource(kind="mix", manifest=names[0], folder=names[1], local_cache=None)
    prepared = prepare(data_config(home, source=source, seed=5), L)
    for part in (prepared.train, prepared.validation):
        assert (part.tokens_NL[:] < prepared.tokenizer.vocab_size).all()
        assert len(part.positions_NL[:]) == len(part.tokens_NL)
    return prepared


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("prepared")
    rows = (json.dumps({"text": f"row {row} of a few words " * (row % 7 + 1)}) for row in range(80))
    (home / "notes.jsonl").write_text("\n".join(rows))
    manifest = {"sources": [{"name": "notes", "paths": ["notes.jsonl"], "weight": 1}], "decontaminate": []}
    (home / "mix.yaml").write_text(json.dumps(manifest))
    opened(home, None, home / "mix.yaml")
    (folder,) = (home / "cache").glob("mix-*")
    return folder


@contextmanager
def seconds(limit: int) -> Iterator[None]:
    """Ends what hangs."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", FOLDERS)
def test_prepared_folder_of_somebody_else_is_one_line_or_has_no_effect(folder: Path, tmp_path: Path, name: str) -> None:
    spoil, ending = FOLDERS[name]
    copied = tmp_path / "inner" / "out"
    shutil.copytree(folder, copied)
    spoil(copied)
    with seconds(60):
        if ending == LINE:
            with pytest.raises(DataError) as raised:
                opened(tmp_path, copied)
            assert "\n" not in str(raised.value)
            assert str(copied) in str(raised.value) or str(raised.value).startswith("sources.notes: ")
        else:
            genuine = opened(tmp_path, folder)
            read = opened(tmp_path, copied)
            assert (read.train.tokens_NL[:] == genuine.train.tokens_NL[:]).all()
    assert {path.name for path in tmp_path.iterdir()} <= {"inner", "cache"}
    assert [path.name for path in (tmp_path / "inner").iterdir()] == ["out"]


@pytest.mark.parametrize("name", CONTINUED)
def test_folder_of_somebody_else_that_a_command_continues_is_one_line_or_has_no_effect(
    folder: Path, tmp_path: Path, name: str
) -> None:
    spoil, ending = CONTINUED[name]
    copied = tmp_path / "cache" / folder.name
    shutil.copytree(folder, copied)
    (copied / "prepare.json").unlink()
    spoil(copied)
    manifest = folder.parents[1] / "mix.yaml"
    with seconds(60):
        if ending == LINE:
            with pytest.raises(DataError) as raised:
                opened(tmp_path, None, manifest)
            assert "\n" not in str(raised.value)
            assert str(copied) in str(raised.value)
        else:
            genuine = opened(tmp_path, folder)
            assert (opened(tmp_path, None, manifest).train.tokens_NL[:] == genuine.train.tokens_NL[:]).all()
