"""Converts between text and token ids: byte-level BPE with DeepSeek's special tokens. No torch here.

It also finds tokenizer files and reads `tiktoken.model`, that of Kimi and Moonlight.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.bulk_encoder import SPLIT_PATTERNS, BulkEncoder, EncodedStrings
from data.corpus import DataError, refusal, shorten
from data.special_tokens import (
    BEGIN_OF_SENTENCE,
    CHAT_TOKENS,
    END_OF_SENTENCE,
    END_THINK,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    FIM_TOKENS,
    NAMES_FROM_FILES,
    NO_SIDECAR_FILES,
    PAD,
    THINK,
    TOKENIZER_CONFIG_NAME,
    TOOL_TOKENS,
    SidecarFiles,
    SpecialNames,
    describe_special,
    find_special_ids,
    read_sidecar_files,
)

USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
SPECIAL_TOKENS = (BEGIN_OF_SENTENCE, END_OF_SENTENCE, PAD, *FIM_TOKENS, USER, ASSISTANT)

# `data.tokenizer=train_128k`: learned tokens with begin, end and padding, then special ones, as in DeepSeek-V3's file.
TRAIN_128K = "train_128k"
RELEASED_LEARNED = 128_000
RELEASED_FIRST = 128_798
RELEASED_TOKENS = (THINK, END_THINK, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, "<|EOT|>", *TOOL_TOKENS)
RELEASED_ROWS = 129_280
# Share of joint tokens that are split with it (`NewlineSplitter`); that of DeepSeek-V3 is not disclosed.
NEWLINE_SPLIT_128K = 0.05

LARGEST_BYTES = 2**28
CONTEXT_TOKENS = 16
_LONG_TEXT = 2**14  # characters, above which other threads run meanwhile: the backend's `encode` holds Python's lock


class Tokenizer:
    """A tokenizer, trained by this project or published.

    Text never produces special tokens; they are inserted by id. A tokenizer that this project trained starts with all
    `SPECIAL_TOKENS` in that order (arXiv:2412.19437, section 4.1; the names are those of the released tokenizer). For
    other tokenizers, `data.special_tokens` finds the tokens that begin, end and fill a document.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        content: bytes | None = None,
        place: str = "tokenizer",
        *,
        names: SpecialNames = NAMES_FROM_FILES,
        sidecars: SidecarFiles = NO_SIDECAR_FILES,
    ) -> None:
        """Wraps and owns a backend of the `tokenizers` library; `content` is that of its file, if it has one."""
        self._content = backend.to_str().encode() if content is None else content
        self._place = place
        # A tokenizer file can enable truncation and padding.
        backend.no_truncation()
        backend.no_padding()
        # Ids of the tokens that are inserted around and within documents.
        self.special = find_special_ids(backend, names, sidecars, place)
        self._config = self._tokenizer_config(backend, names, sidecars)
        # Files may declare some of these as ordinary tokens. Then a document that contains the text
        # "<｜end▁of▁sentence｜>" would produce the special token. Both calls below prevent this.
        placed = [backend.id_to_token(number) for number in self.special.all_ids]
        added = [token for token in (*SPECIAL_TOKENS, *CHAT_TOKENS) if backend.token_to_id(token) is not None]
        backend.add_special_tokens(list(dict.fromkeys([*added, *placed])))
        backend.encode_special_tokens = True
        self._backend = backend

    @property
    def token_names(self) -> dict[str, str | None]:
        """Names of begin, end and padding under the keys of `tokenizer_config.json`."""
        return describe_special(self._backend, self.special)

    def document(self, ids: Sequence[int]) -> list[int]:
        """Returns a document's tokens: begin of sentence (if there is one), text, end of sentence."""
        return [*([] if self.special.bos is None else [self.special.bos]), *ids, self.special.eos]

    def prompt(self, text: str | Sequence[int], suffix: str | None = None) -> list[int]:
        """Returns the tokens of a text to continue: begin of sentence (if there is one) and its ids.

        A tokenizer without that token puts the end of sentence before an empty text. With a suffix, they ask for what
        comes before it, in the form that training gives documents for fill-in-the-middle.
        """
        ids = self.encode(text) if isinstance(text, str) else text
        if suffix is not None:
            if self.special.fim is None:
                rule = "must be absent, because the tokenizer has no tokens of fill-in-the-middle"
                raise refusal("suffix", rule, shorten(repr(suffix)), "null")
            begin, hole, end = self.special.fim
            ids = [begin, *ids, hole, *self.encode(suffix), end]
        return self.document(ids)[:-1] or [self.special.eos]

    def text_context(self, tokens: Sequence[int]) -> list[int]:
        """Returns the last few tokens of a text without special tokens.

        A following token may decode differently. Many tokenizers drop the leading space of the first token, so that a
        continuation must be decoded in context.
        """
        placed = set(self.special.all_ids)
        end = next((at for at in range(len(tokens), 0, -1) if tokens[at - 1] in placed), 0)
        return list(tokens[max(end, len(tokens) - CONTEXT_TOKENS) :])

    @property
    def placed_names(self) -> dict[int, str]:
        """Names by id of the tokens that are placed by id and never produced from text."""
        added = self._backend.get_added_tokens_decoder()
        return {number: token.content for number, token in added.items() if token.special}

    def special_id(self, token: str) -> int:
        """Returns the id of one of `SPECIAL_TOKENS` or `CHAT_TOKENS`. Raises DataError if there is none."""
        number = self._backend.token_to_id(token)
        if number is None:
            raise DataError(f"{self._place}: the special token {token!r} must be in the vocabulary; it is missing")
        return int(number)

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int, further_tokens: Sequence[str] = ()) -> "Tokenizer":
        """Trains a tokenizer with `SPECIAL_TOKENS`, then further special tokens; reads the documents once.

        A corpus with too few pairs to merge yields fewer than `vocab_size` tokens. This is harmless, because the
        model's vocabulary is only an upper bound. Raises DataError if `vocab_size` is too small for the bytes and the
        special tokens.
        """
        special = [*SPECIAL_TOKENS, *further_tokens]
        check_vocab_size(vocab_size, len(special))
        return cls(_train_backend(documents, vocab_size, special))

    @classmethod
    def train_128k(cls, documents: Iterable[str]) -> "Tokenizer":
        """Trains a tokenizer with the size and the special tokens' ids of the one that DeepSeek-V3 released.

        Ids that the released one does not use, or that a small corpus leaves, have names that no text produces.
        """
        values = json.loads(_train_backend(documents, RELEASED_LEARNED, SPECIAL_TOKENS[:3]).to_str())
        vocab = values["model"]["vocab"] | {token: RELEASED_FIRST + at for at, token in enumerate(RELEASED_TOKENS)}
        unused = sorted(set(range(RELEASED_ROWS)) - set(vocab.values()))
        values["model"]["vocab"] = vocab | {f"<｜place▁holder▁no▁{at}｜>": at_id for at, at_id in enumerate(unused)}
        flags = {**values["added_tokens"][0]}
        values["added_tokens"] += [{**flags, "id": vocab[token], "content": token} for token in RELEASED_TOKENS]
        return cls(tokenizers.Tokenizer.from_str(json.dumps(values, ensure_ascii=False)))

    @property
    def num_learned(self) -> int:
        """Number of tokens that text can produce."""
        placed = set(self.placed_names.values())
        return sum(not token.startswith("<｜") and token not in placed for token in self._backend.get_vocab())

    @classmethod
    def load(cls, path: Path, key: str = "tokenizer", names: SpecialNames = NAMES_FROM_FILES) -> "Tokenizer":
        """Loads a `tokenizer.json` or `tiktoken.model` with the files next to it, or raises DataError."""
        sidecars = read_sidecar_files(path.parent, key)
        try:
            if not path.is_file() or path.stat().st_size > LARGEST_BYTES:
                raise ValueError(f"it must be a file of at most {LARGEST_BYTES} bytes")
            if path.name == TIKTOKEN_NAME:
                content = None
                backend = read_tiktoken(path, sidecars.values.get(TOKENIZER_CONFIG_NAME, {}))
            else:
                content = path.read_bytes()
                backend = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the backend raises a plain Exception if it cannot parse the file
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise DataError(f"{key}: {path} must be a saved tokenizer: {reason}") from error
        return cls(backend, content, f"{key}: {path}", names=names, sidecars=sidecars)

    def save(self, path: Path) -> list[Path]:
        """Writes the tokenizer in the format of the `tokenizers` library, and returns the written files.

        A loaded tokenizer is copied byte by byte. Also writes `tokenizer_config.json` if the special tokens cannot be
        found without it.
        """
        path.write_bytes(self._content)
        if self._config is None:
            return [path]
        config_path = path.with_name(TOKENIZER_CONFIG_NAME)
        config_path.write_bytes(self._config)
        return [path, config_path]

    def _tokenizer_config(
        self, backend: tokenizers.Tokenizer, names: SpecialNames, sidecars: SidecarFiles
    ) -> bytes | None:
        """Returns a `tokenizer_config.json` that names the special tokens; None if none is needed."""
        only_config = {name: values for name, values in sidecars.values.items() if name == TOKENIZER_CONFIG_NAME}
        config_alone = SidecarFiles(values=only_config, config_content=sidecars.config_content)
        try:
            if find_special_ids(backend, NAMES_FROM_FILES, config_alone, self._place) == self.special:
                return sidecars.config_content
        except DataError:
            pass  # the configuration or another file names a token that this file does not name
        values = {**only_config.get(TOKENIZER_CONFIG_NAME, {"tokenizer_class": "PreTrainedTokenizerFast"})}
        if names.bos is not None:
            values["add_bos_token"] = bool(names.bos)
        values |= describe_special(backend, self.special)
        return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the `tokenizer.json` that `save` writes."""
        return hashlib.sha256(self._content).hexdigest()

    @property
    def serialized(self) -> str:
        """The `tokenizer.json` of the backend, in which tokens of chats are special."""
        return str(self._backend.to_str())

    def token_bytes(self, number: int) -> bytes:
        """Returns the bytes that a token stands for, which need not be whole characters."""
        token = str(self._backend.id_to_token(number) or "")
        letters = _letter_bytes() if self.is_byte_level and number not in self.placed_names else {}
        if letters and all(letter in letters for letter in token):
            return bytes(letters[letter] for letter in token)
        return self.decode([number]).encode()

    @property
    def vocab_size(self) -> int:
        """Largest token id plus one, including special tokens; exceeds the token count if there are gaps."""
        return max(self._backend.get_vocab().values(), default=-1) + 1

    def spellings(self) -> dict[int, str]:
        """Returns how the vocabulary spells each token, by id."""
        return {number: token for token, number in self._backend.get_vocab().items()}

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether the vocabulary spells each byte of a text as one character."""
        return "ByteLevel" in json.dumps(json.loads(self._content).get("decoder"))

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without begin and end of sentence."""
        if len(text) > _LONG_TEXT:
            return self.encode_batch([text])[0]
        with self._panics():
            return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, documents: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each document, computed in parallel on the machine's cores."""
        with self._panics():
            encoded = self._backend.encode_batch_fast(list(documents), add_special_tokens=False)
            return [list(item.ids) for item in encoded]

    @cached_property
    def bulk(self) -> BulkEncoder:
        """Encoder of many strings, with the same ids; takes up to seconds to build."""
        with self._panics():
            return BulkEncoder(self._backend)

    def encode_flat(self, strings: Sequence[str]) -> EncodedStrings:
        """Returns the ids of many strings, without begin and end of sentence, in flat arrays."""
        with self._panics():
            return self.bulk.encode(strings)

    @contextmanager
    def _panics(self) -> Iterator[None]:
        """Turns a panic of the backend, for example from endless backtracking, into an error."""
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise DataError(f"{self._place}: must be able to split any text, cannot: {error}") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Returns the text of token ids. Bytes that are not UTF-8 become U+FFFD; special tokens are named."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))


def _train_backend(documents: Iterable[str], vocab_size: int, special: Sequence[str]) -> tokenizers.Tokenizer:
    backend = _byte_level(models.BPE(), SPLIT_PATTERNS)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    return backend


def _byte_level(model: models.BPE, patterns: Sequence[str]) -> tokenizers.Tokenizer:
    """Returns a backend that splits text by patterns, one after the other, and spells bytes as characters."""
    backend = tokenizers.Tokenizer(model)
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def check_vocab_size(vocab_size: int, num_special: int = len(SPECIAL_TOKENS)) -> None:
    """Raises DataError if a vocabulary is too small for all bytes and special tokens."""
    least = 256 + num_special
    if vocab_size < least:
        raise DataError(
            f"data.tokenizer_vocab_size: must be at least {least} (256 bytes and {num_special} special tokens), "
            f"got {vocab_size}; nearest: {least}"
        )


TOKENIZER_NAME = "tokenizer.json"
# Each line has a token's bytes and its rank. `tokenizer_config.json` names the special tokens. The pattern that splits
# text is in the publisher's Python code, which is never run; it is copied below.
TIKTOKEN_NAME = "tiktoken.model"
# Kimi's special tokens: this many ids follow the other tokens, named or not.
NUM_SPECIAL = 256
_LARGEST_TIKTOKEN_BYTES = 2**26
_TIKTOKEN_CLASS = "TikTokenTokenizer"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
# Runs of Han characters; words, which end where capitals begin; numbers; punctuation; line breaks; white space.
_TIKTOKEN_PATTERN = "|".join(
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
    if config.get("tokenizer_class") != _TIKTOKEN_CLASS:
        raise ValueError(
            f"tokenizer_config.json next to it must have tokenizer_class {_TIKTOKEN_CLASS}, as for Kimi and Moonlight, "
            f"has {config.get('tokenizer_class')!r}; save it as tokenizer.json with its publisher's tool"
        )
    ranks = _read_ranks(path)
    letters = {byte: letter for letter, byte in _letter_bytes().items()}
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    merges = [(spelled[left], spelled[right]) for left, right in _find_merges(ranks)]
    backend = _byte_level(models.BPE(vocab=vocab, merges=merges, ignore_merges=True), [_TIKTOKEN_PATTERN])
    listed = config.get("added_tokens_decoder") or {}
    named = {int(number): token["content"] for number, token in listed.items()}
    # Special tokens in the order of their ids, which follow the ids of all other tokens.
    special_ids = range(len(ranks), len(ranks) + NUM_SPECIAL)
    backend.add_special_tokens([named.get(number, f"<|reserved_token_{number}|>") for number in special_ids])
    return backend


def _read_ranks(path: Path) -> dict[bytes, int]:
    if path.stat().st_size > _LARGEST_TIKTOKEN_BYTES:
        raise ValueError(f"it has more than {_LARGEST_TIKTOKEN_BYTES} bytes")
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


def _find_merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Returns every pair of tokens that together are a token, ordered by the rank of that token."""
    cuts = ((token[:cut], token[cut:]) for token in ranks for cut in range(1, len(token)))
    merges = [(left, right) for left, right in cuts if left in ranks and right in ranks]
    return sorted(merges, key=lambda merge: (ranks[merge[0] + merge[1]], ranks[merge[0]], ranks[merge[1]]))


@cache
def _letter_bytes() -> dict[str, int]:
    """Returns the byte of each character of byte-level tokenizers (GPT-2): printable, or from 256 on."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable_bytes = [ord(letter) for letter in letters if ord(letter) < 256]
    return dict(zip(letters, [*printable_bytes, *sorted(set(range(256)) - set(printable_bytes))], strict=True))
