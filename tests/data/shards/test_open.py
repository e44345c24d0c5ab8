"""Tests of runs on folders of launch.prepare: what they read, in which order, and what is refused."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import BatchSizes, DataConfig
from data.corpus import DataError
from data.loader import Loader
from data.prepare import check_config, prepare
from data.readers.sources import FilesSource
from data.shards.open import MixtureSource, Prepared, open_folder, unused_settings
from data.tokenizer import Tokenizer
from tests.tiny import data_config

pytestmark = pytest.mark.slow
L = 32


def config_of(home: Path, **source: str | None) -> DataConfig:
    values = {"kind": "mix", "manifest": None, "folder": None, "local_cache": None} | source
    return data_config(home, source=MixtureSource(**values), seed=5)  # type: ignore[arg-type]


def write_manifest(folder: Path, name: str, weights: tuple[float, float]) -> str:
    sources = [
        {"name": source, "paths": [f"{source}.jsonl"], "weight": weight}
        for source, weight in zip(("prose", "code"), weights, strict=True)
    ]
    path = folder / name
    path.write_text(json.dumps({"sources": sources, "decontaminate": []}))
    return str(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    draw = np.random.default_rng(0)
    for name, alphabet in (("prose", "abcdef"), ("code", "{}()=+")):
        words = ["".join(draw.choice(list(alphabet), 5)) for _ in range(40)]
        rows = [json.dumps({"text": " ".join(draw.choice(words, draw.integers(3, 60)))}) for _ in range(150)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def prepared(text: Path) -> Prepared:
    return prepare(config_of(text, manifest=write_manifest(text, "a.yaml", (0.7, 0.3))), L)


def folder_of(text: Path) -> Path:
    (folder,) = (text / "cache").glob("mix-*")
    return folder


def test_a_run_reads_every_token_of_every_source_in_its_order(text: Path, prepared: Prepared) -> None:
    report = json.loads((folder_of(text) / "prepare.json").read_text())
    assert (prepared.train.positions_NL[:] >= 0).sum() == prepared.train.num_tokens
    tokens = {name: source["train"]["tokens"] for name, source in report["sources"].items()}
    assert sum(tokens.values()) == prepared.train.num_tokens
    assert prepared.validation.num_tokens == (prepared.validation.positions_NL[:] >= 0).sum() > 0
    loader = Loader(prepared, sizes=BatchSizes(4))
    open_folder(folder_of(text), None, L).mixture(5).write_order(text, BatchSizes(4), 50)
    prose = 0
    for step, line in enumerate((text / "order.jsonl").read_text().splitlines()):
        names = [name for name, _ in json.loads(line)["sequences"]]
        texts = [
            prepared.tokenizer.decode(row.tolist(), skip_special_tokens=True)
            for row in loader.batch(step, 0, 4).tokens_BT
        ]
        assert names == ["prose" if set(text) & set("abcdef") else "code" for text in texts]
        prose += names.count("prose")
        assert abs(prose - 0.7 * 4 * (step + 1)) <= 1


def test_other_weights_need_no_other_folder_and_change_the_fingerprint(text: Path, prepared: Prepared) -> None:
    changed = prepare(config_of(text, manifest=write_manifest(text, "b.yaml", (0.0, 1.0))), L)
    assert changed.fingerprint != prepared.fingerprint
    assert (changed.order.range(0, 30) >= changed.order.first_rows[1]).all()
    again = prepare(config_of(text, folder=str(folder_of(text))), L)
    assert again.fingerprint == prepared.fingerprint
    assert (again.train.tokens_NL[:] == prepared.train.tokens_NL[:]).all()


def test_a_local_copy_reads_the_same_and_is_made_once(text: Path, prepared: Prepared) -> None:
    config = config_of(text, folder=str(folder_of(text)), local_cache=str(text / "local"))
    assert (prepare(config, L).train.tokens_NL[:] == prepared.train.tokens_NL[:]).all()
    files = {path: path.stat().st_mtime_ns for path in (text / "local").rglob("*") if path.is_file()}
    assert any(path.suffix == ".tokens" for path in files)
    prepare(config, L)
    assert files == {path: path.stat().st_mtime_ns for path in (text / "local").rglob("*") if path.is_file()}


def test_a_local_copy_is_made_while_another_process_changes_the_folder(
    text: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file and a folder of a unit in progress go as soon as they have been listed."""
    going = folder_of(text) / "sources" / "prose" / "going.json"
    building = going.with_name(".building-0")
    scan = os.scandir

    class ListedBeforeAnother:
        def __init__(self, path: str | Path) -> None:
            is_changing = Path(path) == going.parent
            if is_changing:
                going.touch()
                building.mkdir()
            self._entries = iter([*scan(path)])
            if is_changing:
                going.unlink()
                building.rmdir()

        def __enter__(self) -> "ListedBeforeAnother":
            return self

        def __exit__(self, *error: object) -> None: ...

        def __iter__(self) -> "ListedBeforeAnother":
            return self

        def __next__(self) -> "os.DirEntry[str]":
            return next(self._entries)

    config = config_of(text, folder=str(folder_of(text)), local_cache=str(text / "changing"))
    monkeypatch.setattr(os, "scandir", ListedBeforeAnother)
    assert prepare(config, L).fingerprint == prepared.fingerprint


def test_a_folder_that_does_not_fit_is_refused(text: Path, prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.folder: must be a folder that launch\.prepare has completed"):
        prepare(config_of(text, folder=str(tmp_path)), L)
    manifest = write_manifest(text, "c.yaml", (1.0, 1.0)).replace("c.yaml", "d.yaml")
    Path(manifest).write_text('{"sources": [{"name": "maths", "paths": ["code.jsonl"], "weight": 1}]}')
    with pytest.raises(DataError, match=r"data\.folder: .* lacks maths, has prose, code"):
        prepare(config_of(text, folder=str(folder_of(text)), manifest=manifest), L)
    prepared.tokenizer.save(tmp_path / "tokenizer.json")
    content = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content + " ")
    config = replace(config_of(text, folder=str(folder_of(text))), tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"data\.tokenizer: must be the tokenizer that .* was prepared with"):
        prepare(config, L)


def test_files_and_a_prepared_folder_split_the_same_tokens(tmp_path: Path) -> None:
    text = 'f(x);\n\nif a:\n\treturn {1: 2},\r\n "quoted."\n\n'
    rows = [json.dumps({"text": text * (number % 5 + 1)}) for number in range(60)]
    for name in ("prose", "code"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    Tokenizer.train([text * 50], 400).save(tmp_path / "tokenizer.json")
    source = FilesSource(kind="files", paths=(str(tmp_path / "prose.jsonl"),), text_field="text")
    given: dict[str, Any] = {"tokenizer": str(tmp_path / "tokenizer.json"), "punctuation_newline_split": 0.5}
    files = replace(config_of(tmp_path), source=source, **given)
    manifest = write_manifest(tmp_path, "mix.yaml", (1.0, 0.0))
    prepare(replace(config_of(tmp_path, manifest=manifest), **given), L)
    folder = str(folder_of(tmp_path))
    first, second = prepare(files, L), prepare(config_of(tmp_path, folder=folder, manifest=manifest), L)
    tokens = first.train.tokens_NL[:]
    assert (tokens == second.train.tokens_NL[: len(tokens)]).all()
    for plain in (None, 0.0):
        assert prepare(replace(files, punctuation_newline_split=plain), L).train.num_tokens < first.train.num_tokens
    assert len(list((tmp_path / "cache").glob("documents-*"))) == 2  # no split is the same folder as a split of 0
    other = replace(config_of(tmp_path, folder=folder), punctuation_newline_split=0.4)
    for refuses in (check_config, partial(prepare, sequence_length_tokens=L)):
        with pytest.raises(DataError, match=r"^data\.punctuation_newline_split: .* is 0\.4; nearest: 0\.5, or null$"):
            refuses(other)
    opened = config_of(tmp_path, folder=folder)
    assert unused_settings(opened) == ""
    assert unused_settings(replace(opened, fim_rate=0.75)) == (
        f"data.fim_rate=0.75 has no effect, as data.folder was prepared with {opened.fim_rate:g}"
    )
