"""Chats and pairs are read from their common forms, and reach packed sequences with values by position."""

import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.chat.encode import encode_prompt
from data.chat.messages import (
    ChatMessage,
    Conversation,
    ToolCall,
    ToolDefinition,
    assistant,
    read_conversation,
    read_pair,
    user,
)
from data.chat.sources import ChatLines, ChatSource
from data.chat.templates import CHAT_TEMPLATES
from data.config import DataConfig
from data.corpus import DataError
from data.pack import MARGIN, PAIR, SCORE, WEIGHTS
from data.prepare import check_config, prepare
from data.readers.sources import check_source, read_documents
from data.registry import DATA_SOURCES, DataSource
from data.shards.open import Prepared
from data.special_tokens import CHAT_TOKENS
from data.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.data.chat.conversations import chat_tokenizer, draw_text
from tests.tiny import data_config

L = 96


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    """Writes objects into a `.jsonl` file."""
    path.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")
    return path


def config_of(source: DataSource, folder: Path, tokenizer: Tokenizer | None = None, **changes: Any) -> DataConfig:
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")
    path = None if tokenizer is None else str(folder / "tokenizer.json")
    return data_config(folder, source=source, tokenizer=path, **changes)


def prepared_pairs(folder: Path, lines: list[dict[str, Any]], **changes: Any) -> Prepared:
    path = write_lines(folder / "pairs.jsonl", lines)
    source = ChatLines(kind="preferences", paths=(str(path),), template="v3")
    return prepare(config_of(source, folder, chat_tokenizer(), **changes), L)


def test_pairs_are_numbered_by_position_and_unique_in_a_sequence(tmp_path: Path) -> None:
    rng = random.Random(3)
    lines = [
        {"prompt": draw_text(rng), "chosen": f"{n} {draw_text(rng)}", "rejected": draw_text(rng), "margin": n}
        for n in range(60)
    ]
    # The end of sentence also fills sequences, and is written in prompts and answers.
    prepared = prepared_pairs(tmp_path, lines, tokenizer_pad="<｜end▁of▁sentence｜>")
    eos, tokenizer, values = prepared.tokenizer.special.eos, prepared.tokenizer, prepared.train.values
    assert prepared.tokenizer.special.pad == eos
    assert {name: str(value.dtype) for name, value in values.items()} == {
        WEIGHTS: "float32",
        PAIR: "int16",
        SCORE: "int16",
        MARGIN: "float32",
    }
    most, seen = 0, 0
    for row, tokens in enumerate(prepared.train.tokens_NL.tolist()):
        positions = prepared.train.positions_NL[row]
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
                prompt = encode_prompt([user(line["prompt"])], CHAT_TEMPLATES.get("v3"), tokenizer)  # type: ignore[arg-type]
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
    full = prepared.train.positions_NL[:, -1] == L - 1
    assert full.sum() == (sum(count.cut for count in counts[:1]) if cut else 0)
    assert not prepared.train.values[WEIGHTS][full, -1].any()
    assert prepared.train.values[WEIGHTS][full, -2].all()


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
    assert not set(CHAT_TOKENS) & set(plain.spellings().values())
    with pytest.raises(DataError, match=r"data\.template: v3_1 places the token '</think>'.* must be a special token"):
        check_config(config_of(source, tmp_path, plain))
    # Without thoughts and tools, a tokenizer of documents is enough.
    plain_source = dataclasses.replace(source, template="v3")
    assert prepare(config_of(plain_source, tmp_path, plain), L).counts["train"].kept > 0
    lines.append(
        {
            "messages": [  # type: ignore[dict-item]
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


GOOD_CHAT = {"prompt": "a", "answer": "b"}
GOOD_PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
WRONG_STRINGS: tuple[Any, ...] = (3, True, ["x"], {"x": 1})
WRONG_LISTS: tuple[Any, ...] = (3, "x", {"role": "user"}, [])
SECONDS = 3.0


def turns(**changes: Any) -> list[dict[str, Any]]:
    """Returns messages of a user and an assistant; changes apply to the latter."""
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **changes}]


def call(**changes: Any) -> dict[str, Any]:
    return {
        "messages": turns(tool_calls=[{"type": "function", "function": {"name": "f", "arguments": "{}", **changes}}])
    }


def broken_chats() -> list[tuple[object, str]]:
    """Returns lines of chats, each with the field that the error must name."""
    lines: list[tuple[object, str]] = [
        (value, "") for value in (b"{", b"[1", b'{"a": }', b"\xff\xfe", b"3", b'"x"', b"[]")
    ]
    lines += [({"messages": value}, "messages") for value in WRONG_LISTS]
    lines += [({"messages": [value]}, "messages[0]") for value in (3, "x", [], None)]  # type: ignore[var-annotated]
    lines += [({"messages": turns(content=value)}, "messages[1].content") for value in (*WRONG_STRINGS, None)]
    lines += [({"messages": turns(thoughts=value)}, "messages[1].thoughts") for value in WRONG_STRINGS]
    lines += [
        ({"messages": turns(reasoning_content=value)}, "messages[1].reasoning_content") for value in WRONG_STRINGS
    ]
    lines += [
        ({"messages": turns(role=value)}, "messages[1].role") for value in ("gpt", "Asistant", "", 3, None, ["user"])
    ]
    lines += [({"messages": turns(role=value)}, "messages[1].role") for value in ("system", "tool", "user")]
    lines += [({"messages": turns(tool_calls=value)}, "messages[1].tool_calls") for value in (3, "x", {"x": 1})]
    lines += [
        ({"messages": turns(tool_calls=[value])}, "messages[1].tool_calls[0]") for value in (3, "x", None, {"x": 1})
    ]
    lines += [(call(name=value), "messages[1].tool_calls[0].function.name") for value in (3, None, ["f"])]
    lines += [(call(arguments=value), "messages[1].tool_calls[0].function.arguments") for value in (3, None, ["f"])]
    lines += [(call(argument="{}"), "messages[1].tool_calls[0].function.argument")]
    lines += [({"messages": [{"role": "user"}, *turns()[1:]]}, "messages[0].content")]
    lines += [({"messages": [{"content": "a"}]}, "messages[0].role")]
    lines += [({"messages": turns(contents="x")}, "messages[1].contents")]
    lines += [({"messages": turns(weight=0)}, "messages[1].weight")]
    lines += [({"messages": turns(thoughts="x", reasoning_content="y")}, "reasoning_content")]
    lines += [({"messages": turns(content="<think>x</think>y")}, "messages[1].content")]
    lines += [({"messages": [{"role": "user", "content": "a", "thoughts": "x"}, *turns()[1:]]}, "messages[0].thoughts")]
    lines += [({"messages": turns()[1:]}, "messages[0].role"), ({"messages": turns()[:1]}, "messages[0].role")]
    lines += [({"messages": [*turns(), *turns()[1:]]}, "messages[2].role")]
    lines += [({"messages": [*turns(), {"role": "tool", "content": "x"}]}, "messages[2].role")]
    lines += [({"messages": turns(), "tools": value}, "tools") for value in (3, "x", {"name": "f"}, [3], [{}])]  # type: ignore[var-annotated]
    lines += [({"messages": turns(), "tools": [{"name": "f", "parameters": 3}]}, "tools[0].parameters")]
    lines += [({"prompt": value, "answer": "b"}, "prompt") for value in (3, None, [], {"role": "user"})]  # type: ignore[var-annotated]
    lines += [({"prompt": turns(), "answer": "b"}, "prompt[1].role")]
    lines += [({"prompt": "a", "answer": value}, "answer") for value in (3, None, [], {"role": "user"})]  # type: ignore[var-annotated]
    lines += [({"prompt": "a", "answer": turns()}, "answer[0].role"), ({"prompt": "a"}, "answer")]
    lines += [({"prompt": "a", "answer": "b", "thoughts": 3}, "thoughts"), ({"answer": "b"}, "prompt")]
    lines += [({"prompt": "a", "response": "b"}, "answer"), ({"conversations": []}, "prompt"), ({}, "prompt")]
    lines += [(GOOD_PAIR, "answer"), ({"text": "a"}, "prompt")]
    return lines


def broken_pairs() -> list[tuple[object, str]]:
    """Returns lines of pairs, each with the field that the error must name."""
    lines: list[tuple[object, str]] = []
    for field in GOOD_PAIR:
        lines += [({**GOOD_PAIR, field: value}, field) for value in (3, None, [], {"x": 1})]  # type: ignore[var-annotated]
        lines += [({name: value for name, value in GOOD_PAIR.items() if name != field}, field)]
    lines += [({**GOOD_PAIR, "margin": value}, "margin") for value in ("x", True, [1], float("nan"), float("inf"))]
    lines += [({**GOOD_PAIR, "chosen": "c"}, "rejected"), (GOOD_CHAT, "chosen"), ({"messages": turns()}, "prompt")]
    return lines


def source_of(path: Path, *, is_pair: bool) -> ChatSource | ChatLines:
    paths = (str(path),)
    if is_pair:
        return ChatLines(kind="preferences", paths=paths, template="v3_1")
    return ChatSource(kind="chat", paths=paths, template="v3_1", too_long="cut")


def test_more_than_100_broken_lines_are_each_refused_in_words(tmp_path: Path) -> None:
    cases = [(*case, False) for case in broken_chats()] + [(*case, True) for case in broken_pairs()]
    assert len(cases) >= 100
    began = time.process_time()
    for number, (line, field, is_pair) in enumerate(cases):
        path = tmp_path / f"{number}.jsonl"
        good = json.dumps(GOOD_PAIR if is_pair else GOOD_CHAT).encode()
        path.write_bytes(good + b"\n\n" + (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")
        with pytest.raises(DataError) as refused:
            check_source(source_of(path, is_pair=is_pair))
        text = str(refused.value)
        assert text.startswith(f"{path}:3: "), f"{line!r}: {text}"
        assert field in text.removeprefix(f"{path}:3: ").split(": must")[0].split(": a ")[0].split(": an ")[0], text
        assert "\n" not in text
        assert "must" in text, text
        assert "; nearest valid: " in text, text
    assert time.process_time() - began < SECONDS


def test_all_forms_are_read() -> None:
    system = ChatMessage(role="system", content="s")
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": "b", "refusal": None},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": "It adds.", "parameters": {"x": "é"}}}]
    read = read_conversation({"messages": messages, "tools": tools, "id": 7}, "here")
    assert read.messages == (
        system,
        user("a"),
        ChatMessage(role="assistant", content="", tool_calls=(ToolCall(name="f", arguments='{"x": 1}'),)),
        ChatMessage(role="tool", content="2"),
        assistant("b"),
    )
    assert read.tools == (ToolDefinition(name="f", description="It adds.", parameters='{"x": "é"}'),)
    assert read.num_context == 0
    answered = Conversation(messages=(user("a"), assistant("b", thoughts="c")), num_context=1)
    assert read_conversation({"prompt": "a", "answer": "b", "thoughts": "c"}, "here") == answered
    long = read_conversation({"prompt": [*messages, {"role": "user", "content": "d"}], "answer": "e"}, "here")
    assert (long.num_context, long.trained_turns) == (6, (6,))
    pair = read_pair({"prompt": messages[:2], "chosen": turns()[1:], "rejected": "c", "margin": 2}, "here")
    assert pair.chosen == Conversation(messages=(system, user("a"), assistant("b")), num_context=2)
    assert pair.rejected.messages[-1] == assistant("c")
    assert pair.margin == 2.0


def test_byte_order_marks_and_whole_surrogate_pairs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a\\ud83d\\ude00 \\\\ud800", "answer": ""}\n')
    documents = list(read_documents(source_of(path, is_pair=False)))
    assert [document.text for document in documents] == ["a\U0001f600 \\ud800"]
    assert documents[0].key == "a.jsonl:1"


def test_folders_are_searched_for_jsonl_alone_and_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"contains no \.jsonl file"):
        check_source(source_of(tmp_path, is_pair=False))
    with pytest.raises(DataError, match=r"a file of chats must end in \.jsonl; nearest: '.*notes\.jsonl'"):
        check_source(source_of(tmp_path / "notes.txt", is_pair=False))
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD_CHAT))
    check_source(source_of(tmp_path, is_pair=False))
