"""Parses an assistant's turn into thoughts, content and calls of tools. Imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from data.chat.templates import ChatTemplate, Pieces
from data.tokenizer import Tokenizer
from infer.protocol import overlap

PieceKind = Literal["content", "thoughts", "name", "arguments"]
_Part = Literal["content", "thoughts", "name", "arguments", "calls"]
_FIRST_MARK = 0xDC00


class TurnPiece(NamedTuple):
    """New text of a part of a turn. A `name` is whole and begins a call; `arguments` extend the last call."""

    kind: PieceKind
    text: str


@dataclass(frozen=True, slots=True)
class _Border:
    """Pieces of a template between two parts, as text before, at and after a mark; the mark decides."""

    before: str
    mark: str
    after: str
    next_part: _Part


class TurnMarks:
    """Characters that replace the special tokens of a template in decoded text.

    They are halves of surrogate pairs, which no tokenizer decodes: text that spells a special token is not one.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._special_names = template.special_names
        form = template.tools
        thoughts_end = () if template.thoughts is None else template.thoughts.end
        self.forms: Mapping[str, Pieces] = {
            "thoughts_end": thoughts_end,
            "calls_begin": form.calls_begin,
            "call_begin": form.call_begin,
            "separator": form.separator,
            "call_end": form.call_end,
            "calls_end": form.calls_end,
        }
        pieces = dict.fromkeys(piece for pieces in self.forms.values() for piece in pieces)
        ids = {name: number for number, name in tokenizer.placed_names.items() if name in pieces}
        self.by_name = {name: chr(_FIRST_MARK + at) for at, name in enumerate(ids)}
        self._by_id = {number: self.by_name[name] for name, number in ids.items()}
        self._names = str.maketrans({mark: name for name, mark in self.by_name.items()})

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, with marks."""
        parts: list[str] = []
        first = 0
        for at, number in enumerate(ids):
            if number in self._by_id:
                parts += (self._decode(ids[first:at]), self._by_id[number])
                first = at + 1
        return "".join([*parts, self._decode(ids[first:])])

    def spell(self, text: str) -> str:
        """Returns text with the names of special tokens in place of marks."""
        return text.translate(self._names)

    def border(self, form: str, next_part: _Part) -> list[_Border]:
        """Returns the border that pieces of the template are; none if they need a token that does not exist."""
        pieces = self.forms[form]
        if not pieces or any(piece in self._special_names and piece not in self.by_name for piece in pieces):
            return []
        text = "".join(self.by_name.get(piece, piece) for piece in pieces)
        mark = next((self.by_name[piece] for piece in pieces if piece in self.by_name), text)
        before, _, after = text.partition(mark)
        return [_Border(before, mark, after, next_part)]


class TurnParser:
    """Splits text with marks as it arrives. Parts without their end are incomplete, and delivered."""

    def __init__(self, marks: TurnMarks, *, opens_thoughts: bool, parses_calls: bool) -> None:
        self._spell: Callable[[str], str] = marks.spell
        self._borders: dict[_Part, list[_Border]] = {
            "thoughts": marks.border("thoughts_end", "content"),
            "content": marks.border("calls_begin", "calls") if parses_calls else [],
            "calls": [*marks.border("call_begin", "name"), *marks.border("calls_end", "content")],
            "name": marks.border("separator", "arguments"),
            "arguments": marks.border("call_end", "calls"),
        }
        self._part: _Part = "thoughts" if opens_thoughts else "content"
        self._text = ""  # text that is not decided yet
        self._skipped = ""  # text of a border that is dropped if it is next

    def push(self, text: str, *, is_last: bool = False) -> list[TurnPiece]:
        """Adds text, and returns what is certain: all of it if it is the last."""
        self._text += text
        pieces: list[TurnPiece] = []
        while True:
            if self._skipped and not is_last and self._skipped.startswith(self._text):
                return pieces
            self._text = self._text.removeprefix(self._skipped)
            self._skipped = ""
            borders = [(self._text.find(border.mark), border) for border in self._borders[self._part]]
            at, border = min(
                ((at, border) for at, border in borders if at >= 0), default=(-1, None), key=lambda x: x[0]
            )
            if border is None:
                pieces += self._take_certain(is_last=is_last)
                return pieces
            pieces += self._pieces(self._text[:at].removesuffix(border.before), is_whole=True)
            self._text = self._text[at + len(border.mark) :]
            self._skipped = border.after
            self._part = border.next_part

    def _take_certain(self, *, is_last: bool) -> list[TurnPiece]:
        """Takes text that cannot be the start of a border."""
        if self._part in ("name", "calls") and not is_last:
            return []
        starts = [border.before + border.mark for border in self._borders[self._part]]
        size = 0 if is_last else max((overlap(self._text, start) for start in starts), default=0)
        certain = self._text[: len(self._text) - size]
        self._text = self._text[len(certain) :]
        return self._pieces(certain, is_whole=False)

    def _pieces(self, text: str, *, is_whole: bool) -> list[TurnPiece]:
        part = self._part
        if part == "calls":
            # Only white space joins calls; other text is content.
            return [TurnPiece("content", self._spell(text))] if text.strip() else []
        if part == "name" and not is_whole:
            part = "content"
        return [TurnPiece(part, self._spell(text))] if text or part == "name" else []
