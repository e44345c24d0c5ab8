"""Tokens to text while they are being made: no half characters, and an end where a given text appears."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"


class TextStream:
    """The text of a growing list of tokens, piece by piece.

    A token may end in the middle of a character's bytes: what is not decided yet is held back. So is what may become
    a stop text. All pieces together are the text of the tokens up to the first stop text.

    Many tokenizers decode a first token without the space that it begins with. So tokens are decoded behind those
    before them, and the text of these is cut off.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        """Starts with no text.

        Args:
            decode: gives the text of ids, with U+FFFD for bytes that are no UTF-8.
            stop_strings: that end the text; none is empty.
            before: tokens that the text continues, the last few.
        """
        self._decode = decode
        self._stop_strings = tuple(stop_strings)
        self._before = list(before)  # whole characters, which the open tokens continue
        self._open: list[int] = []  # tokens since the last whole character
        self._done = 0  # characters of their text that were passed on
        self._held = ""  # decided, but perhaps the beginning of a stop text
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Takes a token; the text that is certain now."""
        self._open.append(token)
        text = decode_after(self._decode, self._before, self._open)
        # Bytes of an unfinished character come out as U+FFFD at the end, one or one each; all before is decided.
        decided = text.rstrip(REPLACEMENT)
        fresh, self._done = decided[self._done :], max(self._done, len(decided))
        if decided == text:
            self._before, self._open, self._done = self._open, [], 0
        return self._pass_on(fresh)

    def close(self) -> str:
        """The end of the text, when no token follows."""
        rest = decode_after(self._decode, self._before, self._open)[self._done :] if self._open else ""
        self._before, self._open, self._done = self._open, [], 0
        text = self._pass_on(rest) + self._held
        self._held = ""
        return text

    def _pass_on(self, fresh: str) -> str:
        """New text without a stop text, what follows it, or what may become one."""
        if self.is_stopped:
            return ""
        text = self._held + fresh
        found = [place for place in (text.find(stop) for stop in self._stop_strings) if place >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        begun = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]


def decode_after(decode: Callable[[Sequence[int]], str], before: Sequence[int], ids: Sequence[int]) -> str:
    """Returns the text that tokens add behind others; alone if bytes of both make other characters together."""
    text = decode([*before, *ids])
    start = decode(before) if before else ""
    return text[len(start) :] if text.startswith(start) else decode(ids)


def _overlap(text: str, stop: str) -> int:
    """Characters at the text's end with which a stop text begins."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[len(text) - size :])), 0)
