"""Fill-in-the-middle: some documents shown as prefix, suffix, middle. Pure functions of (seed, document index)."""

from collections.abc import Sequence
from dataclasses import dataclass

from data.corpus import hash_unit
from data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class FimParts:
    """A document cut at two characters; `prefix + middle + suffix` is the document."""

    prefix: str
    middle: str
    suffix: str


def cut_for_fim(text: str, rate: float, seed: int, index: int) -> FimParts | None:
    """Decides whether a document is turned, and where it is cut.

    The cut is between characters, not tokens, so that a model learns to continue from within a word.

    Args:
        text: the whole document.
        rate: share of documents turned, in [0, 1].
        seed: with `index`, the only source of chance.
        index: the document's number in the training part.

    Returns:
        The parts, each possibly empty; None for a document that stays as it is.

    Source: arXiv:2412.19437, section 4.1 (rate 0.1, document level).
    """
    if hash_unit("fim", seed, str(index)) >= rate:
        return None
    places = len(text) + 1
    begin, end = sorted(int(hash_unit(purpose, seed, str(index)) * places) for purpose in ("fim cut 1", "fim cut 2"))
    return FimParts(prefix=text[:begin], middle=text[begin:end], suffix=text[end:])


def join_fim_tokens(
    tokenizer: Tokenizer, prefix_ids: Sequence[int], suffix_ids: Sequence[int], middle_ids: Sequence[int]
) -> list[int]:
    """The parts' ids in PSM order, each behind its mark: prefix, suffix, middle. The caller adds the document's ends.

    The tokenizer has marks: `special.fim` is not None.

    Source: arXiv:2412.19437, section 4.1.
    """
    assert tokenizer.special.fim is not None
    before_prefix, before_suffix, before_middle = tokenizer.special.fim
    return [before_prefix, *prefix_ids, before_suffix, *suffix_ids, before_middle, *middle_ids]
