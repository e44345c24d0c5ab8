"""Fill-in-the-middle: rearranges some documents as prefix, suffix, middle (arXiv:2412.19437, 4.1)."""

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
    """Decides by seed and index whether a document is rearranged, and cuts it at two random characters.

    The cuts are between characters, not tokens, so that a model learns to continue from the middle of a word. Parts may
    be empty; None for a document that is not rearranged. The report's rate is 0.1.
    """
    if hash_unit("fim", seed, str(index)) >= rate:
        return None
    places = len(text) + 1
    begin, end = sorted(int(hash_unit(purpose, seed, str(index)) * places) for purpose in ("fim cut 1", "fim cut 2"))
    return FimParts(prefix=text[:begin], middle=text[begin:end], suffix=text[end:])


def join_fim_tokens(
    tokenizer: Tokenizer, prefix_ids: Sequence[int], suffix_ids: Sequence[int], middle_ids: Sequence[int]
) -> list[int]:
    """Joins the parts in PSM order (prefix, suffix, middle), each after its marker token.

    The tokenizer must have marker tokens: `special.fim` is not None. The caller adds begin and end of sentence.
    """
    assert tokenizer.special.fim is not None
    before_prefix, before_suffix, before_middle = tokenizer.special.fim
    return [before_prefix, *prefix_ids, before_suffix, *suffix_ids, before_middle, *middle_ids]
