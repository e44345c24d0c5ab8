"""A source's documents as token ids: the split, the tokenizer, fill-in-the-middle. No torch here."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data.config import DataConfig
from data.corpus import DataError, hash_unit, is_validation, list_files, read_documents
from data.fim import cut_for_fim, join_fim_tokens
from data.progress import NoProgress, Progress
from data.registry import Document
from data.tokenizer import Tokenizer

Part = Literal["train", "validation"]
NO_PROGRESS = NoProgress()

# Merges settle long before: more text costs time and changes almost no merge.
TOKENIZER_TEXT_BYTES = 64 * 2**20
TOKENIZER_CHUNK_CHARACTERS = 2**16
ENCODE_BATCH_CHARACTERS = 4 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSize:
    """How much text a part holds: documents, and bytes of their UTF-8."""

    num_documents: int
    text_bytes: int


def build_encoded(
    config: DataConfig, given: Tokenizer | None, folder: Path, progress: Progress = NO_PROGRESS
) -> dict[str, int | float | str]:
    """Writes `tokenizer.json` and each part's `PART_tokens.npy` and `PART_lengths.npy` into a folder.

    A document is begin of sentence if the tokenizer has one, its text (or its fill-in-the-middle form), end of
    sentence.

    Args:
        config: says the source and what becomes of its text.
        given: the tokenizer; None: one is trained.
        folder: empty.
        progress: shows how far it is.

    Returns:
        For `meta.json`: each part's documents, bytes of text and tokens.

    Raises:
        DataError: the source cannot be read, or no document would be trained on.
    """
    sizes = measure_parts(config, progress)
    if sizes["validation"].num_documents == 0:
        config = replace(config, validation_fraction=0.0)
    tokenizer = given or train_tokenizer(config, sizes["train"].text_bytes, progress)
    tokenizer.save(folder / "tokenizer.json")
    values: dict[str, int | float | str] = {}
    for part, size in sizes.items():
        tokens, lengths = encode_part(config, part, tokenizer, size.text_bytes, progress)
        np.save(folder / f"{part}_tokens.npy", tokens)
        np.save(folder / f"{part}_lengths.npy", lengths)
        values[f"{part}_documents"] = size.num_documents
        values[f"{part}_bytes"] = size.text_bytes
        values[f"{part}_tokens"] = len(tokens)
    return values


def measure_parts(config: DataConfig, progress: Progress = NO_PROGRESS) -> dict[Part, PartSize]:
    """Reads the source once and says how much each part holds.

    Raises:
        DataError: the source cannot be read, or no document would be trained on; names a fraction that works, if one
            does.
    """
    num_documents: dict[Part, int] = {"train": 0, "validation": 0}
    text_bytes: dict[Part, int] = {"train": 0, "validation": 0}
    units: list[float] = [1.0, 0.0]
    total = sum(file.path.stat().st_size for file in list_files(config.source))
    for document in progress.over("reading the corpus", read_documents(config.source), total, _text_bytes):
        part = _part_of(document, config)
        num_documents[part] += 1
        text_bytes[part] += _text_bytes(document)
        unit = hash_unit("split", config.seed, document.key)
        units = [min(units[0], unit), max(units[1], unit)]
    if num_documents["train"] == 0:
        if num_documents["validation"] != 1:
            raise _empty_train_error(config, num_documents["validation"], *units)
        # A single document is used for training, even if its hash selects validation.
        for sizes in (num_documents, text_bytes):
            sizes["train"], sizes["validation"] = sizes["validation"], 0
    return {part: PartSize(num_documents=num_documents[part], text_bytes=text_bytes[part]) for part in num_documents}


def read_part(config: DataConfig, part: Part) -> Iterator[Document]:
    """The documents of one part, in the source's order."""
    return (document for document in read_documents(config.source) if _part_of(document, config) == part)


def train_tokenizer(config: DataConfig, train_bytes: int, progress: Progress = NO_PROGRESS) -> Tokenizer:
    """The tokenizer of the training part: of all of it, or of a sample of its chunks where it is large.

    Args:
        config: says the source, the split and the vocabulary.
        train_bytes: size of the part's text; beyond 64 MiB, chunks are drawn by the hash of their place.
    """
    share = TOKENIZER_TEXT_BYTES / max(train_bytes, 1)

    def chunks() -> Iterator[str]:
        for document in read_part(config, "train"):
            for start in range(0, len(document.text), TOKENIZER_CHUNK_CHARACTERS):
                if hash_unit("tokenizer", config.seed, f"{document.key}@{start}") < share:
                    yield document.text[start : start + TOKENIZER_CHUNK_CHARACTERS]

    total = min(train_bytes, TOKENIZER_TEXT_BYTES)
    read = progress.over("reading text for the tokenizer", chunks(), total, lambda text: len(text.encode()))
    return Tokenizer.train(read, config.tokenizer_vocab_size)


def encode_part(
    config: DataConfig, part: Part, tokenizer: Tokenizer, text_bytes: int = 0, progress: Progress = NO_PROGRESS
) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """The part's tokens end to end (uint16 where the vocabulary allows, else int32), and each document's length.

    Only training documents are turned fill-in-the-middle, and only if the tokenizer has tokens for it: validation loss
    is that of plain text.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    has_fim = part == "train" and tokenizer.special.fim is not None
    rate = config.fim_rate if has_fim else 0.0
    tokens: list[NDArray[np.integer]] = [np.empty(0, dtype=dtype)]
    lengths: list[int] = []
    first_index = 0
    batches = _batches(read_part(config, part))
    for texts in progress.over(f"encoding the {part} part", batches, text_bytes, _batch_bytes):
        for ids in _encode_texts(texts, rate, config.seed, first_index, tokenizer):
            tokens.append(np.asarray(ids, dtype=dtype))
            lengths.append(len(ids))
        first_index += len(texts)
    return np.concatenate(tokens), np.asarray(lengths, dtype=np.int64)


def _encode_texts(
    texts: Sequence[str], rate: float, seed: int, first_index: int, tokenizer: Tokenizer
) -> Iterator[list[int]]:
    parts = [cut_for_fim(text, rate, seed, first_index + number) for number, text in enumerate(texts)]
    flat: list[str] = []
    for text, cut in zip(texts, parts, strict=True):
        flat.extend([text] if cut is None else [cut.prefix, cut.suffix, cut.middle])
    encoded = iter(tokenizer.encode_batch(flat))
    for cut in parts:
        ids = next(encoded)
        if cut is not None:
            ids = join_fim_tokens(tokenizer, prefix_ids=ids, suffix_ids=next(encoded), middle_ids=next(encoded))
        yield tokenizer.document(ids)


def _batches(documents: Iterator[Document]) -> Iterator[list[str]]:
    """Lists of texts, large enough to keep the tokenizer's threads busy, small enough for the memory."""
    texts: list[str] = []
    characters = 0
    for document in documents:
        texts.append(document.text)
        characters += len(document.text)
        if characters >= ENCODE_BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


def _text_bytes(document: Document) -> int:
    return len(document.text.encode("utf-8"))


def _batch_bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode("utf-8")) for text in texts)


def _part_of(document: Document, config: DataConfig) -> Part:
    return "validation" if is_validation(document.key, config.validation_fraction, config.seed) else "train"


def _empty_train_error(config: DataConfig, num_documents: int, smallest_unit: float, largest_unit: float) -> DataError:
    # A document is held out if its hash lies below the fraction.
    nearest = math.floor(largest_unit * 10**4) / 10**4
    hint = f"; nearest: {nearest}" if smallest_unit < nearest <= largest_unit else ""
    return DataError(
        f"data.validation_fraction: {config.validation_fraction} of {num_documents} documents, drawn by their hash "
        f"with data.seed {config.seed}, leaves the train part empty; it must hold at least one document{hint}"
    )
