"""Defines chat templates as tables of tokens and text, and writes them as Jinja. Imports no torch.

A template is data: which tokens begin and end a message of each role. `data.chat.encode` places them as token ids.
`template_jinja` writes the same table for inference servers and `transformers`. For text that spells no special token,
both give the same ids. Only this project's own code places special tokens by id; a server parses them from the rendered
text. Source: the `chat_template` of the released DeepSeek-V3-0324, R1, R1-Distill and V3.1; docs/chats.md lists which
template is which release.
"""

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

from base.registry import Registry
from data.special_tokens import (
    BEGIN_OF_SENTENCE,
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    CHAT_TOKENS,
    END_OF_SENTENCE,
    END_THINK,
    OUTPUT_BEGIN,
    OUTPUT_END,
    OUTPUTS_BEGIN,
    OUTPUTS_END,
    THINK,
    TOOL_SEPARATOR,
)
from data.tokenizer import ASSISTANT, USER

Pieces = tuple[str, ...]
"""Special tokens by name, and text. An item is a token if and only if it equals the name of one."""

TOOLS_HEADING = "## Tools\nYou have access to the following tools:"
_SPECIAL_NAMES = frozenset({BEGIN_OF_SENTENCE, END_OF_SENTENCE, USER, ASSISTANT, *CHAT_TOKENS})


@dataclass(frozen=True, kw_only=True, slots=True)
class ThoughtsForm:
    """How a template writes the assistant's thoughts."""

    begin: Pieces  # pieces of a generation prompt, before the thoughts
    end: Pieces  # pieces between the thoughts and the answer; the assistant writes them


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolForm:
    """How a template writes calls of tools and their outputs; the defaults are those of V3.1."""

    calls_begin: Pieces = (CALLS_BEGIN,)  # before the first call
    call_begin: Pieces = (CALL_BEGIN,)  # before each name
    separator: Pieces = (TOOL_SEPARATOR,)  # between name and arguments
    call_end: Pieces = (CALL_END,)  # after the arguments
    call_joint: Pieces = ()  # between two calls
    calls_end: Pieces = (CALLS_END,)  # after the last call
    outputs_begin: Pieces = ()  # before the first output
    output_begin: Pieces = (OUTPUT_BEGIN,)  # before each output
    output_end: Pieces = (OUTPUT_END,)  # after each output
    output_joint: Pieces = ()  # between two outputs
    outputs_end: Pieces = ()  # after the last output, before the assistant continues


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """A chat template.

    A conversation begins with `begin`, the system messages joined by `system_joint`, and the list of tools. A turn of
    the assistant ends with `end`. The tokenizer's own tokens replace `BEGIN_OF_SENTENCE` and `END_OF_SENTENCE`.
    """

    summary: str  # one-line description for users
    user: Pieces = (USER,)  # before a user's text
    assistant: Pieces  # before the answer of an assistant that does not think
    thoughts: ThoughtsForm | None  # form of thoughts; None: the template has none
    thinks: bool  # whether a generation prompt begins thoughts, if the user does not choose
    tools: ToolForm  # form of calls and outputs of tools
    begin: Pieces = (BEGIN_OF_SENTENCE,)  # before the system messages
    end: Pieces = (END_OF_SENTENCE,)  # after the assistant's answer
    system_joint: str = "\n\n"  # between two system messages
    own_tokens: tuple[str, ...] = ()  # names of special tokens that DeepSeek's templates do not place

    @property
    def special_names(self) -> frozenset[str]:
        """Names that stand for special tokens in pieces."""
        return _SPECIAL_NAMES | frozenset(self.own_tokens)

    @property
    def required_tokens(self) -> tuple[str, ...]:
        """Names of the tokens that every conversation without tools may need, except begin and end."""
        thoughts = () if self.thoughts is None else (*self.thoughts.begin, *self.thoughts.end)
        pieces = (*self.begin, *self.user, *self.assistant, *thoughts, *self.end)
        names = self.special_names - {BEGIN_OF_SENTENCE, END_OF_SENTENCE}
        return tuple(dict.fromkeys(piece for piece in pieces if piece in names))


CHAT_TEMPLATES = Registry[ChatTemplate]("data.template")

_JSON_CALLS = ToolForm(
    call_begin=(CALL_BEGIN, "function", TOOL_SEPARATOR),
    separator=("\n```json\n",),
    call_end=("\n```", CALL_END),
    call_joint=("\n",),
    outputs_begin=(OUTPUTS_BEGIN,),
    output_joint=("\n",),
    outputs_end=(OUTPUTS_END,),
)
CHAT_TEMPLATES.register(
    "v3",
    ChatTemplate(
        summary="DeepSeek-V3 and V3-0324: no thoughts",
        assistant=(ASSISTANT,),
        thoughts=None,
        thinks=False,
        tools=_JSON_CALLS,
    ),
)
_R1 = ChatTemplate(
    summary="DeepSeek-R1 since February 2025: thinks before it answers",
    assistant=(ASSISTANT,),
    thoughts=ThoughtsForm(begin=(ASSISTANT, THINK, "\n"), end=("\n", END_THINK, "\n\n")),
    thinks=True,
    tools=replace(_JSON_CALLS, output_joint=()),
)
CHAT_TEMPLATES.register("r1", _R1)
CHAT_TEMPLATES.register(
    "r1_distill",
    replace(_R1, summary="DeepSeek-R1-Distill: R1 with a line break between two outputs", tools=_JSON_CALLS),
)
CHAT_TEMPLATES.register(
    "v3_1",
    ChatTemplate(
        summary="DeepSeek-V3.1: thinks if it is asked to",
        assistant=(ASSISTANT, END_THINK),
        thoughts=ThoughtsForm(begin=(ASSISTANT, THINK), end=(END_THINK,)),
        thinks=False,
        tools=ToolForm(),
    ),
)


CHAT_TEMPLATE_NAME = "chat_template.jinja"


def template_jinja(template: ChatTemplate) -> str:
    """Returns a template as Jinja.

    Its variables are those of `transformers`: `messages`, `tools`, `add_generation_prompt`, and `thinking` (or
    `enable_thinking`), which chooses the generation prompt. As in released templates, only the last message shows its
    thoughts (`reasoning_content`), and an answer's text up to the end of its thoughts is cut.
    """
    thoughts = template.thoughts or ThoughtsForm(begin=(), end=())
    pieces = {field.name: getattr(template.tools, field.name) for field in fields(template.tools)}
    pieces |= {name: getattr(template, name) for name in ("begin", "user", "assistant", "end")}
    pieces |= {"thoughts_begin": thoughts.begin, "thoughts_end": thoughts.end}
    values = {
        "THINKS": json.dumps(template.thinks),
        "TOOLS_HEADING": json.dumps(TOOLS_HEADING),
        "SYSTEM_JOINT": json.dumps(template.system_joint),
        "HAS_THOUGHTS": json.dumps(template.thoughts is not None),
        "END_THINK": json.dumps(END_THINK),
        **{name.upper(): _literal(value) for name, value in pieces.items()},
    }
    # Names in capitals are replaced by values of the table.
    text = Path(__file__).with_name("template.jinja").read_text(encoding="utf-8")
    return re.sub(r"\b[A-Z_]{3,}\b", lambda match: values[match[0]], text)


def template_of(folder: Path) -> str | None:
    """Returns the name of the template that this project wrote next to weights; None if there is none."""
    path = folder / CHAT_TEMPLATE_NAME
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError):
        return None
    return next((name for name, template in CHAT_TEMPLATES.items() if template_jinja(template) == text), None)


def _literal(pieces: Pieces) -> str:
    names = {BEGIN_OF_SENTENCE: "(bos_token or '')", END_OF_SENTENCE: "eos_token"}
    return " + ".join(names.get(piece) or json.dumps(piece, ensure_ascii=False) for piece in pieces) or "''"
