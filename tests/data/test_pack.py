"""Packing, fill-in-the-middle, and what a terminal shows of a sample."""

import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.chat.sources import ChatLines, ChatSource
from data.pack import (
    WEIGHTS,
    SequenceTable,
    best_fit_decreasing,
    cut_pieces,
    pack_windows,
)
from data.prepare import prepare
from data.shards.format import ShardRows
from launch import train
from launch.cli.entry import command
from launch.cli.sample_lines import sample_lines
from tests.data.chat.conversations import SPELLED, chat_tokenizer, draw_text
from tests.data.chat.test_sources import L, config_of, write_lines

PAD = 2


def documents_of(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens that are all different, so that each can be tracked."""
    return np.arange(10, 10 + sum(lengths), dtype=np.int32), np.asarray(lengths, dtype=np.int64)


@dataclasses.dataclass
class MemoryShard:
    """A shard in memory, packed in one window."""

    tokens: np.ndarray
    lengths: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths

    def read(self, positions: slice) -> np.ndarray:
        return self.tokens[positions]

    def sequences(self, sequence_length_tokens: int) -> SequenceTable:
        return pack_windows(self.lengths, sequence_length_tokens)


def packed_rows(tokens: np.ndarray, lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens and the positions of all sequences."""
    shard: Any = MemoryShard(tokens, lengths)
    count = len(shard.sequences(length))
    return ShardRows([shard], [count], length, PAD)[:], ShardRows([shard], [count], length, None)[:]


LENGTHS = st.lists(st.integers(0, 40), max_size=30)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(LENGTHS, st.integers(2, 17))
def test_packing_loses_and_invents_no_token(lengths: list[int], length: int) -> None:
    tokens, counts = documents_of(lengths)
    tokens_NL, positions_NL = packed_rows(tokens, counts, length)
    real = positions_NL >= 0
    assert sorted(tokens_NL[real].tolist()) == tokens.tolist()
    assert (tokens_NL[~real] == PAD).all()
    # Padding is at the end, and no sequence is all padding.
    assert (np.diff(real.astype(int), axis=1) <= 0).all()
    assert real[:, 0].all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(LENGTHS, st.integers(2, 17))
def test_the_position_rule_says_exactly_what_follows_within_a_piece(lengths: list[int], length: int) -> None:
    tokens, counts = documents_of(lengths)
    tokens_NL, positions_NL = packed_rows(tokens, counts, length)
    piece = {}
    starts = np.cumsum(counts) - counts
    for number, (document, first, size) in enumerate(zip(*cut_pieces(counts, length), strict=True)):
        start = starts[document] + first
        piece.update(dict.fromkeys(tokens[start : start + size].tolist(), number))
    for row, positions in zip(tokens_NL.tolist(), positions_NL.tolist(), strict=True):
        for i in range(length):
            for k in range(1, length - i):
                rule = positions[i] >= 0 and positions[i + k] == positions[i] + k
                same = row[i] in piece and piece.get(row[i]) == piece.get(row[i + k])
                assert rule == same
                assert not rule or row[i + k] == row[i] + k


@settings(max_examples=100, deadline=None, derandomize=True)
@given(LENGTHS, st.integers(2, 17))
def test_only_documents_longer_than_a_sequence_are_cut(lengths: list[int], length: int) -> None:
    _, counts = documents_of(lengths)
    documents, firsts, sizes = cut_pieces(counts, length)
    starts = (np.cumsum(counts) - counts)[documents] + firsts
    assert len(starts) == sum(-(-size // length) for size in lengths)
    assert sizes.sum() == counts.sum()
    assert ((sizes >= 1) & (sizes <= length)).all()
    assert (starts[1:] == starts[:-1] + sizes[:-1]).all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 23), max_size=60))
def test_bins_equal_those_of_a_plain_search_for_the_tightest_fit(lengths: list[int]) -> None:
    capacity = 23
    bins, num_bins = best_fit_decreasing(lengths, capacity)
    rooms: list[int] = []
    for size in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms[rooms.index(min(fitting))] -= size
        else:
            rooms.append(capacity - size)
    used = np.bincount(np.asarray(bins, dtype=np.int64), weights=lengths, minlength=num_bins) if lengths else []  # type: ignore[var-annotated]
    assert sorted(capacity - np.asarray(used)) == sorted(rooms)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LENGTHS, st.integers(2, 17), st.integers(1, 9))
def test_windows_hold_consecutive_documents_and_every_token_once(lengths: list[int], length: int, scale: int) -> None:
    """The window is at least 256 sequences, so the documents are repeated until there are several windows."""
    tokens, counts = documents_of(lengths * 40)
    starts = np.cumsum(counts) - counts
    window = 256 * length * scale
    table = pack_windows(counts.astype(np.uint32), length, window)
    pieces = [table.of(sequence) for sequence in range(len(table))]
    spans = sorted((int(starts[document]) + first, size) for row in pieces for document, first, size in row.tolist())
    assert [token for first, size in spans for token in range(first, first + size)] == list(range(len(tokens)))
    assert all(0 < row[:, 2].sum() <= length for row in pieces)
    windows = [{int(starts[document]) // window for document in row[:, 0].tolist()} for row in pieces]
    assert all(len(numbers) == 1 for numbers in windows)
    assert windows == sorted(windows, key=min)
    # Within a window, sequences are those of packing its documents alone.
    for number in {number for numbers in windows for number in numbers}:
        inside = np.flatnonzero(starts // window == number)
        alone = pack_windows(counts[inside], length)
        same = [row - [inside[0], 0, 0] for row, numbers in zip(pieces, windows, strict=True) if number in numbers]
        assert [row.tolist() for row in same] == [alone.of(sequence).tolist() for sequence in range(len(alone))]


def test_padding_of_windows_is_small_and_a_table_is_read_as_written(tmp_path: Path) -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    lengths = rng.lognormal(6.5, 1.2, size=60_000).astype(np.uint32) + 2  # about 80M tokens
    table = pack_windows(lengths, 4096)
    assert len(table) * 4096 * (1 - 0.005) <= lengths.sum()
    table.save(tmp_path / "table.npy")
    again = SequenceTable.load(tmp_path / "table.npy", lengths.astype(np.int64), 4096)
    assert isinstance(again.pieces, np.memmap)
    assert np.array_equal(again.pieces, table.pieces)
    assert np.array_equal(again.offsets, table.offsets)


def test_fifty_thousand_pieces_are_packed_quickly_and_tightly() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    lengths = rng.integers(1, 4097, size=50_000).tolist()
    begin = time.monotonic()
    _, num_bins = best_fit_decreasing(lengths, 4096)
    # About 0.1 s alone on a core; a quadratic search takes minutes.
    assert time.monotonic() - begin < 3.0
    assert num_bins <= 1.01 * sum(lengths) / 4096 + 1


def test_every_target_is_marked_in_every_sequence(tmp_path: Path) -> None:
    rng = random.Random(1)
    lines = [{"prompt": f"{n} {draw_text(rng)}", "answer": draw_text(rng)} for n in range(30)]
    path = write_lines(tmp_path / "chats.jsonl", lines)
    source = ChatSource(kind="chat", paths=(str(path),), template="v3", too_long="cut")
    prepared = prepare(config_of(source, tmp_path, chat_tokenizer()), L)
    texts = {line["answer"] for line in lines}
    for row in range(len(prepared.train.tokens_NL)):
        shown = list(sample_lines(prepared, row, reads_weights=True))
        header = next(line for line in shown if line.startswith("piece: "))
        size = int(header.split()[1])
        assert f", {int(prepared.train.values[WEIGHTS][row, :size].sum())} targets" in header
        marked = [line.removeprefix("target | ") for line in shown if line.startswith("target | ")]
        answer = "\n".join(marked).removesuffix("<｜end▁of▁sentence｜>")
        for name in SPELLED:
            # Only special tokens that are placed appear without a backslash.
            assert answer.replace(f"\\{name}", "").count(name) == 0
            answer = answer.replace(f"\\{name}", name)
        assert answer in texts
        everything = list(sample_lines(prepared, row, reads_weights=False))
        assert next(line for line in everything if "|" in line) == "       | <｜begin▁of▁sentence｜>"


def test_pairs_show_both_answers_and_hostile_text_is_escaped(tmp_path: Path) -> None:
    line = {"prompt": "a\x1b[2Jb\u202e", "chosen": "right", "rejected": "wrong\r"}
    path = write_lines(tmp_path / "pairs.jsonl", [line, line])
    source = ChatLines(kind="preferences", paths=(str(path),), template="v3")
    config = dataclasses.replace(config_of(source, tmp_path, chat_tokenizer()), validation_fraction=0.001)
    shown = list(sample_lines(prepare(config, L), 0, reads_weights=True))
    prompt = "       | <｜begin▁of▁sentence｜><｜User｜>a\\x1b[2Jb\\u202e<｜Assistant｜>"
    assert [line for line in shown if "|" in line] == [
        prompt,
        "target | right<｜end▁of▁sentence｜>",
        prompt,
        "target | wrong\\r<｜end▁of▁sentence｜>",
    ]
    assert [line.partition(":")[0] for line in shown if line.startswith(("chosen", "rejected"))] == [
        "chosen",
        "rejected",
    ]


def test_dry_run_prints_a_sample_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}", "answer": "yes"}) + "\n" for n in range(40)))
    arguments = [
        "task=sft",
        "batch.document_mask=true",
        "data=chat",
        f"data.paths=[{path}]",
        "data.validation_fraction=0.01",
    ]
    arguments += [f"data.cache_dir={tmp_path / 'cache'}", f"out_dir={tmp_path / 'run'}", "validation.sequences=0"]
    monkeypatch.setattr("sys.argv", ["train", *arguments, "dry_run=true"])
    assert command("train", train.main, train.preview, dry_run=train.dry_run) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "target | yes<｜end▁of▁sentence｜>\n" in shown
    assert "train samples: 40 kept (0 cut at their end), 0 dropped, 80 targets\n" in shown
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("sys.argv", ["train", *arguments, "dry_run=maybe"])
    assert command("train", train.main, train.preview, dry_run=train.dry_run) == 2
    assert "dry_run: must be true or false, is 'maybe'; nearest valid: dry_run=true" in capsys.readouterr().err
