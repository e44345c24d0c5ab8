"""Registers sources of chats and of pairs of answers, read from `.jsonl` files. Imports no torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from data.chat.encode import ChatSample, check_tokens, encode_samples, special_names, split_views
from data.chat.messages import read_conversation, read_pair
from data.chat.templates import CHAT_TEMPLATES
from data.corpus import DataError, refusal
from data.pack import PAIR_VALUES, WEIGHTS
from data.readers.sources import CHECKED_BYTES, check_source, list_jsonl, read_json_lines
from data.registry import DATA_SOURCES, CorpusFile, DataSource, DataSourceEntry, Document, TrainingSample
from data.special_tokens import CHAT_TOKENS
from data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatLines(DataSource):
    """Lines of `.jsonl` files that a chat template writes as samples: pairs of answers or problems.

    A pair, or the prompt of a problem, that is longer than a sequence is dropped.
    """

    paths: tuple[str, ...]  # files, and folders that are searched for them
    template: Annotated[str, CHAT_TEMPLATES]  # name of the chat template


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatSource(ChatLines):
    """Conversations in `.jsonl` files, of which every turn of the assistant is trained."""

    # whether a conversation that is longer than a sequence is cut at its end or dropped.
    too_long: Literal["cut", "drop"]


def _list_chats(source: ChatLines) -> tuple[CorpusFile, ...]:
    return list_jsonl(source.paths, "chats")


def _read_chat(values: Mapping[str, Any], key: str, place: str) -> ChatSample:
    conversation = read_conversation(values, place)
    return ChatSample(key=key, views=split_views(conversation))


def _read_pair(values: Mapping[str, Any], key: str, place: str) -> ChatSample:
    pair = read_pair(values, place)
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if len(split_views(answer)) > 1:
            rule = "must have thoughts in its last message alone"
            raise refusal(f"{place}: {name}", rule, "with some in an earlier one", "a pair that ends there")
    return ChatSample(key=key, views=(pair.chosen, pair.rejected), margin=pair.margin)


def _samples_of(source: ChatLines, file: CorpusFile, limit_bytes: int | None = None) -> Iterator[ChatSample]:
    """Yields what the lines of a file describe; an error of the template names the line."""
    template = CHAT_TEMPLATES.get(source.template)
    read_line = _read_chat if isinstance(source, ChatSource) else _read_pair

    def read(values: Mapping[str, Any], key: str, place: str) -> ChatSample:
        sample = read_line(values, key, place)
        try:
            for view in sample.views:
                special_names(view, template)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        return sample

    return read_json_lines(file, read, limit_bytes, "chats")


def _text(sample: ChatSample) -> str:
    """Returns the text of a sample, from which a tokenizer can be trained."""
    views = sample.views[-1:] if sample.margin is None else sample.views
    messages = [message for view in views for message in view.messages]
    parts = [part for message in messages for part in (message.thoughts, message.content) if part]
    calls = [f"{call.name}\n{call.arguments}" for message in messages for call in message.tool_calls]
    return "\n".join([*parts, *calls])


def _documents(source: ChatLines, file: CorpusFile, limit_bytes: int | None) -> Iterator[Document]:
    for sample in _samples_of(source, file, limit_bytes):
        yield Document(key=sample.key, text=_text(sample))


def _samples(source: ChatLines, tokenizer: Tokenizer) -> Iterator[TrainingSample]:
    samples = (sample for file in _list_chats(source) for sample in _samples_of(source, file))
    may_be_cut = isinstance(source, ChatSource) and source.too_long == "cut"
    return encode_samples(samples, CHAT_TEMPLATES.get(source.template), tokenizer, may_be_cut=may_be_cut)


def _check(source: ChatLines, tokenizer: Tokenizer | None) -> None:
    """Rejects a source that cannot be read, or a tokenizer that lacks tokens of the template."""
    check_source(source)
    if tokenizer is not None and not set(CHAT_TOKENS) <= set(tokenizer.placed_names.values()):
        # Only chats with tools need the other tokens.
        template = CHAT_TEMPLATES.get(source.template)
        samples = (sample for file in _list_chats(source) for sample in _samples_of(source, file, CHECKED_BYTES))
        names = (name for sample in samples for view in sample.views for name in special_names(view, template))
        check_tokens(tuple(dict.fromkeys(names)), source.template, tokenizer)


lines_entry = partial(
    DataSourceEntry,
    place=lambda source: f"data.paths: {list(source.paths)!r}",
    special_tokens=CHAT_TOKENS,
)
_entry = partial(lines_entry, files=_list_chats, read=_documents, samples=_samples, check=_check)
DATA_SOURCES.register(
    "chat",
    _entry(
        summary="conversations in .jsonl files, of which the assistant's turns are trained",
        config=ChatSource,
        values=lambda source: (WEIGHTS,),
    ),
)
DATA_SOURCES.register(
    "preferences",
    _entry(
        summary="pairs of a preferred and a rejected answer in .jsonl files",
        config=ChatLines,
        values=lambda source: PAIR_VALUES,
    ),
)
