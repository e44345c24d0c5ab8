"""Tests that chats and pairs reach packed sequences with values by position, and what is cut or dropped."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.chat.encode import encode_prompt
from data.chat.messages import user
from data.chat.sources import ChatSource, PreferencesSource
from data.chat.templates import CHAT_TEMPLATES
from data.config import DataConfig
from data.corpus import DataError
from data.prepare import Prepared, check_config, prepare
from data.registry import DATA_SOURCES, DataSource
from data.samples.pack import MARGIN, PAIR, SCORE, WEIGHTS
from data.special_tokens import CHAT_TOKENS
from data.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.data.chat.conversations import chat_tokenizer, draw_text

L = 96


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    """Writes objects into a `.jsonl` file."""
    path.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")
    return path


def config_of(source: DataSource, folder: Path, tokenizer: Tokenizer | None = None, **changes: Any) -> DataConfig:
    """Returns a configuration that prepares a source."""
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")
    config = DataConfig(
        source=source,
        tokenizer=None if tokenizer is None else str(folder / "tokenizer.json"),
        tokenizer_bos=None,
        tokenizer_eos=None,
        tokenizer_pad=None,
        tokenizer_vocab_size=300,
        validation_fraction=0.2,
        fim_rate=0.0,
        seed=0,
        cache_dir=str(folder / "cache"),
    )
    return dataclasses.replace(config, **changes)


def prepared_pairs(folder: Path, lines: list[dict[str, Any]], **changes: Any) -> Prepared:
    """Prepares pairs of answers."""
    path = write_lines(folder / "pairs.jsonl", lines)
    source = PreferencesSource(kind="preferences", paths=(str(path),), template="v3")
    return prepare(config_of(source, folder, chat_tokenizer(), **changes), L)


def test_pairs_are_numbered_by_position_and_unique_in_a_sequence(tmp_path: Path) -> None:
    rng = random.Random(3)
    lines = [
        {"prompt": draw_text(rng), "chosen": f"{n} {draw_text(rng)}", "rejected": draw_text(rng), "margin": n}
        for n in range(60)
    ]
    # The end of sentence also fills sequences, and is written in prompts and answers.
    prepared = prepared_pairs(tmp_path, lines, tokenizer_pad="<｜end▁of▁sentence｜>")
    eos, tokenizer, values = prepared.tokenizer.end_of_sentence_id, prepared.tokenizer, prepared.train_values
    assert prepared.tokenizer.pad_id == eos
    assert {name: str(value.dtype) for name, value in values.items()} == {
        WEIGHTS: "float32",
        PAIR: "int16",
        SCORE: "int16",
        MARGIN: "float32",
    }
    most, seen = 0, 0
    for row, tokens in enumerate(prepared.train_tokens_NL.tolist()):
        positions = prepared.train_positions_NL[row]
        pair, score = values[PAIR][row], values[SCORE][row]
        count = int(np.abs(pair).max())
        most, seen = max(most, count), seen + count
        for number in [sign * k for k in range(1, count + 1) for sign in (1, -1)]:
            (last,) = np.flatnonzero(score == number)
            targets = np.flatnonzero(pair == number)
            # Targets are consecutive, and the last of them predicts the answer's last token, its end.
            assert targets.tolist() == list(range(targets[0], last))
            assert tokens[last] == eos
            start = last - positions[last]
            text = tokenizer.decode(tokens[start : targets[0] + 1])
            line = lines[int(values[MARGIN][row, last])] if number > 0 else None
            if line is not None:
                prompt = encode_prompt([user(line["prompt"])], CHAT_TEMPLATES.get("v3"), tokenizer)
                assert tokens[start : targets[0] + 1] == prompt, text
                assert tokenizer.decode(tokens[targets[0] + 1 : last]) == line["chosen"]
        assert np.array_equal(pair != 0, values[WEIGHTS][row] != 0)
        assert set(np.abs(score[score != 0]).tolist()) == set(range(1, count + 1))
        assert not values[MARGIN][row][score <= 0].any()
    assert most >= 2
    assert seen == prepared.counts["train"].kept


def test_long_pairs_are_dropped_whole_and_counted(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "chosen": f"{n}", "rejected": "b " * (100 if n % 3 == 0 else 2)} for n in range(60)]
    prepared = prepared_pairs(tmp_path, lines)
    counts = list(prepared.counts.values())
    assert sum(count.dropped for count in counts) == 20
    assert sum(count.kept for count in counts) == 40
    assert sum(count.cut for count in counts) == 0


@pytest.mark.parametrize(("too_long", "kept", "cut"), [("cut", 60, 20), ("drop", 40, 0)])
def test_long_chats_are_cut_at_their_end_or_dropped(too_long: Any, kept: int, cut: int, tmp_path: Path) -> None:
    lines = [{"prompt": f"{n}", "answer": "b " * (200 if n % 3 == 0 else 2)} for n in range(60)]
    path = write_lines(tmp_path / "chats.jsonl", lines)
    source = ChatSource(kind="chat", paths=(str(path),), template="v3", too_long=too_long)
    prepared = prepare(config_of(source, tmp_path, chat_tokenizer()), L)
    counts = list(prepared.counts.values())
    assert [sum(getattr(count, name) for count in counts) for name in ("kept", "cut")] == [kept, cut]
    # The last token that is kept is predicted; the one after it is not.
    full = prepared.train_positions_NL[:, -1] == L - 1
    assert full.sum() == (sum(count.cut for count in counts[:1]) if cut else 0)
    assert not prepared.train_values[WEIGHTS][full, -1].any()
    assert prepared.train_values[WEIGHTS][full, -2].all()


def test_views_of_a_conversation_are_on_one_side_of_the_validation_split(tmp_path: Path) -> None:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{n} first"},
                {"role": "assistant", "content": "1", "thoughts": "a"},
                {"role": "user", "content": "second"},
                {"role": "assistant", "content": "2", "thoughts": "b"},
            ]
        }
        for n in range(40)
    ]
    path = write_lines(tmp_path / "chats.jsonl", lines)
    source = ChatSource(kind="chat", paths=(str(path),), template="r1", too_long="cut")
    config = config_of(source, tmp_path, chat_tokenizer())
    entry = DATA_SOURCES.get("chat")
    assert entry.samples is not None
    keys = [sample.key for sample in entry.samples(source, chat_tokenizer())]
    assert keys == [f"chats.jsonl:{n + 1}" for n in range(40) for _ in range(2)]
    prepared = prepare(config, L)
    assert all(count.kept % 2 == 0 and count.kept for count in prepared.counts.values())


def test_tokenizers_trained_on_chats_have_their_tokens_and_others_keep_their_ids(tmp_path: Path) -> None:
    lines = [{"prompt": f"sort {n}", "answer": f"{n}"} for n in range(30)]
    path = write_lines(tmp_path / "chats.jsonl", lines)
    source = ChatSource(kind="chat", paths=(str(path),), template="v3_1", too_long="cut")
    config = config_of(source, tmp_path)
    assert check_config(config) == 300
    tokenizer = prepare(config, L).tokenizer
    expected = [*SPECIAL_TOKENS, *CHAT_TOKENS]
    assert [tokenizer.special_id(token) for token in expected] == list(range(len(expected)))
    with pytest.raises(DataError, match=r"data\.tokenizer_vocab_size: must be at least 275 .* nearest: 275"):
        check_config(dataclasses.replace(config, tokenizer_vocab_size=274))
    plain = Tokenizer.train(["sort 1 2 3"], 300)
    assert not any(plain.has_token(token) for token in CHAT_TOKENS)
    with pytest.raises(DataError, match=r"data\.template: v3_1 places the token '</think>'.* must be a special token"):
        check_config(config_of(source, tmp_path, plain))
    # Without thoughts and tools, a tokenizer of documents is enough.
    plain_source = dataclasses.replace(source, template="v3")
    assert prepare(config_of(plain_source, tmp_path, plain), L).counts["train"].kept > 0
    lines.append(
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{}"}]},
            ]
        }
    )
    write_lines(path, lines)
    with pytest.raises(DataError, match=r"data\.template: v3 places the token '<｜tool▁calls▁begin｜>'"):
        check_config(config_of(plain_source, tmp_path, plain))


def test_thoughts_that_a_template_cannot_write_are_refused_by_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "chats.jsonl", [{"prompt": "a", "answer": "b", "thoughts": "c"}])
    source = ChatSource(kind="chat", paths=(str(path),), template="v3", too_long="cut")
    with pytest.raises(DataError) as refused:
        check_config(config_of(source, tmp_path))
    assert str(refused.value) == (
        f"{path}:1: thoughts: must be absent with a template that has none; nearest valid: data.template=r1, "
        "r1_distill or v3_1"
    )
