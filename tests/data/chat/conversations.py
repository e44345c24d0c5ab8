"""Draws conversations, and renders them by an oracle that is written without the tables of `data.chat`.

The oracle writes each template out as text with marks, one line after the other, as a reader of the released templates
would do by hand.
"""

import random
import re
from dataclasses import dataclass

from data.chat.messages import ChatMessage, Conversation, ToolCall, ToolDefinition
from data.special_tokens import CHAT_TOKENS
from data.tokenizer import SPECIAL_TOKENS, Tokenizer

WORDS = ["sort", "the", "digits", "of", "3141", "数字", "é\n\n", "now", "", "{x}", "</s>", "please?"]
SPELLED = (*SPECIAL_TOKENS, *CHAT_TOKENS)

# Marks of the oracle: a special token is SPECIAL name END; the assistant's tokens are between BEGIN and END_OF_TARGET.
SPECIAL, END, BEGIN, END_OF_TARGET = "\ue000", "\ue001", "\ue002", "\ue003"


def chat_tokenizer() -> Tokenizer:
    """Returns a small tokenizer with all special tokens."""
    return Tokenizer.train([" ".join(WORDS)] * 3, 320, CHAT_TOKENS)


def draw_text(rng: random.Random, *, may_spell: bool = True) -> str:
    """Returns text that may be empty and may spell special tokens."""
    words = [rng.choice(WORDS) for _ in range(rng.randrange(5))]
    if may_spell and rng.random() < 0.6:
        words.insert(rng.randrange(len(words) + 1), rng.choice(SPELLED))
    return " ".join(words)


def draw_conversation(rng: random.Random, *, thoughts: bool, may_spell: bool = True) -> Conversation:
    """Returns a conversation with system texts, several turns, tools, empty answers and thoughts."""

    def text() -> str:
        return draw_text(rng, may_spell=may_spell)

    messages = [ChatMessage(role="system", content=text()) for _ in range(rng.choice([0, 0, 1, 2]))]
    for _ in range(rng.randrange(1, 4)):
        messages += [ChatMessage(role="user", content=text()) for _ in range(rng.choice([1, 1, 2]))]
        can_think = True
        for _ in range(rng.choice([0, 0, 1, 2])):
            calls = tuple(ToolCall(name=f"tool{n}", arguments=f'{{"x": {n}}}') for n in range(rng.choice([1, 2])))
            thinks = thoughts and can_think and rng.random() < 0.5
            thought = text() if thinks else None
            messages.append(ChatMessage(role="assistant", content=text(), thoughts=thought, tool_calls=calls))
            messages += [ChatMessage(role="tool", content=text()) for _ in calls]
            can_think = False
        thought = text() if thoughts and can_think and rng.random() < 0.6 else None
        messages.append(ChatMessage(role="assistant", content=text(), thoughts=thought))
    tools = (ToolDefinition(name="tool0", description="It adds.", parameters='{"x": 1}'),) if rng.random() < 0.3 else ()
    return Conversation(messages=tuple(messages), tools=tools)


@dataclass(frozen=True)
class Expected:
    """Ids and targets by the oracle."""

    ids: list[int]
    is_target: list[bool]


def _s(name: str) -> str:
    return f"{SPECIAL}{name}{END}"


def _calls_v3(message: ChatMessage) -> str:
    text = _s("<｜tool▁calls▁begin｜>")
    for number, call in enumerate(message.tool_calls):
        text += "\n" if number > 0 else ""
        text += _s("<｜tool▁call▁begin｜>") + "function" + _s("<｜tool▁sep｜>")
        text += f"{call.name}\n```json\n{call.arguments}\n```" + _s("<｜tool▁call▁end｜>")
    return text + _s("<｜tool▁calls▁end｜>")


def _calls_v3_1(message: ChatMessage) -> str:
    text = _s("<｜tool▁calls▁begin｜>")
    for call in message.tool_calls:
        text += (
            _s("<｜tool▁call▁begin｜>") + call.name + _s("<｜tool▁sep｜>") + call.arguments + _s("<｜tool▁call▁end｜>")
        )
    return text + _s("<｜tool▁calls▁end｜>")


def _outputs(name: str, messages: list[ChatMessage]) -> str:
    outputs = [_s("<｜tool▁output▁begin｜>") + m.content + _s("<｜tool▁output▁end｜>") for m in messages]
    if name == "v3_1":
        return "".join(outputs)
    joint = "" if name == "r1" else "\n"
    return _s("<｜tool▁outputs▁begin｜>") + joint.join(outputs) + _s("<｜tool▁outputs▁end｜>")


def _marked(name: str, conversation: Conversation) -> str:
    messages, first_trained = list(conversation.messages), conversation.num_context
    system = [m.content for m in messages if m.role == "system"]
    if conversation.tools:
        system.append("## Tools\nYou have access to the following tools:")
        system += [
            f"### {t.name}\nDescription: {t.description}\n\nParameters: {t.parameters}" for t in conversation.tools
        ]
    text = _s("<｜begin▁of▁sentence｜>") + "\n\n".join(system)
    outputs: list[ChatMessage] = []
    for number, message in enumerate(messages):
        if message.role == "user":
            text += _s("<｜User｜>") + message.content
        if message.role == "tool":
            outputs.append(message)
        if message.role != "assistant":
            continue
        has_thoughts = message.thoughts is not None and number == len(messages) - 1
        if outputs:
            text += _outputs(name, outputs)
            outputs = []
        elif name.startswith("r1") and has_thoughts:
            text += _s("<｜Assistant｜>") + _s("<think>") + "\n"
        elif name == "v3_1":
            text += _s("<｜Assistant｜>") + _s("<think>" if has_thoughts else "</think>")
        else:
            text += _s("<｜Assistant｜>")
        written = ""
        if has_thoughts:
            newline = "\n" if name.startswith("r1") else ""
            written += f"{message.thoughts}{newline}" + _s("</think>") + newline + newline
        written += message.content
        if message.tool_calls:
            written += _calls_v3_1(message) if name == "v3_1" else _calls_v3(message)
        written += _s("<｜end▁of▁sentence｜>")
        text += f"{BEGIN}{written}{END_OF_TARGET}" if number >= first_trained else written
    return text


def expected(name: str, conversation: Conversation, tokenizer: Tokenizer) -> Expected:
    """Returns what the conversation must be encoded as under the template `name`."""
    ids: list[int] = []
    is_target: list[bool] = []
    inside = False
    for item in re.split(f"({SPECIAL}[^{END}]*{END}|{BEGIN}|{END_OF_TARGET})", _marked(name, conversation)):
        if item in (BEGIN, END_OF_TARGET):
            inside = item == BEGIN
            continue
        tokens = [tokenizer.special_id(item[1:-1])] if item.startswith(SPECIAL) else tokenizer.encode(item)
        ids += tokens
        is_target += [inside] * len(tokens)
    return Expected(ids=ids, is_target=is_target)
