"""Encodes documents and samples as token ids: split, tokenizer, fill-in-the-middle. Imports no torch."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.bulk_encoder import EncodedStrings
from data.config import DataConfig, with_parts
from data.corpus import DataError, hash_unit
from data.newline_split import NewlineSplitter
from data.pack import WEIGHTS, PackedSamples, SampleCounts, entropy_nats, pack_samples
from data.progress import NoProgress, Progress
from data.readers.rows import ReadCounts
from data.registry import DATA_SOURCES, Document, Part, TrainingSample
from data.sources import list_files, read_documents, size_bytes, source_notes
from data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class FimParts:
    """A document cut for fill-in-the-middle (arXiv:2412.19437, 4.1): `prefix + middle + suffix`."""

    prefix: str
    middle: str
    suffix: str


def cut_for_fim(text: str, rate: float, seed: int, key: str) -> FimParts | None:
    """Decides by seed and key whether a document is rearranged, and cuts it at two random characters.

    Cuts are between characters, not tokens, so that a model learns to continue from the middle of a word.
    """
    if rate == 0.0 or hash_unit("fim", seed, key) >= rate:
        return None
    places = len(text) + 1
    begin, end = sorted(int(hash_unit(purpose, seed, key) * places) for purpose in ("fim cut 1", "fim cut 2"))
    return FimParts(prefix=text[:begin], middle=text[begin:end], suffix=text[end:])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncodedDocuments:
    """Tokens of several documents, one after the other, with those that begin and end each."""

    tokens: NDArray[np.unsignedinteger]  # token ids, in `token_dtype`
    lengths: NDArray[np.int64]  # number of tokens of each document


def token_dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    """Returns uint16 if it holds all ids of a tokenizer, otherwise uint32."""
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


class DocumentEncoder:
    """Encodes documents in batches, and compares one document of each batch with `tokenizers`.

    An encoded document is: begin of sentence (if the tokenizer has this token), text or its fill-in-the-middle form,
    end of sentence. `newline_split` is the share of tokens that `data.newline_split` splits.
    """

    def __init__(self, tokenizer: Tokenizer, *, fim_rate: float, seed: int, newline_split: float = 0.0) -> None:
        self._tokenizer = tokenizer
        self._splitter = NewlineSplitter(tokenizer, newline_split, seed) if newline_split else None
        self._fim_rate = 0.0 if tokenizer.special.fim is None else fim_rate
        self._seed = seed
        self._dtype = token_dtype(tokenizer)
        self._vocab_size = tokenizer.vocab_size

    def encode(self, documents: Sequence[Document], draw_keys: Sequence[str]) -> EncodedDocuments:
        """Returns the tokens of documents; a key for each decides whether and where it is cut.

        Raises DataError that names the document if `tokenizers` gives other ids.
        """
        cuts = [
            cut_for_fim(document.text, self._fim_rate, self._seed, key) if document.tokens is None else None
            for document, key in zip(documents, draw_keys, strict=True)
        ]
        strings: list[str] = []
        for document, cut in zip(documents, cuts, strict=True):
            strings.extend([document.text] if cut is None else [cut.prefix, cut.suffix, cut.middle])
        encoded = self._tokenizer.encode_flat(strings)
        self._check_one(documents)
        # Each document has a row: begin of sentence, the three tokens of fill-in-the-middle, end of sentence.
        is_cut = np.array([cut is not None for cut in cuts], dtype=bool)
        num_strings = np.where(is_cut, 3, 1)
        first = np.cumsum(num_strings) - num_strings
        if self._splitter is not None:
            parts = [
                f"{key}:{part}"
                for key, count in zip(draw_keys, num_strings.tolist(), strict=True)
                for part in range(count)
            ]
            encoded = self._splitter.split(encoded, parts)
        if any(document.tokens is not None for document in documents):
            encoded = self._with_token_documents(encoded, documents, first)
        places = encoded.offsets[np.minimum(first[:, None] + np.array([0, 0, 1, 2, 0]), len(strings))]
        places[:, 4] = encoded.offsets[first + num_strings]
        special = self._tokenizer.special
        values = np.array([special.bos or 0, *(special.fim or (0, 0, 0)), special.eos])
        is_placed = np.stack([np.full(len(cuts), special.bos is not None), is_cut, is_cut, is_cut, is_cut | True], 1)
        ids = encoded.ids.astype(self._dtype)
        return EncodedDocuments(
            tokens=np.insert(ids, places[is_placed], np.broadcast_to(values, places.shape)[is_placed]),
            lengths=places[:, 4] - places[:, 0] + is_placed.sum(axis=1),
        )

    def _with_token_documents(
        self, encoded: EncodedStrings, documents: Sequence[Document], first: NDArray[np.int64]
    ) -> EncodedStrings:
        """Inserts the ids of documents that are token ids already, without those that begin and end them."""
        special = self._tokenizer.special
        parts = np.split(encoded.ids, encoded.offsets[1:-1])
        for document, index in zip(documents, first, strict=True):
            if document.tokens is None:
                continue
            ids = document.tokens
            if len(ids) and not 0 <= ids.min() <= ids.max() < self._vocab_size:
                raise DataError(
                    f"{document.key}: token ids must be 0 to {self._vocab_size - 1}, are {ids.min()} to {ids.max()}; "
                    f"nearest: data.tokenizer=PATH of the tokenizer that wrote them"
                )
            begin = int((ids[:1] == special.bos).any())
            end = len(ids) - int((ids[begin:][-1:] == special.eos).any())
            parts[index] = ids[begin:end].astype(np.uint32)
        return EncodedStrings(ids=np.concatenate(parts), offsets=np.cumsum([0, *map(len, parts)]))

    def _check_one(self, documents: Sequence[Document]) -> None:
        if not documents:
            return
        document = documents[int(hash_unit("check", self._seed, documents[0].key) * len(documents))]
        if (token := self._tokenizer.bulk.find_difference(document.text)) is not None:
            raise DataError(
                f"{document.key}: fastokens must give the ids of tokenizers, differs from token {token} of this "
                f"document on; nearest: pip uninstall fastokens, which is slower"
            )


NO_PROGRESS = NoProgress()
PARTS: tuple[Part, ...] = ("train", "validation")

# More text for training the tokenizer takes time and hardly changes its merges.
TOKENIZER_TEXT_BYTES = 64 * 2**20
TOKENIZER_128K_BYTES = 512 * 2**20
TOKENIZER_CHUNK_CHARACTERS = 2**16
ENCODE_BATCH_CHARACTERS = 4 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSize:
    """Size of a part: number of documents, and bytes of their text in UTF-8."""

    num_documents: int
    text_bytes: int


def build_encoded(
    config: DataConfig, loaded: Tokenizer | None, folder: Path, progress: Progress = NO_PROGRESS
) -> dict[str, int | float | str]:
    """Writes `tokenizer.json` and each part's `PART_tokens.npy` and `PART_lengths.npy` into a folder.

    If no tokenizer is given, one is trained. Returns the values for `meta.json`: number of documents,
    bytes of text and tokens of each part. Raises DataError if the source cannot be read.
    """
    sizes, fraction = measure_parts(config, progress, loaded)
    config = replace(config, validation_fraction=fraction)
    tokenizer = loaded or train_tokenizer(config, sizes["train"].text_bytes, progress)
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


def source_tokenizer(config: DataConfig) -> Tokenizer | None:
    """Returns the own tokenizer of the source; None if it has none."""
    build = DATA_SOURCES.get(config.source.kind).tokenizer
    return None if build is None else build(config.source)


def measure_parts(
    config: DataConfig, progress: Progress = NO_PROGRESS, tokenizer: Tokenizer | None = None
) -> tuple[dict[Part, PartSize], float]:
    """Returns each part's size, and a share to hold out that leaves a document to train on."""
    num_documents: dict[Part, int] = {"train": 0, "validation": 0}
    text_bytes: dict[Part, int] = {"train": 0, "validation": 0}
    last = (0.0, 0)  # largest hash of a document, and its bytes
    total = sum(size_bytes(file) for file in list_files(config.source))
    counts = ReadCounts()
    documents = with_parts(config, partial(read_documents, counts=counts))
    for part, document in progress.over("reading the corpus", documents, total, lambda pair: _num_bytes(pair[1])):
        num_documents[part] += 1
        num_bytes = _num_bytes(document, tokenizer)
        text_bytes[part] += num_bytes
        last = max(last, (hash_unit("split", config.seed, document.key), num_bytes))
    for line in source_notes(config.source, counts):
        progress.note(line)
    fraction = config.validation_fraction
    if num_documents["train"] == 0 and num_documents["validation"]:
        fraction = last[0]  # a document is held out if its hash is below the fraction
        for sizes, moved in ((num_documents, 1), (text_bytes, last[1])):
            sizes["train"] = moved
            sizes["validation"] -= moved
        if num_documents["validation"]:
            progress.note(_lowered_line(config, num_documents["validation"] + 1, "documents"))
    measured = {part: PartSize(num_documents=num_documents[part], text_bytes=text_bytes[part]) for part in PARTS}
    return measured, fraction if num_documents["validation"] else 0.0


def _lowered_line(config: DataConfig, count: int, unit: str) -> str:
    return (
        f"data.validation_fraction: {config.validation_fraction} would hold out all {count} {unit}, selected by hash "
        f"with data.seed={config.seed}; the validation set is lowered to {count - 1}"
    )


def read_part(config: DataConfig, part: Part) -> Iterator[Document]:
    """Returns an iterator over the documents of one part, in the source's order."""
    return (document for document_part, document in with_parts(config, read_documents) if document_part == part)


def train_tokenizer(config: DataConfig, train_bytes: int, progress: Progress = NO_PROGRESS) -> Tokenizer:
    """Trains a tokenizer on the training part; of more than 64 MiB of text, on chunks sampled by hash."""
    share = TOKENIZER_TEXT_BYTES / max(train_bytes, 1)

    def chunks() -> Iterator[str]:
        for document in read_part(config, "train"):
            for start in range(0, len(document.text), TOKENIZER_CHUNK_CHARACTERS):
                if hash_unit("tokenizer", config.seed, f"{document.key}@{start}") < share:
                    yield document.text[start : start + TOKENIZER_CHUNK_CHARACTERS]

    total = min(train_bytes, TOKENIZER_TEXT_BYTES)
    read = progress.over("reading text for the tokenizer", chunks(), total, lambda text: len(text.encode()))
    further = DATA_SOURCES.get(config.source.kind).special_tokens
    return Tokenizer.train(read, config.tokenizer_vocab_size, further)


def encode_part(
    config: DataConfig, part: Part, tokenizer: Tokenizer, text_bytes: int = 0, progress: Progress = NO_PROGRESS
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
    """Encodes a part. Returns its concatenated tokens and the length of each document in tokens.

    Only training documents are rearranged for fill-in-the-middle. The validation loss is measured on plain text.
    """
    encoder = DocumentEncoder(tokenizer, fim_rate=config.fim_rate if part == "train" else 0.0, seed=config.seed)
    slow = f" with tokenizers, as fastokens cannot ({reason})" if (reason := tokenizer.bulk.reason) else ""
    tokens: list[NDArray[np.unsignedinteger]] = [np.empty(0, dtype=token_dtype(tokenizer))]
    lengths: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    first = 0
    batches = _batches(read_part(config, part))
    for documents in progress.over(f"encoding the {part} part{slow}", batches, text_bytes, _batch_bytes):
        encoded = encoder.encode(documents, [str(index) for index in range(first, first + len(documents))])
        tokens.append(encoded.tokens)
        lengths.append(encoded.lengths)
        first += len(documents)
    return np.concatenate(tokens), np.concatenate(lengths)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text) if document.tokens is None else len(document.tokens)
        if characters >= ENCODE_BATCH_CHARACTERS:
            yield batch
            batch = []
            characters = 0
    if batch:
        yield batch


def _num_bytes(document: Document, tokenizer: Tokenizer | None = None) -> int:
    """Returns the bytes of a document's text, or of its token ids unless a tokenizer decodes them."""
    if document.tokens is None:
        return len(document.text.encode("utf-8"))
    return document.tokens.nbytes if tokenizer is None else _decoded_bytes(tokenizer, document.tokens.tolist())


def _batch_bytes(documents: Sequence[Document]) -> int:
    return sum(map(_num_bytes, documents))


def has_samples(config: DataConfig) -> bool:
    """Returns whether the source has samples, which are never split, instead of documents."""
    return DATA_SOURCES.get(config.source.kind).samples is not None


def build_samples(
    config: DataConfig, loaded: Tokenizer | None, sequence_length_tokens: int, folder: Path, progress: Progress
) -> dict[str, int | float | str]:
    """Writes `tokenizer.json`, trained if none is known, and each part's packed samples into a folder."""
    tokenizer = loaded or train_tokenizer(config, 0, progress)
    tokenizer.save(folder / "tokenizer.json")
    digest = hashlib.sha256()
    values: dict[str, int | float | str] = {}
    has_targets = DATA_SOURCES.get(config.source.kind).has_targets
    for part, samples in _encode_samples(config, tokenizer, progress).items():
        packed = pack_samples(
            samples, sequence_length_tokens, tokenizer.pad_id, tokenizer.vocab_size, has_targets=has_targets
        )
        if part == "train" and not packed.counts.kept:
            rule = " with a token to predict" if has_targets else ""
            raise DataError(
                f"batch.sequence_length_tokens: {sequence_length_tokens} leaves no sample of {packed.counts.dropped}; "
                f"at least one must fit{rule}; nearest: "
                f"{min(sample.num_tokens for sample in samples)}"
            )
        for array in _write_part(folder, part, packed):
            digest.update(np.ascontiguousarray(array).data)
        values[f"{part}_tokens"] = int((packed.positions_NL >= 0).sum())
        values |= {f"{part}_samples_{name}": count for name, count in asdict(packed.counts).items()}
        if predicted := _predicted_tokens(packed, has_targets=has_targets):
            values["unigram_entropy_nats"] = entropy_nats(np.bincount(predicted).astype(np.int64))
            values["bytes_per_token"] = max(_decoded_bytes(tokenizer, predicted), 1) / len(predicted)
    values["fingerprint"] = digest.hexdigest()
    return values


def _write_part(folder: Path, part: Part, packed: PackedSamples) -> Iterator[NDArray[np.generic]]:
    arrays = {"tokens": packed.tokens_NL, "positions": packed.positions_NL}
    for name, array in {**arrays, **{f"value-{name}": value for name, value in packed.values.items()}}.items():
        np.save(folder / f"{part}_{name}_NL.npy", array)
        yield array


def read_values(folder: Path, part: Part) -> dict[str, NDArray[np.generic]]:
    """Returns the values of a part's tokens by name, memory-mapped."""
    start = f"{part}_value-"
    end = "_NL.npy"
    paths = sorted(folder.glob(f"{start}*{end}"))
    return {path.name.removeprefix(start).removesuffix(end): np.load(path, mmap_mode="r") for path in paths}


def counts_of(values: Mapping[str, int | float | str]) -> dict[Part, SampleCounts]:
    """Returns each part's counts from the values of `meta.json`, nothing for a source of documents."""
    if "train_samples_kept" not in values:
        return {}
    names = [field.name for field in fields(SampleCounts)]
    return {part: SampleCounts(**{name: int(values[f"{part}_samples_{name}"]) for name in names}) for part in PARTS}


def _encode_samples(config: DataConfig, tokenizer: Tokenizer, progress: Progress) -> dict[Part, list[TrainingSample]]:
    encode = DATA_SOURCES.get(config.source.kind).samples
    assert encode is not None
    parts: dict[Part, list[TrainingSample]] = {"train": [], "validation": []}
    for part, sample in with_parts(config, lambda source: encode(source, tokenizer)):
        parts[part].append(sample)
    if not parts["train"] and parts["validation"]:
        count = len(parts["validation"])
        if count > 1:
            progress.note(_lowered_line(config, count, "samples"))
        last = max(range(count), key=lambda number: hash_unit("split", config.seed, parts["validation"][number].key))
        parts["train"].append(parts["validation"].pop(last))
    return parts


def _decoded_bytes(tokenizer: Tokenizer, tokens: list[int]) -> int:
    return len(tokenizer.decode(tokens, skip_special_tokens=True).encode())


def _predicted_tokens(packed: PackedSamples, *, has_targets: bool) -> list[int]:
    """Returns the tokens of all trained predictions in order, or of all prompts if there are no targets."""
    is_predicted_NL = packed.positions_NL[:, 1:] >= 1
    if has_targets and WEIGHTS in packed.values:
        is_predicted_NL &= packed.values[WEIGHTS][:, :-1].astype(bool)
    tokens: list[int] = packed.tokens_NL[:, 1:][is_predicted_NL].tolist()
    return tokens
