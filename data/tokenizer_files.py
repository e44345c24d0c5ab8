"""Finds tokenizer files, and reads `tiktoken.model`, that of Kimi and Moonlight. Imports no torch.

Each line of `tiktoken.model` has a token's bytes and its rank. The names of special tokens are in
`tokenizer_config.json`. The pattern that splits text is in the publisher's Python code, which is never run; the pattern
is copied below.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

TOKENIZER_NAME = "tokenizer.json"
TIKTOKEN_NAME = "tiktoken.model"
# Kimi's special tokens: this many ids follow the other tokens, named or not.
NUM_SPECIAL = 256
_LARGEST_BYTES = 2**26
_CLASS = "TikTokenTokenizer"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
# Runs of Han characters; words, which end where capitals begin; numbers; punctuation; line breaks; white space.
_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}&&[^\p{{Han}}]]*[{_LOWER}&&[^\p{{Han}}]]+{_CONTRACTIONS}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}&&[^\p{{Han}}]]+[{_LOWER}&&[^\p{{Han}}]]*{_CONTRACTIONS}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def find_tokenizer_file(folder: Path) -> Path | None:
    """Returns the tokenizer file in a folder, or None if there is none in a supported format."""
    paths = (folder / name for name in (TOKENIZER_NAME, TIKTOKEN_NAME))
    return next((path for path in paths if path.is_file()), None)


def other_tokenizer(folder: Path) -> str:
    """Returns which unsupported tokenizer a folder contains and how to convert it; empty if there is none."""
    names = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).is_file()]
    if not names:
        return ""
    return (
        f'holds {names[0]}, which must first be saved as {TOKENIZER_NAME}: python -c "from transformers import '
        f"AutoTokenizer; AutoTokenizer.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')\""
    )


def read_tiktoken(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a `tiktoken.model`; ValueError if it is invalid or of an unknown pattern."""
    if config.get("tokenizer_class") != _CLASS:
        raise ValueError(
            f"tokenizer_config.json next to it must have tokenizer_class {_CLASS}, as for Kimi and Moonlight, has "
            f"{config.get('tokenizer_class')!r}; save it as tokenizer.json with its publisher's tool"
        )
    ranks = _read_ranks(path)
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    merges = [(spelled[left], spelled[right]) for left, right in _merges(ranks)]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(_special_tokens(config, len(ranks)))
    return backend


def _read_ranks(path: Path) -> dict[bytes, int]:
    if path.stat().st_size > _LARGEST_BYTES:
        raise ValueError(f"it has more than {_LARGEST_BYTES} bytes")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        parts = line.split()
        if len(parts) != 2 or not parts[1].isdigit():
            raise ValueError(f"line {number} must be a token in base64 and its rank, is {line[:60]!r}")
        ranks[base64.b64decode(parts[0], validate=True)] = int(parts[1])
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("its tokens must include all bytes, and ranks must start at 0 without gaps")
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Returns every pair of tokens whose concatenation is a token, ordered by the rank of that token."""
    found: list[tuple[int, int, int, bytes, bytes]] = []
    for token, rank in ranks.items():
        for place in range(1, len(token)):
            left = token[:place]
            right = token[place:]
            if left in ranks and right in ranks:
                found.append((rank, ranks[left], ranks[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _special_tokens(config: Mapping[str, Any], first_id: int) -> list[str]:
    """Returns the special tokens in the order of their ids, which follow the ids of all other tokens."""
    listed = config.get("added_tokens_decoder")
    named = {int(number): token["content"] for number, token in (listed or {}).items()}
    return [named.get(number, f"<|reserved_token_{number}|>") for number in range(first_id, first_id + NUM_SPECIAL)]


def _byte_letters() -> dict[int, str]:
    """Returns the character of each byte in byte-level tokenizers (GPT-2): printable, or from 256 on."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in prints]
    return {byte: chr(byte) for byte in prints} | {byte: chr(256 + place) for place, byte in enumerate(others)}
