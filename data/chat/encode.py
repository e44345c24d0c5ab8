"""Encodes conversations as token ids by a template. Imports no torch.

Special tokens are placed by id, and text is encoded by itself. So text that spells a special token stays text.
"""

# Shape legend: T tokens.

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from data.chat.messages import ChatMessage, Conversation, ToolDefinition, check_order, check_role
from data.chat.templates import CHAT_TEMPLATES, TOOLS_HEADING, ChatTemplate, Pieces
from data.corpus import DataError
from data.pack import MARGIN, PAIR, SCORE, WEIGHTS
from data.registry import SamplePiece, TrainingSample
from data.special_tokens import BEGIN_OF_SENTENCE, END_OF_SENTENCE
from data.tokenizer import Tokenizer

_BATCH_SAMPLES = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A special token, or text that is encoded as a whole; `is_target` if the assistant writes it."""

    text: str
    is_special: bool
    is_target: bool


@dataclass(slots=True)
class _Parts:
    """Parts of a conversation. Adjacent text is joined, except where the assistant begins to write."""

    special_names: frozenset[str]
    parts: list[_Part] = field(default_factory=list)

    def add(self, *items: Pieces | str, is_target: bool = False) -> None:
        """Appends pieces of a template, and text, which never contains special tokens."""
        for item in items:
            for piece in (item,) if isinstance(item, str) else item:
                is_special = item is not piece and piece in self.special_names
                last = self.parts[-1] if self.parts else None
                is_joined = last is not None and not (last.is_special or is_special) and last.is_target == is_target
                before = self.parts.pop().text if is_joined else ""
                if before or piece:
                    self.parts.append(_Part(text=before + piece, is_special=is_special, is_target=is_target))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncodedChat:
    """Token ids of a conversation."""

    ids: list[int]  # [T]
    is_target: list[bool]  # whether the assistant writes the token, [T]

    def piece(self) -> SamplePiece:
        """Returns the tokens with the weights of their predictions of the next token; the last one is 0."""
        weights = np.asarray([*self.is_target[1:], False], dtype=np.float32)
        return SamplePiece(tokens=np.asarray(self.ids, dtype=np.int32), values={WEIGHTS: weights})


def split_views(conversation: Conversation) -> tuple[Conversation, ...]:
    """Returns conversations of which each shows the thoughts of its last message alone.

    A template removes the thoughts of earlier turns. A turn is trained with its thoughts as the last turn of a
    conversation that ends there. So every turn is trained in exactly one of the returned conversations, as the model
    will write it.
    """
    turns = conversation.trained_turns
    ends = [turn for turn in turns if conversation.messages[turn].thoughts is not None or turn == turns[-1]]
    starts = [conversation.num_context, *(end + 1 for end in ends[:-1])]
    return tuple(
        Conversation(messages=conversation.messages[: end + 1], tools=conversation.tools, num_context=start)
        for start, end in zip(starts, ends, strict=True)
    )


def encode_conversations(
    conversations: Sequence[Conversation], template: ChatTemplate, tokenizer: Tokenizer
) -> list[EncodedChat]:
    """Encodes conversations for training. Only the last message shows its thoughts; see `split_views`."""
    return _encode([_conversation_parts(conversation, template) for conversation in conversations], tokenizer)


def encode_prompt(
    messages: Sequence[ChatMessage],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    *,
    thinking: bool | None = None,
    tools: Sequence[ToolDefinition] = (),
) -> list[int]:
    """Returns the token ids after which the assistant answers; `thinking`: None follows the template."""
    check_order(messages)
    if not messages:
        raise DataError("messages: must have at least one message, is []; nearest: a message of the user")
    check_role(messages, -1, "messages", "last message of a prompt", ("user", "tool"))
    return encode_any_prompt(messages, template, tokenizer, thinking=thinking, tools=tools)


def encode_any_prompt(
    messages: Sequence[ChatMessage],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    *,
    thinking: bool | None = None,
    tools: Sequence[ToolDefinition] = (),
    continues: bool = False,
) -> list[int]:
    """Returns the token ids of messages in any order, as the template in Jinja writes them.

    `continues` leaves the last message, which is the assistant's, open for more text.
    """
    parts = _message_parts(messages, frozenset(), template, tools)
    if continues:
        check_role(messages, -1, "messages", "last message, which is continued,", ("assistant",))
        del parts.parts[-len(template.end) :]
    else:
        parts.add(_turn_begin(messages[-1], template, thinking=template.thinks if thinking is None else thinking))
    return _encode([parts], tokenizer)[0].ids


def check_tokens(names: Sequence[str], template_name: str, tokenizer: Tokenizer, key: str = "data.template") -> None:
    """Rejects a tokenizer that lacks tokens of a template: DataError names the first missing one."""
    placed = set(tokenizer.placed_names.values())
    missing = [name for name in names if name not in placed]
    if missing:
        raise DataError(
            f"{key}: {template_name} places the token {missing[0]!r}, which must be a special token of the tokenizer, "
            f"is not; nearest valid: a template without it, or a tokenizer released for chats or trained on them"
        )


def check_template(name: str, tokenizer: Tokenizer | None) -> None:
    """Rejects a tokenizer, if there is one, that lacks tokens which every conversation may need."""
    if tokenizer is not None:
        check_tokens(CHAT_TEMPLATES.get(name).required_tokens, name, tokenizer)


def special_names(conversation: Conversation, template: ChatTemplate) -> tuple[str, ...]:
    """Returns the names of the special tokens of a conversation, except begin and end."""
    placed = [part.text for part in _conversation_parts(conversation, template).parts if part.is_special]
    return tuple(dict.fromkeys(name for name in placed if name not in (BEGIN_OF_SENTENCE, END_OF_SENTENCE)))


def _conversation_parts(conversation: Conversation, template: ChatTemplate) -> _Parts:
    targets = frozenset(conversation.trained_turns)
    return _message_parts(conversation.messages, targets, template, conversation.tools)


def _message_parts(
    messages: Sequence[ChatMessage], targets: frozenset[int], template: ChatTemplate, tools: Sequence[ToolDefinition]
) -> _Parts:
    """Returns the parts of messages in order; targets are the numbers of trained turns."""
    parts = _Parts(special_names=template.special_names)
    form = template.tools
    system = [message.content for message in messages if message.role == "system"]
    system += [TOOLS_HEADING] if tools else []
    system += [f"### {tool.name}\nDescription: {tool.description}\n\nParameters: {tool.parameters}" for tool in tools]
    parts.add(template.begin, template.system_joint.join(system))
    before: ChatMessage | None = None
    for number, message in enumerate(messages):
        match message.role:
            case "user":
                parts.add(template.user, message.content)
            case "tool":
                is_first = before is None or before.role != "tool"
                parts.add(form.outputs_begin if is_first else form.output_joint)
                parts.add(form.output_begin, message.content, form.output_end)
            case "assistant":
                shows_thoughts = message.thoughts is not None and number == len(messages) - 1
                if shows_thoughts and before is not None and before.role == "tool":
                    rule = "must be absent after a tool's output, where no template has them"
                    raise DataError(f"messages[{number}].thoughts: {rule}; nearest: thoughts before the tool_calls")
                parts.add(_turn_begin(before, template, thinking=shows_thoughts))
                turn = _turn(message, template, shows_thoughts=shows_thoughts)
                parts.add(*turn, is_target=number in targets)
        before = message
    return parts


def _turn_begin(before: ChatMessage | None, template: ChatTemplate, *, thinking: bool) -> Pieces:
    """Returns what precedes the assistant's turn after a tool's output or any other message."""
    if before is not None and before.role == "tool":
        # After outputs of tools, the assistant continues its turn without a header.
        return template.tools.outputs_end
    if not thinking:
        return template.assistant
    if template.thoughts is None:
        rule = "must be absent with a template that has none"
        raise DataError(f"thoughts: {rule}; nearest valid: data.template=r1, r1_distill or v3_1")
    return template.thoughts.begin


def _turn(message: ChatMessage, template: ChatTemplate, *, shows_thoughts: bool) -> Iterator[Pieces | str]:
    """Yields what the assistant writes."""
    form = template.tools
    if shows_thoughts and template.thoughts is not None:
        yield from (message.thoughts or "", template.thoughts.end)
    yield message.content
    for number, call in enumerate(message.tool_calls):
        yield form.call_joint if number else form.calls_begin
        yield from (form.call_begin, call.name, form.separator, call.arguments, form.call_end)
    if message.tool_calls:
        yield form.calls_end
    yield template.end


def _encode(conversations: Sequence[_Parts], tokenizer: Tokenizer) -> list[EncodedChat]:
    """Encodes parts. All text is encoded in one call, which uses the machine's cores."""
    begin = tokenizer.special.bos
    placed: dict[str, list[int]] = {
        BEGIN_OF_SENTENCE: [] if begin is None else [begin],
        END_OF_SENTENCE: [tokenizer.special.eos],
    }
    strings = [part.text for conversation in conversations for part in conversation.parts if not part.is_special]
    encoded = iter(tokenizer.encode_batch(strings))
    chats = []
    for conversation in conversations:
        ids: list[int] = []
        is_target: list[bool] = []
        for part in conversation.parts:
            if part.is_special and part.text not in placed:
                placed[part.text] = [tokenizer.special_id(part.text)]
            tokens = placed[part.text] if part.is_special else next(encoded)
            ids.extend(tokens)
            is_target.extend([part.is_target] * len(tokens))
        chats.append(EncodedChat(ids=ids, is_target=is_target))
    return chats


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatSample:
    """Conversations of a line: views of a chat, or a pair of answers, the preferred one first."""

    key: str  # equal on every machine
    views: tuple[Conversation, ...]
    margin: float | None = None  # how much better the preferred answer is; None: the views are no pair


def encode_samples(
    samples: Iterator[ChatSample], template: ChatTemplate, tokenizer: Tokenizer, *, may_be_cut: bool = False
) -> Iterator[TrainingSample]:
    """Yields the training samples of chats, which are encoded many at a time.

    Answers of a pair are found by position, because an end of sentence may also be part of a prompt.
    """
    while batch := list(islice(samples, _BATCH_SAMPLES)):
        views = [view for sample in batch for view in sample.views]
        chats = iter(encode_conversations(views, template, tokenizer))
        for sample in batch:
            encoded = list(islice(chats, len(sample.views)))
            if sample.margin is None:
                for chat in encoded:
                    yield TrainingSample(key=sample.key, pieces=(chat.piece(),), may_be_cut=may_be_cut)
            else:
                pieces = (_piece(encoded[0], 1, sample.margin), _piece(encoded[1], -1, 0.0))
                yield TrainingSample(key=sample.key, pieces=pieces, may_be_cut=False)


def _piece(chat: EncodedChat, number: int, margin: float) -> SamplePiece:
    piece = chat.piece()
    is_last = np.arange(len(chat.ids)) == len(chat.ids) - 1
    values = {
        **piece.values,
        PAIR: np.where(piece.values[WEIGHTS] != 0, number, 0).astype(np.int16),
        SCORE: np.where(is_last, number, 0).astype(np.int16),
        MARGIN: np.where(is_last, margin, 0).astype(np.float32),
    }
    return replace(piece, values=values)
