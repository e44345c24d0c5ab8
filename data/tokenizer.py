"""Text to token ids and back: byte-level BPE with DeepSeek's special tokens. No torch here."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.corpus import DataError
from data.special_tokens import (
    BEGIN_OF_SENTENCE,
    END_OF_SENTENCE,
    FIM_TOKENS,
    NAMES_FROM_FILES,
    NO_SIDECAR_FILES,
    PAD,
    TOKENIZER_CONFIG_NAME,
    SidecarFiles,
    SpecialIds,
    SpecialNames,
    describe_special,
    find_special_ids,
    read_sidecar_files,
)
from data.tiktoken_file import TIKTOKEN_NAME, read_tiktoken

USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
SPECIAL_TOKENS = (BEGIN_OF_SENTENCE, END_OF_SENTENCE, PAD, *FIM_TOKENS, USER, ASSISTANT)

LARGEST_BYTES = 2**28
CONTEXT_TOKENS = 16
TOKENIZER_NAME = "tokenizer.json"
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# Applied one after the other, as for DeepSeek-V3: digits by three, CJK runs, then words, punctuation with the
# line breaks that follow it, and white space.
SPLIT_PATTERNS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


class Tokenizer:
    """A trained tokenizer, ours or a published one. Text never becomes a special token: those are placed by id alone.

    A tokenizer of ours has all of `SPECIAL_TOKENS`, first and in that order. Of another one, `data.special_tokens`
    finds what begins, ends and fills a document.
    Source: arXiv:2412.19437, section 4.1; the names are those of the released tokenizer.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        content: bytes | None = None,
        place: str = "tokenizer",
        *,
        names: SpecialNames = NAMES_FROM_FILES,
        beside: SidecarFiles = NO_SIDECAR_FILES,
    ) -> None:
        """Wraps a backend.

        Args:
            backend: becomes this tokenizer's own.
            content: of the file that it was read from, None for a new one.
            place: names it in errors.
            names: special tokens that the configuration names.
            beside: what the files beside the tokenizer say.

        Raises:
            DataError: as `data.special_tokens.find_special_ids`.
        """
        self._content = backend.to_str().encode() if content is None else content
        self._place = place
        # A file may ask for texts that are cut or filled up to a length.
        backend.no_truncation()
        backend.no_padding()
        self._special = find_special_ids(backend, names, beside, place)
        self._config = self._tokenizer_config(backend, names, beside)
        # Files declare some of these plain; then, and without the second line, a document that mentions
        # "<｜end▁of▁sentence｜>" would end itself.
        placed = [backend.id_to_token(number) for number in self._special.all_ids]
        own = [token for token in SPECIAL_TOKENS if backend.token_to_id(token) is not None]
        backend.add_special_tokens(list(dict.fromkeys([*own, *placed])))
        backend.encode_special_tokens = True
        self._backend = backend

    @property
    def special(self) -> SpecialIds:
        """Ids of the tokens that are placed around and within documents."""
        return self._special

    @property
    def begin_of_sentence_id(self) -> int | None:
        """Stands before every document; None if the tokenizer has no such token."""
        return self._special.bos

    @property
    def end_of_sentence_id(self) -> int:
        """Stands behind every document."""
        return self._special.eos

    @property
    def pad_id(self) -> int:
        """Fills what is left of a sequence."""
        return self._special.pad

    @property
    def token_names(self) -> dict[str, str | None]:
        """Names of begin, end and padding under the keys of `tokenizer_config.json`."""
        return describe_special(self._backend, self._special)

    def document(self, ids: Sequence[int]) -> list[int]:
        """Returns a document's tokens: begin if there is one, those of its text, end."""
        return [*([] if self._special.bos is None else [self._special.bos]), *ids, self._special.eos]

    def prompt(self, text: str) -> list[int]:
        """Returns the tokens of a text that is to be continued: as a document begins, and never empty."""
        ids = [*([] if self._special.bos is None else [self._special.bos]), *self.encode(text)]
        return ids or [self._special.eos]

    def text_context(self, tokens: Sequence[int]) -> list[int]:
        """Returns the last tokens of a text, on which the first space of what follows may depend; none that is special.

        Args:
            tokens: of the text, special ones included.
        """
        placed = set(self._special.all_ids)
        end = next((at for at in range(len(tokens), 0, -1) if tokens[at - 1] in placed), 0)
        return list(tokens[max(end, len(tokens) - CONTEXT_TOKENS) :])

    def special_id(self, token: str) -> int:
        """Returns the id of one of `SPECIAL_TOKENS`.

        Raises:
            DataError: this tokenizer has none.
        """
        number = self._backend.token_to_id(token)
        if number is None:
            raise DataError(f"{self._place}: the special token {token!r} must be in the vocabulary; it is missing")
        return int(number)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns the merges from texts.

        A corpus with too few pairs to merge gives fewer than `vocab_size` tokens: the model's vocabulary
        is an upper bound, and ids that no text produces are harmless.

        Args:
            texts: read once.
            vocab_size: the special tokens and the 256 bytes are counted in.

        Raises:
            DataError: `vocab_size` has no room for the bytes and the special tokens.
        """
        check_vocab_size(vocab_size)
        backend = tokenizers.Tokenizer(models.BPE())
        splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in SPLIT_PATTERNS]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: Path, key: str = "tokenizer", names: SpecialNames = NAMES_FROM_FILES) -> "Tokenizer":
        """Reads what `save` wrote, or a published tokenizer and the files beside it that name special tokens.

        Args:
            path: of a `tokenizer.json`, or of a `tiktoken.model`.
            key: of the configuration that names it, for errors.
            names: special tokens that the configuration names.

        Raises:
            DataError: the file is missing or is no tokenizer, or nothing says what ends a document.
        """
        beside = read_sidecar_files(path.parent, key)
        try:
            if not path.is_file() or path.stat().st_size > LARGEST_BYTES:
                raise ValueError(f"it must be a file of at most {LARGEST_BYTES} bytes")
            if path.name == TIKTOKEN_NAME:
                content, backend = None, read_tiktoken(path, beside.values.get(TOKENIZER_CONFIG_NAME, {}))
            else:
                content = path.read_bytes()
                backend = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the backend raises bare Exception for anything that it cannot parse
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise DataError(f"{key}: {path} must be a saved tokenizer: {reason}") from error
        return cls(backend, content, f"{key}: {path}", names=names, beside=beside)

    def save(self, path: Path) -> list[Path]:
        """Writes the tokenizer in the format of the `tokenizers` library, a read one byte by byte.

        Beside it goes `tokenizer_config.json` if the names of special tokens cannot be derived without it.

        Returns:
            What was written.
        """
        path.write_bytes(self._content)
        if self._config is None:
            return [path]
        beside = path.with_name(TOKENIZER_CONFIG_NAME)
        beside.write_bytes(self._config)
        return [path, beside]

    def _tokenizer_config(
        self, backend: tokenizers.Tokenizer, names: SpecialNames, beside: SidecarFiles
    ) -> bytes | None:
        """Returns a `tokenizer_config.json` that names the special tokens; None if none is needed."""
        only_config = {name: values for name, values in beside.values.items() if name == TOKENIZER_CONFIG_NAME}
        kept = SidecarFiles(values=only_config, config_content=beside.config_content)
        try:
            if find_special_ids(backend, NAMES_FROM_FILES, kept, self._place) == self._special:
                return beside.config_content
        except DataError:
            pass  # the configuration, or another file, names what this one does not
        values = {**only_config.get(TOKENIZER_CONFIG_NAME, {"tokenizer_class": "PreTrainedTokenizerFast"})}
        if names.bos is not None:
            values["add_bos_token"] = bool(names.bos)
        values |= describe_special(backend, self._special)
        return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `tokenizer.json` as `save` writes it."""
        return hashlib.sha256(self._content).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Every id, of special tokens too, is below it. With gaps between ids it is above the number of tokens."""
        return max(self._backend.get_vocab().values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without begin or end."""
        with self._panics():
            return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel over the machine's cores."""
        with self._panics():
            return [list(item.ids) for item in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    @contextmanager
    def _panics(self) -> Iterator[None]:
        """Turns a panic of the backend, which is no Exception, into an error: a pattern that backtracks without end."""
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise DataError(f"{self._place}: must be able to split any text, is not: {error}") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD. Special tokens show by name unless skipped."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))


def find_tokenizer_file(folder: Path) -> Path | None:
    """Returns the tokenizer's file in a folder, None if there is none of a form that is read."""
    paths = (folder / name for name in (TOKENIZER_NAME, TIKTOKEN_NAME))
    return next((path for path in paths if path.is_file()), None)


def other_tokenizer(folder: Path) -> str:
    """Returns which tokenizer a folder holds in a form that is not read, and how to save it in one; empty if none."""
    names = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).is_file()]
    if not names:
        return ""
    return (
        f'holds {names[0]}, which is read once it is saved as {TOKENIZER_NAME}: python -c "from transformers import '
        f"AutoTokenizer; AutoTokenizer.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')\""
    )


def check_vocab_size(vocab_size: int) -> None:
    """Refuses a vocabulary without room for every byte and every special token.

    Raises:
        DataError: `vocab_size` is too small.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"data.tokenizer_vocab_size: must be at least {MIN_VOCAB_SIZE} (256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens), got {vocab_size}; nearest: {MIN_VOCAB_SIZE}"
        )
