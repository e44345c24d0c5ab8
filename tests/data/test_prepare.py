"""Tests of preparation: it depends only on text and settings, is cached atomically, and rejects empty parts."""

import dataclasses
import multiprocessing
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.corpus import DataError, is_validation
from data.pack import entropy_nats
from data.prepare import check_config, prepare
from data.readers.sources import EmbeddedSource, FilesSource, read_documents
from data.registry import Part
from data.shards.format import REPORT_NAME
from data.shards.open import Prepared
from data.shards.units import LOCK_NAME
from tests.tiny import data_config
from train.terminal import ProgressLines

NUM_FILES = 40


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(NUM_FILES):
        words = [f"word{(number * 7 + place) % 31} é数" for place in range(5 + number * 3)]
        (folder / f"file_{number:02}.txt").write_text(" ".join(words), encoding="utf-8")
    return data_config(tmp_path, fim_rate=0.3)


def texts_of(prepared: Prepared, part: Part) -> list[str]:
    """Returns the documents that are shorter than a sequence, found in the packed arrays."""
    packed = prepared.parts[part]
    tokens = packed.tokens_NL[:]
    positions = packed.positions_NL[:]
    texts = []
    for row, place in zip(tokens.tolist(), positions.tolist(), strict=True):
        begins = [i for i, value in enumerate(place) if value == 0]
        ends = [*begins[1:], sum(value >= 0 for value in place)]
        texts += [prepared.tokenizer.decode(row[a:b]) for a, b in zip(begins, ends, strict=True)]
    return sorted(texts)


def race(config: DataConfig, barrier: object, queue: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    queue.put(prepare(config, 16).fingerprint)  # type: ignore[attr-defined]


def test_parts_hold_every_document_once_and_follow_the_split(config: DataConfig) -> None:
    prepared = prepare(dataclasses.replace(config, fim_rate=0.0), 4096)
    expected: dict[Part, list[str]] = {"train": [], "validation": []}
    for document in read_documents(config.source):
        part: Part = "validation" if is_validation(document.key, 0.2, 0) else "train"
        expected[part].append(f"<｜begin▁of▁sentence｜>{document.text}<｜end▁of▁sentence｜>")
    for part, texts in expected.items():
        assert texts_of(prepared, part) == sorted(texts)
    assert len(expected["train"]) + len(expected["validation"]) == NUM_FILES


def test_fim_turns_training_documents_alone(config: DataConfig) -> None:
    turned = prepare(dataclasses.replace(config, fim_rate=1.0), 4096)
    plain = prepare(dataclasses.replace(config, fim_rate=0.0), 4096)
    assert texts_of(turned, "validation") == texts_of(plain, "validation")
    restored = []
    for text in texts_of(turned, "train"):
        text = text.removeprefix("<｜begin▁of▁sentence｜><｜fim▁begin｜>").removesuffix("<｜end▁of▁sentence｜>")
        prefix, rest = text.split("<｜fim▁hole｜>")
        suffix, middle = rest.split("<｜fim▁end｜>")
        restored.append(f"<｜begin▁of▁sentence｜>{prefix}{middle}{suffix}<｜end▁of▁sentence｜>")
    assert sorted(restored) == texts_of(plain, "train")


def test_the_tokenizer_never_sees_validation_text(config: DataConfig, tmp_path: Path) -> None:
    prepared = prepare(config, 16)
    for document in read_documents(config.source):
        if is_validation(document.key, 0.2, 0):
            (tmp_path / "text" / document.key).write_text("zqzq xkxk " * 500, encoding="utf-8")
    changed = prepare(config, 16)
    assert changed.fingerprint != prepared.fingerprint
    assert [changed.tokenizer.decode([i]) for i in range(300)] == [prepared.tokenizer.decode([i]) for i in range(300)]


def test_a_large_corpus_trains_the_tokenizer_on_a_sample(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(config, tokenizer_vocab_size=280)
    assert prepare(small, 16).tokenizer.vocab_size == 280
    monkeypatch.setattr("data.shards.run.TOKENIZER_TEXT_BYTES", 0)
    # A sample of nothing at all leaves the bytes and the special tokens.
    assert prepare(dataclasses.replace(small, cache_dir=f"{small.cache_dir}2"), 16).tokenizer.vocab_size == 264


def test_encoding_does_not_depend_on_the_batches(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare(config, 16)
    monkeypatch.setattr("data.shards.work.BATCH_CHARACTERS", 200)
    again = prepare(dataclasses.replace(config, cache_dir=f"{config.cache_dir}2"), 16)
    assert whole.fingerprint == again.fingerprint
    assert np.array_equal(whole.train.tokens_NL[:], again.train.tokens_NL[:])


def test_counts_and_entropy_are_those_of_the_arrays(config: DataConfig) -> None:
    prepared = prepare(config, 16)
    assert prepared.train.num_tokens == (prepared.train.positions_NL[:] >= 0).sum()
    assert prepared.validation.num_tokens == (prepared.validation.positions_NL[:] >= 0).sum()
    predicted = prepared.validation.tokens_NL[:][:, 1:][
        (prepared.validation.positions_NL[:][:, 1:] == prepared.validation.positions_NL[:][:, :-1] + 1)
        & (prepared.validation.positions_NL[:][:, :-1] >= 0)
    ]
    shares = [(predicted == token).mean() for token in set(predicted.tolist())]
    assert prepared.unigram_entropy_nats == pytest.approx(-sum(p * np.log(p) for p in shares), rel=1e-12)
    held_out = [document.text for document in read_documents(config.source) if is_validation(document.key, 0.2, 0)]
    text_bytes = sum(len(text.encode()) for text in held_out)
    assert prepared.bytes_per_token == text_bytes / (prepared.validation.num_tokens - len(held_out))


def test_entropy_of_equal_counts_is_the_logarithm_and_of_one_value_is_zero() -> None:
    assert entropy_nats(np.array([3, 0, 3, 3, 3])) == pytest.approx(np.log(4), rel=1e-15)
    assert entropy_nats(np.array([0, 9])) == 0.0


def arrays_of(prepared: Prepared) -> list[np.ndarray]:
    return [rows[:] for part in prepared.parts.values() for rows in (part.tokens_NL, part.positions_NL)]


def test_warm_equals_cold_and_builds_nothing(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    cold = prepare(config, 16)
    monkeypatch.setattr("data.shards.run.build_folder", None)
    other_length = prepare(config, 32)
    monkeypatch.setattr("data.shards.format.pack_windows", None)
    warm = prepare(config, 16)
    assert warm.fingerprint == cold.fingerprint != other_length.fingerprint
    assert all(map(np.array_equal, arrays_of(warm), arrays_of(cold)))
    assert warm.unigram_entropy_nats == cold.unigram_entropy_nats


def test_another_version_of_the_order_is_another_fingerprint(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(config, 16)
    monkeypatch.setattr("data.shards.open.ORDER_VERSION", 0)
    assert prepare(config, 16).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_vocab_size": 290},
        {"validation_fraction": 0.3},
        {"fim_rate": 0.9},
        {"seed": 1},
        {"punctuation_newline_split": 0.5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_that_matters_changes_the_cache(config: DataConfig, change: dict[str, int | float]) -> None:
    first = prepare(config, 16)
    second = prepare(dataclasses.replace(config, **change), 16)  # type: ignore[arg-type]
    assert first.fingerprint != second.fingerprint


def test_changed_text_is_read_again(config: DataConfig, tmp_path: Path) -> None:
    first = prepare(config, 16)
    (tmp_path / "text" / "file_00.txt").write_text("other words", encoding="utf-8")
    assert prepare(config, 16).fingerprint != first.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("before", ["absent", "broken"])
def test_two_processes_that_race_agree_and_leave_no_rubbish(config: DataConfig, tmp_path: Path, before: str) -> None:
    if before == "broken":
        prepare(config, 16)
        for path in (tmp_path / "cache").glob("*/sources/*/*.json"):
            path.write_text("{", encoding="utf-8")
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    workers = [context.Process(target=race, args=(config, barrier, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    fingerprints = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert fingerprints == {prepare(config, 16).fingerprint}
    assert not [path for path in (tmp_path / "cache").rglob(".*") if path.name != LOCK_NAME]


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage", ["unit_garbage", "unit_list", "unit_missing", "tokens_cut", "tokens_missing", "report_cut", "packed_cut"]
)
def test_a_damaged_cache_is_rebuilt(config: DataConfig, tmp_path: Path, damage: str) -> None:
    before = prepare(config, 16)
    arrays = arrays_of(before)
    (folder,) = (tmp_path / "cache").glob("*/sources/corpus")
    (tokens,) = folder.glob("train-*.tokens")
    unit = folder / f"{tokens.stem.removeprefix('train-')}.json"
    report = folder.parents[1] / REPORT_NAME
    (packed,) = folder.glob("train-*.sequences-16.npy")
    match damage:
        case "unit_garbage":
            unit.write_text("{", encoding="utf-8")
        case "unit_list":
            unit.write_text("[]", encoding="utf-8")
        case "unit_missing":
            unit.unlink()
        case "tokens_cut":
            tokens.write_bytes(tokens.read_bytes()[:-3])
        case "tokens_missing":
            tokens.unlink()
        case "report_cut":
            report.write_bytes(report.read_bytes()[:-3])
        case "packed_cut":
            packed.write_bytes(packed.read_bytes()[:-3])
    after = prepare(config, 16)
    assert after.fingerprint == before.fingerprint
    assert all(map(np.array_equal, arrays_of(after), arrays))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_build_that_fails_leaves_nothing(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("data.shards.format.UnitWriter.finish", fail)
        with pytest.raises(DataError, match=r"data\.cache_dir: .*No space left"):
            prepare(config, 16)
    assert not [*(tmp_path / "cache").rglob("*.tokens"), *(tmp_path / "cache").rglob(REPORT_NAME)]
    assert prepare(config, 16).train.num_tokens > 0


def test_a_cache_dir_that_is_a_file_is_rejected(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"data\.cache_dir: .*taken.* nearest: "):
        prepare(dataclasses.replace(config, cache_dir=str(tmp_path / "taken" / "x")), 16)


def test_a_validation_set_of_all_documents_is_lowered_with_a_line(config: DataConfig) -> None:
    lines: list[str] = []
    lowered = prepare(dataclasses.replace(config, validation_fraction=1.0 - 1e-9), 16, ProgressLines(lines.append))
    rule = r"data\.validation_fraction: .* hold out all (\d+) documents, .* lowered to (\d+)"
    found = next(match for line in lines if (match := re.match(rule, line)))
    assert int(found[1]) == int(found[2]) + 1
    assert "".join(texts_of(lowered, "train")).count("<｜begin▁of▁sentence｜>") == 1


@pytest.mark.parametrize("fraction", [1e-9, 1.0 - 1e-9])
def test_a_single_document_is_trained_on_regardless_of_its_hash(
    fraction: float, config: DataConfig, tmp_path: Path
) -> None:
    path = tmp_path / "text" / "file_03.txt"
    one = FilesSource(kind="files", paths=(str(path),), text_field="text")
    prepared = prepare(dataclasses.replace(config, source=one, validation_fraction=fraction, fim_rate=0.0), 16)
    assert prepared.validation.num_tokens == 0
    assert prepared.validation.tokens_NL.shape == (0, 16)
    tokens = prepared.train.tokens_NL[:][prepared.train.positions_NL[:] >= 0]
    assert prepared.tokenizer.decode(tokens.tolist(), skip_special_tokens=True) == path.read_text("utf-8")
    # Pieces lie in the order in which they were packed, so the text is compared only if it fits one sequence.
    assert prepared.bytes_per_token > 1
    assert prepared.unigram_entropy_nats > 0


def test_documents_of_which_none_is_held_out_are_all_trained_on(config: DataConfig) -> None:
    prepared = prepare(dataclasses.replace(config, validation_fraction=1e-9), 16)
    assert prepared.validation.num_tokens == 0
    assert prepared.train.num_tokens > 0


@pytest.mark.parametrize(
    ("key", "value", "nearest"),
    [
        ("tokenizer_vocab_size", 100, "264"),
        ("validation_fraction", 0.0, "0.01"),
        ("validation_fraction", float("nan"), "0.99"),
        ("fim_rate", -0.1, "0.0"),
        ("fim_rate", 1.5, "1.0"),
    ],
)
def test_values_out_of_range_are_rejected_by_name(config: DataConfig, key: str, value: float, nearest: str) -> None:
    changed = dataclasses.replace(config, **{key: value})  # type: ignore[arg-type]
    with pytest.raises(DataError) as caught:
        check_config(changed)
    with pytest.raises(DataError, match=f"data.{key}: "):
        prepare(changed, 16)
    assert str(caught.value).startswith(f"data.{key}: ")
    assert str(value) in str(caught.value)
    assert str(caught.value).endswith(f"nearest: {nearest}")
    with pytest.raises(DataError, match=r"batch\.sequence_length_tokens: .* got 1; nearest: 2"):
        prepare(config, 1)


def test_preparing_needs_no_torch() -> None:
    code = "import sys, data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


@pytest.mark.long
def test_embedded_corpus_is_prepared_within_its_time(tmp_path: Path) -> None:
    source = EmbeddedSource(kind="embedded")
    config = data_config(tmp_path, source=source, tokenizer_vocab_size=4096, validation_fraction=0.02, fim_rate=0.1)
    begin = time.process_time()
    prepared = prepare(config, 256)
    cold_seconds = time.process_time() - begin
    begin = time.process_time()
    prepare(config, 256)
    warm_seconds = time.process_time() - begin
    assert prepared.tokenizer.vocab_size == 4096
    assert prepared.train.num_tokens > 1_000_000
    assert 0.005 < prepared.validation.num_tokens / prepared.train.num_tokens < 0.08
    assert 4.0 < prepared.unigram_entropy_nats < np.log(4096)
    assert (prepared.train.positions_NL[:] < 0).mean() < 0.01
    # Of computation, which other programs do not change: 4 to 7 s and 0.05 s.
    assert cold_seconds < 40.0
    assert warm_seconds < 1.0
