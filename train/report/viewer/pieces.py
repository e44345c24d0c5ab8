"""Decodes tokens one by one, so that a page can color each of them."""

from collections.abc import Sequence
from pathlib import Path

from data.tokenizer import Tokenizer
from data.tokenizer_files import TOKENIZER_NAME
from train.checkpoint.locate import CHECKPOINTS_NAME

_NOT_UTF8 = "\ufffd"
_MOST_BYTES_OF_CHARACTER = 4


class TokenPieces:
    """The text of each token of a tokenizer, decoded once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """`tokenizer`: decodes."""
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def of(self, ids: Sequence[int]) -> list[str]:
        """Returns the text of each token; special tokens appear by name.

        If several tokens form a character, the last of them has it and the others are empty.

        Args:
            ids: token ids, not negative.
        """
        pieces = [self._piece(number) for number in ids]
        place = 0
        while place < len(pieces):
            place += 1 if _NOT_UTF8 not in pieces[place] else self._join(ids, pieces, place)
        return pieces

    def _join(self, ids: Sequence[int], pieces: list[str], place: int) -> int:
        """Gives the character that begins at a token to the token that completes it.

        Returns:
            The number of tokens that form it, or 1 if their bytes are no character.
        """
        for count in range(2, _MOST_BYTES_OF_CHARACTER + 1):
            text = self._tokenizer.decode(ids[place : place + count])
            if _NOT_UTF8 not in text:
                count = min(count, len(ids) - place)
                pieces[place : place + count] = [*[""] * (count - 1), text]
                return count
        return 1

    def _piece(self, number: int) -> str:
        if number not in self._known:
            # Many tokenizers drop the space before the first token, so the second of two shows the whole text.
            one, two = (self._tokenizer.decode([number] * count) for count in (1, 2))
            self._known[number] = two[len(one) :] if two.startswith(one) else one
        return self._known[number]


def find_tokenizer(folder: Path, given: str | None) -> Path | None:
    """Returns the tokenizer of a run's newest checkpoint, or else the given one, or None if there is none.

    Args:
        given: tokenizer that the configuration names, if it names a file.
    """
    saved = sorted((folder / CHECKPOINTS_NAME).glob(f"step-*/{TOKENIZER_NAME}"))
    named = [] if given is None else [Path(given).expanduser()]
    return next((path for path in [*reversed(saved), *named] if path.is_file()), None)
