"""Tests that the exported Jinja templates give transformers the ids that training uses."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers

from data.arithmetic import arithmetic_tokenizer
from data.chat.encode import encode_conversations, encode_prompt, split_views
from data.chat.jinja import CHAT_TEMPLATE_NAME, template_jinja, template_of
from data.chat.messages import ChatMessage, Conversation, user
from data.chat.templates import CHAT_TEMPLATES
from data.tokenizer import Tokenizer
from tests.data.chat.conversations import chat_tokenizer, draw_conversation
from train.checkpoint.preserved import server_files


def export(folder: Path, tokenizer: Tokenizer, name: str) -> Any:
    """Writes what an export has next to its weights, and returns it as transformers reads it."""
    tokenizer.save(folder / "tokenizer.json")
    _, files = server_files(tokenizer, 1024)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    (folder / CHAT_TEMPLATE_NAME).write_text(template_jinja(CHAT_TEMPLATES.get(name)), encoding="utf-8")
    return transformers.AutoTokenizer.from_pretrained(str(folder))


def plain(message: ChatMessage) -> dict[str, Any]:
    """Returns a message as transformers takes it."""
    values: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thoughts is not None:
        values["reasoning_content"] = message.thoughts
    if message.tool_calls:
        calls = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in message.tool_calls]
        values["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return values


def plain_tools(conversation: Conversation) -> list[dict[str, Any]] | None:
    """Returns tools as transformers takes them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": json.loads(tool.parameters),
            },
        }
        for tool in conversation.tools
    ] or None


def draw_plain(rng: random.Random, *, thoughts: bool) -> Conversation:
    """Returns a conversation without special strings, and without white space next to thoughts."""
    drawn = draw_conversation(rng, thoughts=thoughts, may_spell=False)
    messages = [
        ChatMessage(
            role=message.role,
            content=message.content,
            thoughts=None if message.thoughts is None else f"so {message.thoughts}".strip(),
            tool_calls=message.tool_calls,
        )
        for message in drawn.messages
    ]
    return Conversation(messages=tuple(messages), tools=drawn.tools)


@pytest.mark.parametrize("name", ["v3", "r1", "r1_distill", "v3_1"])
def test_transformers_gives_the_ids_of_60_conversations_and_their_prompts(name: str, tmp_path: Path) -> None:
    rng, template, tokenizer = random.Random(f"jinja {name}"), CHAT_TEMPLATES.get(name), chat_tokenizer()
    other = export(tmp_path, tokenizer, name)
    for _ in range(60):
        for view in split_views(draw_plain(rng, thoughts=name != "v3")):
            (chat,) = encode_conversations([view], template, tokenizer)
            messages, tools = [plain(message) for message in view.messages], plain_tools(view)
            read = other.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)
            assert list(read) == chat.ids, other.decode(read)
            for thinking in (None, False) if name == "v3" else (None, False, True):
                prompt = encode_prompt(view.messages[:-1], template, tokenizer, thinking=thinking, tools=view.tools)
                chosen = {} if thinking is None else {"thinking": thinking}
                read = other.apply_chat_template(
                    messages[:-1], tools=tools, add_generation_prompt=True, return_dict=False, **chosen
                )
                assert list(read) == prompt, other.decode(read)


def test_templates_are_recognized_by_their_file(tmp_path: Path) -> None:
    assert template_of(tmp_path) is None
    for name, template in CHAT_TEMPLATES.items():
        (tmp_path / CHAT_TEMPLATE_NAME).write_text(template_jinja(template), encoding="utf-8")
        assert template_of(tmp_path) == name
    (tmp_path / CHAT_TEMPLATE_NAME).write_text("{{ messages }}")
    assert template_of(tmp_path) is None
    (tmp_path / CHAT_TEMPLATE_NAME).write_bytes(b"\xff")
    assert template_of(tmp_path) is None


def test_answers_that_a_server_returns_with_thoughts_are_cut(tmp_path: Path) -> None:
    other = export(tmp_path, chat_tokenizer(), "v3_1")
    messages = [
        {"role": "user", "content": "sort"},
        {"role": "assistant", "content": "so</think>the"},
        {"role": "user", "content": "now"},
    ]
    text = other.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    middle = "<｜User｜>sort<｜Assistant｜></think>the<｜end▁of▁sentence｜><｜User｜>now<｜Assistant｜></think>"
    assert text == f"<｜begin▁of▁sentence｜>{middle}"


def test_arithmetic_prompts_are_read_by_transformers(tmp_path: Path) -> None:
    tokenizer = arithmetic_tokenizer()
    other = export(tmp_path, tokenizer, "v3")
    prompt = encode_prompt([user("31415926=")], CHAT_TEMPLATES.get("v3"), tokenizer)
    messages = [{"role": "user", "content": "31415926="}]
    assert list(other.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)) == prompt
    assert other.decode(prompt, skip_special_tokens=True) == "31415926="
