"""Laws of the parser of turns: what a template renders is parsed to the message that it rendered, at any borders."""

import random
from collections.abc import Sequence

import pytest

from data.chat.encode import encode_conversations
from data.chat.messages import ChatMessage, Conversation, ToolCall, user
from data.chat.templates import CHAT_TEMPLATES
from infer.serve.turn import TurnMarks, TurnParser
from tests.infer.serve.servers import TOKENIZER

TURNS = {
    "text": ChatMessage(role="assistant", content="It is sunny.\n\n"),
    "thoughts": ChatMessage(role="assistant", content="Sunny: 你好", thoughts="Let me\n\nthink\n"),
    "call": ChatMessage(
        role="assistant", content="", tool_calls=(ToolCall(name="weather", arguments='{"a": "}\\n"}'),)
    ),
    "calls": ChatMessage(
        role="assistant",
        content="I ask twice.\n",
        tool_calls=tuple(ToolCall(name=name, arguments='{"a": [1]}') for name in ("weather", "time_of_day")),
    ),
    "named": ChatMessage(role="assistant", content="</think> and <｜tool▁calls▁begin｜> are text"),
}


def parse(template: str, parts: Sequence[str], *, thinks: bool) -> ChatMessage:
    """Returns the message of a turn that arrives in parts."""
    parser = TurnParser(marks_of(template), opens_thoughts=thinks, parses_calls=True)
    texts = {"content": "", "thoughts": ""}
    calls: list[list[str]] = []
    for number, part in enumerate(parts, 1):
        for kind, text in parser.push(part, is_last=number == len(parts)):
            if kind == "name":
                calls.append([text, ""])
            elif kind == "arguments":
                calls[-1][1] += text
            else:
                texts[kind] += text
    return ChatMessage(
        role="assistant",
        content=texts["content"],
        thoughts=texts["thoughts"] if thinks else None,
        tool_calls=tuple(ToolCall(name=name, arguments=arguments) for name, arguments in calls),
    )


def marks_of(template: str) -> TurnMarks:
    return TurnMarks(CHAT_TEMPLATES.get(template), TOKENIZER)


def rendered(template: str, message: ChatMessage) -> str:
    conversation = Conversation(messages=(user("hello"), message))
    (chat,) = encode_conversations([conversation], CHAT_TEMPLATES.get(template), TOKENIZER)
    ids = [number for number, is_target in zip(chat.ids, chat.is_target, strict=True) if is_target]
    return marks_of(template).decode(ids[:-1])


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("template", ["v3", "r1", "r1_distill", "v3_1"])
def test_rendered_turns_are_parsed_to_themselves(template: str, turn: str) -> None:
    message = TURNS[turn]
    if message.thoughts is not None and CHAT_TEMPLATES.get(template).thoughts is None:
        pytest.skip("the template has no thoughts")
    text = rendered(template, message)
    draw = random.Random(turn)
    for size in (1, 2, 3, len(text)):
        assert parse(template, chunks(text, [size] * len(text)), thinks=message.thoughts is not None) == message
    for _ in range(20):
        parts = chunks(text, [draw.randint(0, 5) for _ in text] + [len(text)])
        assert parse(template, parts, thinks=message.thoughts is not None) == message


def chunks(text: str, sizes: Sequence[int]) -> list[str]:
    parts = []
    for size in sizes:
        if not text:
            break
        parts.append(text[:size])
        text = text[size:]
    return [*parts, text]


def test_incomplete_calls_are_delivered() -> None:
    text = rendered("v3", TURNS["call"])
    cut = parse("v3", [text[: text.index("{") + 5]], thinks=False)
    assert cut.tool_calls == (ToolCall(name="weather", arguments='{"a":'),)
    assert parse("v3", [text[: text.index("weather") + 3]], thinks=False).content == "wea"


def test_text_that_spells_marks_of_calls_is_content_without_tools() -> None:
    marks = marks_of("v3_1")
    parser = TurnParser(marks, opens_thoughts=False, parses_calls=False)
    text = rendered("v3_1", TURNS["call"])
    ((kind, content),) = parser.push(text, is_last=True)
    assert kind == "content"
    assert content.startswith("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>")
