"""Tests that chats are read from their common forms, and that broken lines are refused by file, line and field."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from data.chat.messages import ChatMessage, Conversation, ToolCall, ToolDefinition, assistant, user
from data.chat.records import read_conversation, read_pair
from data.chat.sources import ChatSource, PreferencesSource
from data.corpus import DataError, check_source, read_documents

GOOD_CHAT = {"prompt": "a", "answer": "b"}
GOOD_PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
WRONG_STRINGS: tuple[Any, ...] = (3, True, ["x"], {"x": 1})
WRONG_LISTS: tuple[Any, ...] = (3, "x", {"role": "user"}, [])
SECONDS = 3.0


def turns(**changes: Any) -> list[dict[str, Any]]:
    """Returns messages of a user and an assistant; changes apply to the latter."""
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **changes}]


def call(**changes: Any) -> dict[str, Any]:
    """Returns an object with a call of a tool."""
    return {
        "messages": turns(tool_calls=[{"type": "function", "function": {"name": "f", "arguments": "{}", **changes}}])
    }


def broken_chats() -> list[tuple[object, str]]:
    """Returns lines of chats, each with the field that the error must name."""
    lines: list[tuple[object, str]] = [
        (value, "") for value in (b"{", b"[1", b'{"a": }', b"\xff\xfe", b"3", b'"x"', b"[]")
    ]
    lines += [({"messages": value}, "messages") for value in WRONG_LISTS]
    lines += [({"messages": [value]}, "messages[0]") for value in (3, "x", [], None)]
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
    lines += [({"messages": turns(), "tools": value}, "tools") for value in (3, "x", {"name": "f"}, [3], [{}])]
    lines += [({"messages": turns(), "tools": [{"name": "f", "parameters": 3}]}, "tools[0].parameters")]
    lines += [({"prompt": value, "answer": "b"}, "prompt") for value in (3, None, [], {"role": "user"})]
    lines += [({"prompt": turns(), "answer": "b"}, "prompt[1].role")]
    lines += [({"prompt": "a", "answer": value}, "answer") for value in (3, None, [], {"role": "user"})]
    lines += [({"prompt": "a", "answer": turns()}, "answer[0].role"), ({"prompt": "a"}, "answer")]
    lines += [({"prompt": "a", "answer": "b", "thoughts": 3}, "thoughts"), ({"answer": "b"}, "prompt")]
    lines += [({"prompt": "a", "response": "b"}, "answer"), ({"conversations": []}, "prompt"), ({}, "prompt")]
    lines += [(GOOD_PAIR, "answer"), ({"text": "a"}, "prompt")]
    return lines


def broken_pairs() -> list[tuple[object, str]]:
    """Returns lines of pairs, each with the field that the error must name."""
    lines: list[tuple[object, str]] = []
    for field in GOOD_PAIR:
        lines += [({**GOOD_PAIR, field: value}, field) for value in (3, None, [], {"x": 1})]
        lines += [({name: value for name, value in GOOD_PAIR.items() if name != field}, field)]
    lines += [({**GOOD_PAIR, "margin": value}, "margin") for value in ("x", True, [1], float("nan"), float("inf"))]
    lines += [({**GOOD_PAIR, "chosen": "c"}, "rejected"), (GOOD_CHAT, "chosen"), ({"messages": turns()}, "prompt")]
    return lines


def source_of(path: Path, *, is_pair: bool) -> ChatSource | PreferencesSource:
    """Returns a source with one file."""
    paths = (str(path),)
    if is_pair:
        return PreferencesSource(kind="preferences", paths=paths, template="v3_1")
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
        assert "; nearest: " in text, text
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
