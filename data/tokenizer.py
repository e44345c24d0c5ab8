"""Text to token ids and back: byte-level BPE with DeepSeek's special tokens. No torch here."""

from collections.abc import Iterable, Sequence
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
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
SPECIAL_TOKENS = (BEGIN_OF_SENTENCE, END_OF_SENTENCE, PAD, FIM_BEGIN, FIM_HOLE, FIM_END, USER, ASSISTANT)

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
    """A trained tokenizer. Text never becomes a special token: those are placed by id alone.

    The special ids are attributes: `begin_of_sentence_id` 0, `end_of_sentence_id` 1, `pad_id` 2,
    `fim_begin_id`, `fim_hole_id`, `fim_end_id`, `user_id`, `assistant_id`.
    Source: arXiv:2412.19437, section 4.1; the names are those of the released tokenizer.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wraps a backend that holds every special token.

        Raises:
            DataError: a special token is missing.
        """
        # Without this, a document that mentions "<｜end▁of▁sentence｜>" would end itself.
        backend.encode_special_tokens = True
        self._backend = backend
        self.begin_of_sentence_id = _special_id(backend, BEGIN_OF_SENTENCE)
        self.end_of_sentence_id = _special_id(backend, END_OF_SENTENCE)
        self.pad_id = _special_id(backend, PAD)
        self.fim_begin_id = _special_id(backend, FIM_BEGIN)
        self.fim_hole_id = _special_id(backend, FIM_HOLE)
        self.fim_end_id = _special_id(backend, FIM_END)
        self.user_id = _special_id(backend, USER)
        self.assistant_id = _special_id(backend, ASSISTANT)

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
    def load(cls, path: Path) -> "Tokenizer":
        """Reads what `save` wrote.

        Raises:
            DataError: the file is missing or is no tokenizer.
        """
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the backend raises bare Exception for anything that it cannot parse
            raise DataError(f"tokenizer: {path} must be a saved tokenizer: {error}") from error
        return cls(backend)

    def save(self, path: Path) -> None:
        """Writes the tokenizer as one JSON file in the format of the `tokenizers` library."""
        path.write_text(self._backend.to_str(), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included: every id is below it."""
        return int(self._backend.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without begin or end."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel over the machine's cores."""
        return [list(item.ids) for item in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

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


def _special_id(backend: tokenizers.Tokenizer, token: str) -> int:
    number = backend.token_to_id(token)
    if number is None:
        raise DataError(f"tokenizer: the special token {token!r} must be in the vocabulary; it is missing")
    return number
