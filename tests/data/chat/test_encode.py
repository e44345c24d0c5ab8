"""Conversations are encoded as templates say, and exported Jinja templates give transformers the same ids."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import transformers

from data.arithmetic import arithmetic_tokenizer
from data.chat.encode import check_tokens, encode_conversations, encode_prompt, split_views
from data.chat.messages import ChatMessage, Conversation, ToolCall, assistant, user
from data.chat.templates import CHAT_TEMPLATE_NAME, CHAT_TEMPLATES, ChatTemplate, template_jinja, template_of
from data.corpus import DataError
from data.pack import WEIGHTS
from data.special_tokens import CHAT_TOKENS, END_OF_SENTENCE
from data.tokenizer import ASSISTANT, SPECIAL_TOKENS, USER, Tokenizer
from tests.data.chat.conversations import SPELLED, chat_tokenizer, draw_conversation, draw_text, expected
from tests.data.released_tokenizer import edit
from train.checkpoint.preserved import server_files

NAMES = ("v3", "r1", "r1_distill", "v3_1")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chat_tokenizer()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_targets_are_exactly_the_assistants_tokens_of_200_conversations(name: str, tokenizer: Tokenizer) -> None:
    rng = random.Random(name)
    drawn = [draw_conversation(rng, thoughts=name != "v3") for _ in range(200)]
    views = [view for conversation in drawn for view in split_views(conversation)]
    encoded = encode_conversations(views, CHAT_TEMPLATES.get(name), tokenizer)
    for number, (view, chat) in enumerate(zip(views, encoded, strict=True)):
        right = expected(name, view, tokenizer)
        assert chat.ids == right.ids, f"view {number}: {tokenizer.decode(chat.ids)!r}"
        assert chat.is_target == right.is_target, f"view {number}"
        assert chat.piece().values[WEIGHTS].tolist() == [*map(float, right.is_target[1:]), 0.0]


def test_ids_of_one_conversation_are_those_written_by_hand(tokenizer: Tokenizer) -> None:
    conversation = Conversation(messages=(user("sort"), assistant("the", thoughts="of"), user("now"), assistant("")))
    ids = {token: tokenizer.special_id(token) for token in SPELLED}
    sort, the, now = (tokenizer.encode(word) for word in ("sort", "the", "now"))
    newline, two = tokenizer.encode("\n"), tokenizer.encode("\n\n")
    views = split_views(conversation)
    first, second = encode_conversations(views, CHAT_TEMPLATES.get("r1"), tokenizer)
    context = [0, ids[USER], *sort, ids[ASSISTANT]]
    thoughts = [*tokenizer.encode("of\n"), ids["</think>"], *two, *the, 1]
    assert first.ids == [*context, ids["<think>"], *newline, *thoughts]
    assert first.is_target == [False] * (len(first.ids) - len(thoughts)) + [True] * len(thoughts)
    # The second view trains the second turn alone, after the first one without its thoughts.
    assert second.ids == [*context, *the, 1, ids[USER], *now, ids[ASSISTANT], 1]
    assert second.is_target == [False] * (len(second.ids) - 1) + [True]


def test_every_turn_is_trained_in_exactly_one_view_with_its_thoughts_shown() -> None:
    rng = random.Random(5)
    for _ in range(200):
        conversation = draw_conversation(rng, thoughts=True)
        views = split_views(conversation)
        trained = [turn for view in views for turn in view.trained_turns]
        assert trained == list(conversation.trained_turns)
        for view in views:
            assert view.messages == conversation.messages[: len(view.messages)]
            assert all(view.messages[turn].thoughts is None for turn in view.trained_turns[:-1])


@pytest.mark.parametrize("name", NAMES)
def test_prompt_is_what_precedes_the_answer_in_training(name: str, tokenizer: Tokenizer) -> None:
    rng, template = random.Random(f"prompt {name}"), CHAT_TEMPLATES.get(name)
    for _ in range(60):
        for view in split_views(draw_conversation(rng, thoughts=name != "v3")):
            chat = encode_conversations([view], template, tokenizer)[0]
            *before, last = view.messages
            thinking = last.thoughts is not None
            prompt = encode_prompt(before, template, tokenizer, thinking=thinking, tools=view.tools)
            assert chat.ids[: len(prompt)] == prompt
            assert all(chat.is_target[len(prompt) :])
            assert not chat.is_target[len(prompt) - 1]


def test_prompts_think_as_the_template_or_the_user_says(tokenizer: Tokenizer) -> None:
    def end(name: str, thinking: bool | None) -> str:
        ids = encode_prompt([user("sort")], CHAT_TEMPLATES.get(name), tokenizer, thinking=thinking)
        return tokenizer.decode(ids).partition("sort")[2]

    assert [end("v3", None), end("v3", False)] == ["<｜Assistant｜>"] * 2
    assert [end("r1", None), end("r1", True), end("r1", False)] == [
        *["<｜Assistant｜><think>\n"] * 2,
        "<｜Assistant｜>",
    ]
    assert [end("v3_1", None), end("v3_1", False)] == ["<｜Assistant｜></think>"] * 2
    assert end("v3_1", True) == "<｜Assistant｜><think>"
    with pytest.raises(DataError, match=r"nearest valid: data\.template=r1, r1_distill or v3_1"):
        end("v3", True)


def test_text_that_spells_special_tokens_stays_text_in_200_conversations(tokenizer: Tokenizer) -> None:
    rng = random.Random(7)
    special = {tokenizer.special_id(token) for token in (*SPECIAL_TOKENS, *CHAT_TOKENS)}
    for _ in range(200):
        content = "".join(rng.choice([draw_text(rng), rng.choice(SPELLED)]) for _ in range(3))
        system, answer = draw_text(rng), draw_text(rng)
        messages = (ChatMessage(role="system", content=system), user(content), assistant(answer))
        chat = encode_conversations([Conversation(messages=messages)], CHAT_TEMPLATES.get("v3"), tokenizer)[0]
        placed = [number for number in chat.ids if number in special]
        assert placed == [0, tokenizer.special_id(USER), tokenizer.special_id(ASSISTANT), 1]
        starts = [chat.ids.index(number) for number in placed]
        for (left, right), text in zip(pairwise(starts), (system, content, answer), strict=True):
            assert tokenizer.decode(chat.ids[left + 1 : right]) == text


def test_released_tokenizers_declare_chat_tokens_as_ordinary_and_text_does_not_become_them(tmp_path: Path) -> None:
    chat_tokenizer().save(tmp_path / "tokenizer.json")

    def change(values: dict[str, Any]) -> None:
        for token in values["added_tokens"]:
            token["special"] = token["content"] not in CHAT_TOKENS

    edit(tmp_path / "tokenizer.json", change)
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    for token in CHAT_TOKENS:
        assert loaded.special_id(token) not in loaded.encode(f"a {token} b")
        assert loaded.decode(loaded.encode(f"a {token} b")) == f"a {token} b"


def test_a_template_of_a_plugin_places_its_own_tokens() -> None:
    start, end = "<|im_start|>", "<|im_end|>"
    template = ChatTemplate(
        summary="ChatML",
        begin=(),
        user=(start, "user\n"),
        assistant=(end, "\n", start, "assistant\n"),
        end=(end, END_OF_SENTENCE),
        thoughts=None,
        thinks=False,
        tools=CHAT_TEMPLATES.get("v3").tools,
        own_tokens=(start, end),
    )
    tokenizer = Tokenizer.train(["sort"], 300, (start, end))
    conversation = Conversation(messages=(user(f"sort {end}"), assistant("the")))
    (chat,) = encode_conversations([conversation], template, tokenizer)
    ids = {token: tokenizer.special_id(token) for token in (start, end)}
    assert tokenizer.decode(chat.ids) == (f"{start}user\nsort {end}{end}\n{start}assistant\nthe{end}{END_OF_SENTENCE}")
    assert [number for number in chat.ids if number in ids.values()] == [ids[start], ids[end], ids[start], ids[end]]
    assert [number for number, target in zip(chat.ids, chat.is_target, strict=True) if target][-2:] == [ids[end], 1]
    assert template.required_tokens == (start, end)
    check_tokens(template.required_tokens, "chatml", tokenizer)
    with pytest.raises(DataError, match=r"data\.template: chatml places the token '<\|im_start\|>'"):
        check_tokens(template.required_tokens, "chatml", chat_tokenizer())


def test_tokens_that_the_tokenizer_lacks_are_named() -> None:
    plain = Tokenizer.train(["sort"], 300)
    call = ChatMessage(role="assistant", content="", tool_calls=(ToolCall(name="a", arguments="{}"),))
    for name, messages, token in (
        ("r1", (user("sort"), assistant("a", thoughts="b")), "<think>"),
        ("v3", (user("sort"), call), "<｜tool▁calls▁begin｜>"),
    ):
        with pytest.raises(DataError, match=f"special token '{token}' must be in the vocabulary"):
            encode_conversations([Conversation(messages=messages)], CHAT_TEMPLATES.get(name), plain)


@pytest.mark.parametrize(
    ("messages", "rule"),
    [
        ((), "messages: must have at least one message"),
        ((user("a"), assistant("b")), "the last message of a prompt must be a user's or a tool's, is 'assistant'"),
        ((assistant("b"),), "an assistant's message must follow a user's or a tool's, is 'assistant' after 'nothing'"),
        ((user("a"), ChatMessage(role="system", content="b")), "a system message must be before all others"),
    ],
)
def test_prompts_out_of_order_are_rejected(messages: tuple[ChatMessage, ...], rule: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError) as refused:
        encode_prompt(messages, CHAT_TEMPLATES.get("v3"), tokenizer)
    assert rule in str(refused.value)


def export(folder: Path, tokenizer: Tokenizer, name: str) -> Any:
    """Writes what an export has next to its weights, and returns it as transformers reads it."""
    tokenizer.save(folder / "tokenizer.json")
    _, files = server_files(tokenizer, 1024)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    (folder / CHAT_TEMPLATE_NAME).write_text(template_jinja(CHAT_TEMPLATES.get(name)), encoding="utf-8")
    return transformers.AutoTokenizer.from_pretrained(str(folder))


def plain(message: ChatMessage) -> dict[str, Any]:
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
            "function": {"name": tool.name, "description": tool.description, "parameters": json.loads(tool.parameters)},
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


@pytest.mark.slow
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
