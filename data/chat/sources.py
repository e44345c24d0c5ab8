"""Registers sources of chats and of pairs of answers, read from `.jsonl` files. Imports no torch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Literal, TypeVar

from data.chat.encode import check_tokens, encode_conversations, pair_sample, special_names, split_views
from data.chat.messages import AnswerPair, Conversation, read_conversation, read_pair
from data.chat.templates import CHAT_TEMPLATES, ChatTemplate
from data.corpus import DataError
from data.pack import PAIR_VALUES, WEIGHTS
from data.registry import DATA_SOURCES, CorpusFile, DataSource, DataSourceEntry, Document, TrainingSample
from data.sources import CHECKED_BYTES, JsonRecord, check_source, list_jsonl, read_json_lines
from data.special_tokens import CHAT_TOKENS
from data.tokenizer import Tokenizer

T = TypeVar("T", Conversation, AnswerPair)
ENCODE_BATCH_RECORDS = 1024
CONVERSATION_EXAMPLE = '{"prompt": "...", "answer": "..."}'


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatSource(DataSource):
    """Conversations in `.jsonl` files, of which every turn of the assistant is trained."""

    paths: tuple[str, ...]  # files, and folders that are searched for them
    template: Annotated[str, CHAT_TEMPLATES]  # name of the chat template
    # whether a conversation that is longer than a sequence is cut at its end or dropped.
    too_long: Literal["cut", "drop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferencesSource(DataSource):
    """Pairs of answers in `.jsonl` files. A pair that is longer than a sequence is dropped."""

    paths: tuple[str, ...]  # files, and folders that are searched for them
    template: Annotated[str, CHAT_TEMPLATES]  # name of the chat template


def _list_chats(source: ChatSource | PreferencesSource) -> tuple[CorpusFile, ...]:
    return list_jsonl(source.paths, "chats", CONVERSATION_EXAMPLE)


def _check(
    source: DataSource, template_name: str, tokenizer: Tokenizer | None, names: Callable[[], Iterator[str]]
) -> None:
    """Rejects a source that cannot be read, or a tokenizer that lacks tokens of the template."""
    check_source(source)
    if tokenizer is None:
        return
    check_tokens(CHAT_TEMPLATES.get(template_name).required_tokens, template_name, tokenizer)
    if not all(tokenizer.has_token(name) for name in CHAT_TOKENS):
        # Only chats with tools need the other tokens.
        check_tokens(tuple(dict.fromkeys(names())), template_name, tokenizer)


def _batches(records: Iterator[JsonRecord[T]]) -> Iterator[list[JsonRecord[T]]]:
    while batch := list(islice(records, ENCODE_BATCH_RECORDS)):
        yield batch


def _checked_views(record: JsonRecord[T], conversations: Sequence[Conversation], template: ChatTemplate) -> None:
    """Rejects conversations that the template cannot write; the error names the line."""
    for conversation in conversations:
        try:
            special_names(conversation, template)
        except DataError as error:
            raise DataError(f"{record.place}: {error}") from error


def _text(conversations: Sequence[Conversation]) -> str:
    """Returns the text of conversations, from which a tokenizer can be trained."""
    messages = [message for conversation in conversations for message in conversation.messages]
    parts = [part for message in messages for part in (message.thoughts, message.content) if part]
    calls = [f"{call.name}\n{call.arguments}" for message in messages for call in message.tool_calls]
    return "\n".join([*parts, *calls])


def _chat_records(source: ChatSource, file: CorpusFile, limit_bytes: int | None) -> Iterator[JsonRecord[Conversation]]:
    template = CHAT_TEMPLATES.get(source.template)
    for record in read_json_lines(file, read_conversation, limit_bytes, "chats"):
        _checked_views(record, split_views(record.content), template)
        yield record


def _chat_documents(source: ChatSource, file: CorpusFile, limit_bytes: int | None) -> Iterator[Document]:
    for record in _chat_records(source, file, limit_bytes):
        yield Document(key=record.key, text=_text([record.content]))


def _chat_samples(source: ChatSource, tokenizer: Tokenizer) -> Iterator[TrainingSample]:
    template = CHAT_TEMPLATES.get(source.template)
    records = (record for file in _list_chats(source) for record in _chat_records(source, file, None))
    for batch in _batches(records):
        keyed = [(record.key, view) for record in batch for view in split_views(record.content)]
        chats = encode_conversations([view for _, view in keyed], template, tokenizer)
        for (key, _), chat in zip(keyed, chats, strict=True):
            yield TrainingSample(key=key, pieces=(chat.piece(),), may_be_cut=source.too_long == "cut")


def _check_chat(source: ChatSource, tokenizer: Tokenizer | None) -> None:
    template = CHAT_TEMPLATES.get(source.template)

    def names() -> Iterator[str]:
        for file in _list_chats(source):
            for record in _chat_records(source, file, CHECKED_BYTES):
                yield from special_names(record.content, template)

    _check(source, source.template, tokenizer, names)


def _pair_records(
    source: PreferencesSource, file: CorpusFile, limit_bytes: int | None
) -> Iterator[JsonRecord[AnswerPair]]:
    template = CHAT_TEMPLATES.get(source.template)
    for record in read_json_lines(file, read_pair, limit_bytes, "chats"):
        for name, answer in (("chosen", record.content.chosen), ("rejected", record.content.rejected)):
            if len(split_views(answer)) > 1:
                raise DataError(
                    f"{record.place}: {name}: must have thoughts in its last message alone, has them in an earlier "
                    f"one; nearest: a pair that ends there"
                )
        _checked_views(record, [record.content.chosen, record.content.rejected], template)
        yield record


def _pair_documents(source: PreferencesSource, file: CorpusFile, limit_bytes: int | None) -> Iterator[Document]:
    for record in _pair_records(source, file, limit_bytes):
        yield Document(key=record.key, text=_text([record.content.chosen, record.content.rejected]))


def _pair_samples(source: PreferencesSource, tokenizer: Tokenizer) -> Iterator[TrainingSample]:
    template = CHAT_TEMPLATES.get(source.template)
    records = (record for file in _list_chats(source) for record in _pair_records(source, file, None))
    for batch in _batches(records):
        answers = [answer for record in batch for answer in (record.content.chosen, record.content.rejected)]
        chats = encode_conversations(answers, template, tokenizer)
        for record, chosen, rejected in zip(batch, chats[::2], chats[1::2], strict=True):
            yield pair_sample(record.key, chosen, rejected, record.content.margin)


def _check_pairs(source: PreferencesSource, tokenizer: Tokenizer | None) -> None:
    template = CHAT_TEMPLATES.get(source.template)

    def names() -> Iterator[str]:
        for file in _list_chats(source):
            for record in _pair_records(source, file, CHECKED_BYTES):
                yield from special_names(record.content.chosen, template)
                yield from special_names(record.content.rejected, template)

    _check(source, source.template, tokenizer, names)


DATA_SOURCES.register(
    "chat",
    DataSourceEntry(
        summary="conversations in .jsonl files, of which the assistant's turns are trained",
        config=ChatSource,
        files=_list_chats,
        read=_chat_documents,
        place=lambda source: f"data.paths: {list(source.paths)!r}",
        settings=lambda source: [source.template, source.too_long],
        samples=_chat_samples,
        special_tokens=CHAT_TOKENS,
        check=_check_chat,
        chat_template=lambda source: source.template,
        values=lambda source: (WEIGHTS,),
    ),
)
DATA_SOURCES.register(
    "preferences",
    DataSourceEntry(
        summary="pairs of a preferred and a rejected answer in .jsonl files",
        config=PreferencesSource,
        files=_list_chats,
        read=_pair_documents,
        place=lambda source: f"data.paths: {list(source.paths)!r}",
        settings=lambda source: source.template,
        samples=_pair_samples,
        special_tokens=CHAT_TOKENS,
        check=_check_pairs,
        chat_template=lambda source: source.template,
        values=lambda source: PAIR_VALUES,
    ),
)
