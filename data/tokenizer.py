"""Text to token ids and back: byte-level BPE with DeepSeek's special tokens. No torch here."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.corpus import DataError

BEGIN_OF_SENTENCE = "<｜begin▁of▁sentence｜>"
END_OF_SENTENCE = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_END = "<｜fim▁end｜>"
FIM_TOKENS = (FIM_BEGIN, FIM_HOLE, FIM_END)
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
SPECIAL_TOKENS = (BEGIN_OF_SENTENCE, END_OF_SENTENCE, PAD, *FIM_TOKENS, USER, ASSISTANT)

LARGEST_BYTES = 2**28
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
    """A trained tokenizer, ours or a released one. Text never becomes a special token: those are placed by id alone.

    A tokenizer of ours has all of `SPECIAL_TOKENS`, first and in that order; another one need not, and asking for an id
    that it has not is a DataError.
    Source: arXiv:2412.19437, section 4.1; the names are those of the released tokenizer.
    """

    def __init__(self, backend: tokenizers.Tokenizer, content: bytes | None = None, place: str = "tokenizer") -> None:
        """Wraps a backend.

        Args:
            backend: becomes this tokenizer's own.
            content: of the file that it was read from, None for a new one.
            place: names it in errors.
        """
        self._content = backend.to_str().encode() if content is None else content
        self._place = place
        # A file may ask for texts that are cut or filled up to a length.
        backend.no_truncation()
        backend.no_padding()
        # The released file declares some of these plain; then, and without the second line, a document that mentions
        # "<｜end▁of▁sentence｜>" would end itself.
        backend.add_special_tokens([token for token in SPECIAL_TOKENS if backend.token_to_id(token) is not None])
        backend.encode_special_tokens = True
        self._backend = backend

    @property
    def begin_of_sentence_id(self) -> int:
        """Stands before every document."""
        return self.special_id(BEGIN_OF_SENTENCE)

    @property
    def end_of_sentence_id(self) -> int:
        """Stands behind every document."""
        return self.special_id(END_OF_SENTENCE)

    @property
    def pad_id(self) -> int:
        """Fills what is left of a sequence."""
        return self.special_id(PAD)

    def special_id(self, token: str) -> int:
        """The id of one of `SPECIAL_TOKENS`.

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
    def load(cls, path: Path, key: str = "tokenizer") -> "Tokenizer":
        """Reads what `save` wrote, or a released `tokenizer.json`.

        Args:
            path: of the file.
            key: of the configuration that names it, for errors.

        Raises:
            DataError: the file is missing or is no tokenizer, or it has no begin or end of sentence.
        """
        try:
            if not path.is_file() or path.stat().st_size > LARGEST_BYTES:
                raise ValueError(f"it must be a file of at most {LARGEST_BYTES} bytes")
            content = path.read_bytes()
            backend = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the backend raises bare Exception for anything that it cannot parse
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise DataError(f"{key}: {path} must be a saved tokenizer: {reason}") from error
        tokenizer = cls(backend, content, f"{key}: {path}")
        for token in (BEGIN_OF_SENTENCE, END_OF_SENTENCE):
            tokenizer.special_id(token)
        return tokenizer

    def save(self, path: Path) -> None:
        """Writes the tokenizer as one JSON file in the format of the `tokenizers` library, a read one byte by byte."""
        path.write_bytes(self._content)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what `save` writes."""
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
