"""Finds a tokenizer's special tokens: begin, end and padding of documents, fill-in-the-middle.

Begin (bos), end (eos) and padding (pad) are each taken from the first of these that names one: the configuration;
`tokenizer_config.json`, `special_tokens_map.json` and `generation_config.json` next to the tokenizer; this project's
names; names that are common in other tokenizers. Imports no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers

from base.registry import closest
from data.corpus import DataError

Kind = Literal["bos", "eos", "pad"]

BEGIN_OF_SENTENCE = "<｜begin▁of▁sentence｜>"
END_OF_SENTENCE = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_END = "<｜fim▁end｜>"
FIM_TOKENS = (FIM_BEGIN, FIM_HOLE, FIM_END)

THINK = "<think>"
END_THINK = "</think>"
CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
CALLS_END = "<｜tool▁calls▁end｜>"
CALL_BEGIN = "<｜tool▁call▁begin｜>"
CALL_END = "<｜tool▁call▁end｜>"
OUTPUTS_BEGIN = "<｜tool▁outputs▁begin｜>"
OUTPUTS_END = "<｜tool▁outputs▁end｜>"
OUTPUT_BEGIN = "<｜tool▁output▁begin｜>"
OUTPUT_END = "<｜tool▁output▁end｜>"
TOOL_SEPARATOR = "<｜tool▁sep｜>"
TOOL_TOKENS = (
    *(CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END),
    *(OUTPUTS_BEGIN, OUTPUTS_END, OUTPUT_BEGIN, OUTPUT_END, TOOL_SEPARATOR),
)
CHAT_TOKENS = (THINK, END_THINK, *TOOL_TOKENS)
"""Tokens of chat templates that only tokenizers for chats have: released ones, and those trained on chats."""

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TOKENS_MAP_NAME = "special_tokens_map.json"
GENERATION_NAME = "generation_config.json"
LARGEST_BYTES = 2**26

# Tokens before prefix, suffix and middle, one line per family: DeepSeek, Qwen Coder, StarCoder, Code Llama.
_FIM_FAMILIES = (
    FIM_TOKENS,
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)
_KNOWN: dict[Kind, tuple[str, ...]] = {
    "bos": (BEGIN_OF_SENTENCE, "<s>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<bos>"),
    "eos": (END_OF_SENTENCE, "</s>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "<eos>"),
    "pad": (PAD, "<pad>", "<|finetune_right_pad_id|>", "[PAD]", "<|pad|>"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialNames:
    """Names of special tokens in the configuration; None follows the tokenizer's files, `bos` "" is none."""

    bos: str | None
    eos: str | None
    pad: str | None


NAMES_FROM_FILES = SpecialNames(bos=None, eos=None, pad=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialIds:
    """Ids of special tokens."""

    # id before every document; None if the tokenizer has none, or if it equals `eos`, which then separates documents.
    bos: int | None
    eos: int  # id after every document
    pad: int  # id that fills the rest of a sequence; `eos` if the tokenizer has none
    # ids before a document's prefix, suffix and middle; None if the tokenizer has no such tokens.
    fim: tuple[int, ...] | None

    @property
    def all_ids(self) -> tuple[int, ...]:
        """All ids that are inserted around text and never produced from text."""
        return tuple(number for number in (self.bos, self.eos, self.pad, *(self.fim or ())) if number is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class SidecarFiles:
    """Contents of the configuration files next to a tokenizer."""

    values: Mapping[str, Mapping[str, Any]]  # decoded JSON by file name
    config_content: bytes | None  # bytes of `tokenizer_config.json`; None if there is no such file


NO_SIDECAR_FILES = SidecarFiles(values={}, config_content=None)


def read_sidecar_files(folder: Path, key: str) -> SidecarFiles:
    """Reads the files next to a tokenizer that name special tokens; raises DataError if one is invalid."""
    values: dict[str, Mapping[str, Any]] = {}
    config_content = None
    for name in (TOKENIZER_CONFIG_NAME, TOKENS_MAP_NAME, GENERATION_NAME):
        path = folder / name
        if not path.is_file():
            continue
        try:
            if path.stat().st_size > LARGEST_BYTES:
                raise ValueError(f"it has more than {LARGEST_BYTES} bytes")
            content = path.read_bytes()
            read = json.loads(content.decode())
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{key}: {path} must be a JSON object, cannot be read ({error})") from error
        if not isinstance(read, dict):
            raise DataError(f"{key}: {path} must be a JSON object, is of type {type(read).__name__}")
        values[name] = read
        config_content = content if name == TOKENIZER_CONFIG_NAME else config_content
    return SidecarFiles(values=values, config_content=config_content)


def find_special_ids(
    backend: tokenizers.Tokenizer, names: SpecialNames, sidecars: SidecarFiles, place: str
) -> SpecialIds:
    """Returns the ids of special tokens; raises DataError if a named one or `eos` is not known."""
    eos = _find("eos", backend, names, sidecars, place)
    if eos is None:
        rule = f"must name the token that ends a document, because {place} does not define it"
        raise _refusal("eos", rule, backend)
    bos, pad = (_find(kind, backend, names, sidecars, place) for kind in ("bos", "pad"))
    families = ([backend.token_to_id(token) for token in family] for family in _FIM_FAMILIES)
    fim = next((tuple(number for number in ids if number is not None) for ids in families if None not in ids), None)
    return SpecialIds(bos=None if bos == eos else bos, eos=eos, pad=eos if pad is None else pad, fim=fim)


def describe_special(backend: tokenizers.Tokenizer, ids: SpecialIds) -> dict[str, str | None]:
    """Returns the names of begin, end and padding under the keys of `tokenizer_config.json`."""
    return {
        "bos_token": None if ids.bos is None else backend.id_to_token(ids.bos),
        "eos_token": backend.id_to_token(ids.eos),
        "pad_token": backend.id_to_token(ids.pad),
    }


def _find(
    kind: Kind, backend: tokenizers.Tokenizer, names: SpecialNames, sidecars: SidecarFiles, place: str
) -> int | None:
    named: str | None = getattr(names, kind)
    if named is not None:
        return None if kind == "bos" and not named else _named(kind, named, backend, place)
    for name in (TOKENIZER_CONFIG_NAME, TOKENS_MAP_NAME):
        values = sidecars.values.get(name, {})
        if kind == "bos" and values.get("add_bos_token") is False:
            return None
        if f"{kind}_token" in values:
            token = _content(values[f"{kind}_token"])
            number = None if token is None else backend.token_to_id(token)
            if token is not None and number is None:
                rule = f"must be set, because {place}, {name} names {token!r}, which is not in the vocabulary"
                raise _refusal(kind, rule, backend)
            return number
    number = sidecars.values.get(GENERATION_NAME, {}).get(f"{kind}_token_id")
    number = number[0] if isinstance(number, list) and number else number
    if type(number) is int and backend.id_to_token(number) is not None:
        return number
    usual_ids = (backend.token_to_id(token) for token in _KNOWN[kind])
    return next((number for number in usual_ids if number is not None), None)


def _named(kind: Kind, token: str, backend: tokenizers.Tokenizer, place: str) -> int:
    """Returns the id of a special token, never produced from text, that the configuration names."""
    number = backend.token_to_id(token)
    if number is None:
        raise _refusal(kind, f"must be a token of {place}, is {token!r}", backend, near=token)
    if number not in backend.get_added_tokens_decoder():
        raise _refusal(kind, f"must be a special token of {place}, is {token!r}, which text can produce", backend)
    return int(number)


def _content(token: object) -> str | None:
    """Returns a token's text from a string or from the field `content` of an object, if there is one."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _refusal(kind: Kind, rule: str, backend: tokenizers.Tokenizer, *, near: str = "") -> DataError:
    """Returns an error with a few special tokens, the one with the nearest name first."""
    added = backend.get_added_tokens_decoder()
    names = [added[number].content for number in sorted(added)]
    first_names = list(dict.fromkeys([*closest(near, names, cutoff=0.5), *names]))[:6]
    choices = f"nearest valid: {', '.join(first_names)}" if first_names else "it has no special token"
    return DataError(f"data.tokenizer_{kind}: {rule}; {choices}")
