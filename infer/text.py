"""Decodes a stream of tokens to text: only whole characters, up to a stop string."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"


class TextStream:
    """Incremental text of a stream of tokens: all pieces together are the text up to a stop string.

    Incomplete characters are held back, and so is text that may be the start of a stop string. Many tokenizers drop the
    leading space of a first token, so tokens are decoded together with those before them, whose text is cut off.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        """Starts with no text.

        Args:
            decode: returns the text of token ids, with U+FFFD for bytes that are not UTF-8.
            before: the last few tokens before the stream.
        """
        self._decode = decode
        self._stop_strings = tuple(stop_strings)
        self._before = list(before)  # tokens of whole characters, before the open tokens
        self._open: list[int] = []  # tokens since the last whole character
        self._done = 0  # number of characters of the open tokens that were passed on
        self._held = ""  # decoded text that may be the start of a stop string
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Adds a token. Returns the new text that is certain."""
        self._open.append(token)
        text = decode_after(self._decode, self._before, self._open)
        # Bytes of an incomplete character are decoded as one or more U+FFFD at the end. All text before them is final.
        decided = text.rstrip(REPLACEMENT)
        fresh = decided[self._done :]
        self._done = max(self._done, len(decided))
        if decided == text:
            self._before = self._open
            self._open = []
            self._done = 0
        return self._pass_on(fresh)

    def close(self) -> str:
        """Returns the rest of the text. Call it when no token follows."""
        rest = decode_after(self._decode, self._before, self._open)[self._done :] if self._open else ""
        self._before = self._open
        self._open = []
        self._done = 0
        text = self._pass_on(rest) + self._held
        self._held = ""
        return text

    def _pass_on(self, fresh: str) -> str:
        """Returns new text up to a stop string, and holds back text that may be the start of one."""
        if self.is_stopped:
            return ""
        text = self._held + fresh
        found = [place for place in (text.find(stop) for stop in self._stop_strings) if place >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)]
        begun = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]


def decode_after(decode: Callable[[Sequence[int]], str], before: Sequence[int], ids: Sequence[int]) -> str:
    """Returns the text that tokens add after others, or alone if bytes of both form characters together."""
    text = decode([*before, *ids])
    start = decode(before) if before else ""
    return text[len(start) :] if text.startswith(start) else decode(ids)


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of the text that is the start of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[len(text) - size :])), 0)
