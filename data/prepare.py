"""Prepares a corpus on disk, once: tokenizer, packed sequences and their statistics. Imports no torch.

An entry of the cache is complete or absent, even after crashes or concurrent builds.
"""

# Shape legend: N sequences, L tokens per sequence.

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.config import DataConfig, LongDocumentsConfig
from data.corpus import DataError
from data.encode import NO_PROGRESS, build_encoded, build_samples, counts_of, has_samples, read_values, source_tokenizer
from data.mix.mixture import HeldOut, Mixture, hold_out, order_by_shares, single_order
from data.pack import LongDocuments, SampleCounts, entropy_nats, pack_documents, pack_long_first
from data.progress import Progress
from data.readers.files import compression_of, format_of
from data.registry import DATA_SOURCES, DataSource, Part
from data.sources import check_source, list_files, read_beginning, size_bytes
from data.special_tokens import TOKENIZER_CONFIG_NAME, SpecialNames
from data.tokenizer import SPECIAL_TOKENS, Tokenizer, check_vocab_size

# Part of every cache entry's name. Increase it if the same settings produce different files.
FORMAT_VERSION = 4
_SAMPLE_BYTES = 2**18
_MOST_BYTES_PER_TOKEN = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheEntry:
    """A complete folder and the values that its builder stored in `meta.json`."""

    folder: Path
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prepared:
    """A prepared corpus. The arrays are memory-mapped from disk."""

    tokenizer: Tokenizer  # the given tokenizer, or one that was trained on the training part
    train_tokens_NL: NDArray[np.integer]  # token ids of the training part, uint16 or int32
    train_positions_NL: NDArray[np.int32]  # position within the piece, int32; -1 for padding
    validation_tokens_NL: NDArray[np.integer]  # as for training; empty if no document was held out
    validation_positions_NL: NDArray[np.int32]  # as for training; empty if no document was held out
    train_tokens: int  # number of tokens in the training part, without padding
    validation_tokens: int  # number of tokens in the validation part, without padding
    # entropy of the token frequencies in the validation part, over the tokens that a model predicts (not padding, not
    # the first token of a piece). No model that ignores context has a lower validation loss. Without a validation part,
    # the entropy of the training part.
    unigram_entropy_nats: float
    order: Mixture  # order in which runs read the training part
    held_out: HeldOut  # order in which runs read the validation part
    bytes_per_token: float  # UTF-8 bytes of text per token of the same part, without begin of sentence
    fingerprint: str  # SHA-256 of the arrays; equal if and only if two machines read the same samples
    # further values of the training part's tokens by name, each [N, L, ...]; see `data.pack`.
    train_values: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    validation_values: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)  # as for training
    # number of samples of each part; empty if the source has documents.
    counts: Mapping[Part, SampleCounts] = field(default_factory=dict)
    # long documents of the training part; None: they are packed with others.
    long_documents: LongDocuments | None = None
    is_mixture: bool = False  # whether what is read is also recorded by source, of which the order has the names


def check_config(config: DataConfig) -> int:
    """Rejects invalid data settings in less than a second; token ids are below the returned vocabulary."""
    entry = DATA_SOURCES.get(config.source.kind)
    if config.tokenizer is None:
        if entry.tokenizer is None:
            check_vocab_size(config.tokenizer_vocab_size, len(SPECIAL_TOKENS) + len(entry.special_tokens))
        _check_no_names(config)
    if not 0.0 < config.validation_fraction < 1.0:
        raise DataError(
            f"data.validation_fraction: must be between 0 and 1, both excluded, got {config.validation_fraction}; "
            f"nearest: {0.01 if config.validation_fraction <= 0.0 else 0.99}"
        )
    if not 0.0 <= config.fim_rate <= 1.0:
        raise DataError(
            f"data.fim_rate: must be between 0 and 1, got {config.fim_rate}; "
            f"nearest: {0.0 if config.fim_rate < 0.0 else 1.0}"
        )
    if config.long_documents is not None and has_samples(config):
        raise DataError(
            f"data.long_documents: must be null with data.kind={config.source.kind}, which has samples instead of "
            f"documents; nearest: null"
        )
    tokenizer = find_tokenizer(config)
    _check_source(config.source, tokenizer)
    _check_validation_paths(config, tokenizer)
    return config.tokenizer_vocab_size if tokenizer is None else tokenizer.vocab_size


def _check_source(source: DataSource, tokenizer: Tokenizer | None) -> None:
    check = DATA_SOURCES.get(source.kind).check
    if check is None:
        check_source(source)
    else:
        check(source, tokenizer)


def _check_validation_paths(config: DataConfig, tokenizer: Tokenizer | None) -> None:
    """Rejects held-out files that cannot be read, or that are also trained on."""
    if config.validation_paths is None:
        return
    key = "data.validation_paths"
    kind = config.source.kind
    if not hasattr(config.source, "paths"):
        raise DataError(f"{key}: must be null with data.kind={kind}, which has no paths; nearest: null")
    assert config.validation_source is not None
    try:
        _check_source(config.validation_source, tokenizer)
    except DataError as error:
        raise DataError(str(error).replace("data.paths", key)) from error
    trained = {file.path.resolve() for file in list_files(config.source)}
    if both := [str(file.path) for file in list_files(config.validation_source) if file.path.resolve() in trained]:
        raise DataError(f"{key}: must name files that data.paths does not, names {both[0]}; nearest: null, or others")


def estimate_tokens(config: DataConfig, enough: float) -> float | None:
    """Returns about how many tokens a source's files hold, rather too many; None if sizes do not say.

    Reads the sizes of files, and at most the first 256 KiB of text. None also means that they certainly hold `enough`.
    """
    entry = DATA_SOURCES.get(config.source.kind)
    size = 0
    files = entry.files(config.source)
    for file in files:
        if format_of(file.path) in ("parquet", "arrow", "megatron") or compression_of(file.path) is not None:
            return None
        size += size_bytes(file)
        if size >= enough * _MOST_BYTES_PER_TOKEN:
            return None
    if not files:
        return None
    tokenizer = read_tokenizer(config)
    if tokenizer is None or entry.samples is not None:
        return float(size)  # at most one token for each byte
    documents = [document.text for document in read_beginning(config.source, _SAMPLE_BYTES)]
    tokens = sum(len(tokenizer.document(ids)) for ids in tokenizer.encode_batch(documents))
    return size * tokens / max(1, sum(len(text.encode()) for text in documents))


def find_tokenizer(config: DataConfig) -> Tokenizer | None:
    """Returns the given tokenizer or the source's own one, or None if a tokenizer must be trained."""
    return read_tokenizer(config) or source_tokenizer(config)


def read_tokenizer(config: DataConfig) -> Tokenizer | None:
    """Loads the given tokenizer, if there is one, or raises DataError."""
    if config.tokenizer is None:
        return None
    names = SpecialNames(bos=config.tokenizer_bos, eos=config.tokenizer_eos, pad=config.tokenizer_pad)
    return Tokenizer.load(Path(config.tokenizer).expanduser(), "data.tokenizer", names)


def _check_no_names(config: DataConfig) -> None:
    """Rejects names of special tokens if a tokenizer is trained, because it has its own special tokens."""
    for key in ("tokenizer_bos", "tokenizer_eos", "tokenizer_pad"):
        if getattr(config, key) is not None:
            raise DataError(
                f"data.{key}: must be null if a tokenizer is trained, is {getattr(config, key)!r}; "
                f"nearest: null, or data.tokenizer=PATH"
            )


def prepare(config: DataConfig, sequence_length_tokens: int, progress: Progress = NO_PROGRESS) -> Prepared:
    """Opens the corpus, packed for a sequence length of at least 2. Builds what is not in the cache yet.

    `config.cache_dir`, in which `~` is allowed, has two levels: encoded documents, and packed sequences for each
    length. The names of the entries depend on the settings, on a given tokenizer's content, and on every file's path,
    size and modification time. Any number of processes may call this function concurrently. Raises DataError as
    `check_config`, or if a part would be empty, or if the cache cannot be written.
    """
    if sequence_length_tokens < 2:
        raise DataError(
            f"batch.sequence_length_tokens: must be at least 2, one token to read and one to predict, "
            f"got {sequence_length_tokens}; nearest: 2"
        )
    if (open_prepared := DATA_SOURCES.get(config.source.kind).prepare) is not None:
        return open_prepared(config, sequence_length_tokens, progress)
    cache_dir = Path(config.cache_dir).expanduser()
    tokenizer = find_tokenizer(config)
    encoded_name = f"encoded-{_encoded_key(config, tokenizer)}"

    def build(folder: Path) -> Mapping[str, int | float | str]:
        check_config(config)
        if has_samples(config):
            return build_samples(config, tokenizer, sequence_length_tokens, folder, progress)
        encoded = open_or_build(
            cache_dir, encoded_name, lambda inner: build_encoded(config, tokenizer, inner, progress)
        )
        return _build_packed(encoded, sequence_length_tokens, config.long_documents, folder)

    long = "" if config.long_documents is None else f"long-{config.long_documents.min_document_tokens}-"
    entry = open_or_build(cache_dir, f"packed-{sequence_length_tokens}-{long}{encoded_name}", build)
    return _open_prepared(entry, config)


def _encoded_key(config: DataConfig, tokenizer: Tokenizer | None) -> str:
    files = []
    held_out = () if config.validation_source is None else list_files(config.validation_source)
    for file in (*list_files(config.source), *held_out):
        status = file.path.stat()
        files.append((file.key, str(file.path.resolve()), status.st_size, status.st_mtime_ns))
    special = None if tokenizer is None else [*tokenizer.special.all_ids, tokenizer.token_names]
    settings = [
        FORMAT_VERSION,
        config.source.kind,
        DATA_SOURCES.get(config.source.kind).settings(config.source),
        special,
        config.tokenizer_vocab_size if tokenizer is None else tokenizer.fingerprint,
        config.validation_fraction,
        config.fim_rate,
        config.seed,
        files,
        *([len(held_out)] if held_out else []),
    ]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def _build_packed(
    encoded: CacheEntry, sequence_length_tokens: int, long: LongDocumentsConfig | None, folder: Path
) -> dict[str, int | float | str]:
    for name in ("tokenizer.json", TOKENIZER_CONFIG_NAME):
        if (encoded.folder / name).exists():
            shutil.copyfile(encoded.folder / name, folder / name)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    digest = hashlib.sha256()
    values: dict[str, int | float | str] = {}
    for part in ("train", "validation"):
        tokens = np.load(encoded.folder / f"{part}_tokens.npy", mmap_mode="r")
        lengths = np.load(encoded.folder / f"{part}_lengths.npy")
        if part == "train" and long is not None:
            packed, counts = pack_long_first(tokens, lengths, sequence_length_tokens, tokenizer.pad_id, long)
            values |= counts
        else:
            packed = pack_documents(tokens, lengths, sequence_length_tokens, tokenizer.pad_id)
        for name, array in (("tokens", packed.tokens_NL), ("positions", packed.positions_NL)):
            np.save(folder / f"{part}_{name}_NL.npy", array)
            digest.update(array.data)
        values[f"{part}_tokens"] = len(tokens)
        # If there is a validation part, its statistics overwrite those of the training part.
        if len(tokens):
            predicted = packed.tokens_NL[packed.positions_NL >= 1]
            begins = 0 if tokenizer.begin_of_sentence_id is None else len(lengths)
            values["unigram_entropy_nats"] = entropy_nats(np.bincount(predicted).astype(np.int64))
            values["bytes_per_token"] = encoded.values[f"{part}_bytes"] / (len(tokens) - begins)
    values["fingerprint"] = digest.hexdigest()
    return values


def _open_prepared(entry: CacheEntry, config: DataConfig) -> Prepared:
    arrays = {
        name: np.load(entry.folder / f"{name}.npy", mmap_mode="r")
        for name in ("train_tokens_NL", "train_positions_NL", "validation_tokens_NL", "validation_positions_NL")
    }
    num_sequences = len(arrays["train_tokens_NL"])
    long = None if config.long_documents is None else _open_long(entry, config.long_documents, num_sequences)
    order = single_order(num_sequences, config.seed)
    if long is not None:
        counts = {"long": long.num_sequences, "other": long.other_sequences}
        order = order_by_shares(counts, (long.share, 1 - long.share), config.seed)
    return Prepared(
        tokenizer=Tokenizer.load(entry.folder / "tokenizer.json"),
        train_tokens_NL=arrays["train_tokens_NL"],
        train_positions_NL=arrays["train_positions_NL"],
        validation_tokens_NL=arrays["validation_tokens_NL"],
        validation_positions_NL=arrays["validation_positions_NL"],
        train_tokens=int(entry.values["train_tokens"]),
        validation_tokens=int(entry.values["validation_tokens"]),
        unigram_entropy_nats=float(entry.values["unigram_entropy_nats"]),
        bytes_per_token=float(entry.values["bytes_per_token"]),
        order=order,
        held_out=hold_out([len(arrays["validation_tokens_NL"])], config.seed),
        fingerprint=_fingerprint(entry, config.long_documents),
        train_values=read_values(entry.folder, "train"),
        validation_values=read_values(entry.folder, "validation"),
        counts=counts_of(entry.values),
        long_documents=long,
    )


def _fingerprint(entry: CacheEntry, config: LongDocumentsConfig | None) -> str:
    """Returns the fingerprint of the arrays and of the share of long documents, which a step depends on."""
    arrays = str(entry.values["fingerprint"])
    return arrays if config is None else hashlib.sha256(f"{arrays}:{config.share!r}".encode()).hexdigest()


def _open_long(entry: CacheEntry, config: LongDocumentsConfig, num_sequences: int) -> LongDocuments:
    num_long = int(entry.values["long_sequences"])
    return LongDocuments(
        min_document_tokens=config.min_document_tokens,
        share=config.share,
        num_sequences=num_long,
        tokens=int(entry.values["long_tokens"]),
        other_sequences=num_sequences - num_long,
        other_tokens=int(entry.values["other_tokens"]),
    )


META_NAME = "meta.json"

# An installation can fail only while other processes replace the same broken entry.
INSTALL_ATTEMPTS = 5


def open_or_build(cache_dir: Path, name: str, build: Callable[[Path], Mapping[str, int | float | str]]) -> CacheEntry:
    """Returns the cache entry with a name, which must identify everything that its content depends on.

    `build` fills an empty folder and returns the values to store. It runs if the entry is missing, or if `meta.json` or
    a file size is wrong. The folder is written to disk completely and then renamed. Concurrent processes may each build
    the same entry; the first rename wins, and the others use its result. Raises DataError if `cache_dir` cannot be
    written.
    """
    folder = cache_dir / name
    entry = _open_entry(folder)
    if entry is not None:
        return entry
    building = cache_dir / f".building-{name}-{uuid.uuid4().hex}"
    try:
        building.mkdir(parents=True)
        _write_meta(building, build(building))
        for _ in range(INSTALL_ATTEMPTS):
            _install(building, folder)
            entry = _open_entry(folder)
            if entry is not None:
                return entry
    except OSError as error:
        raise DataError(
            f"data.cache_dir: {str(cache_dir)!r} must be a folder that can be written: {error}"
            f"{_nearest_folder(cache_dir)}"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    raise DataError(f"data.cache_dir: {folder} was built but cannot be read back; something else writes there")


def _open_entry(folder: Path) -> CacheEntry | None:
    try:
        meta = json.loads((folder / META_NAME).read_text(encoding="utf-8"))
        is_complete = all((folder / name).stat().st_size == size for name, size in meta["file_bytes"].items())
        return CacheEntry(folder=folder, values=meta["values"]) if is_complete else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write_meta(folder: Path, values: Mapping[str, int | float | str]) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    meta = {"file_bytes": sizes, "values": dict(values)}
    (folder / META_NAME).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        _flush(path)


def _install(building: Path, folder: Path) -> None:
    """Renames a finished folder to its final name. Replaces a broken entry, keeps a complete one."""
    with _lock_entries(folder.parent):
        if _open_entry(folder) is not None:
            return
        # Try the rename first, so that an entry that another process has just installed is never moved away.
        if not _try_rename(building, folder) and _open_entry(folder) is None:
            _remove_entry(folder)
            _try_rename(building, folder)
        _flush(folder.parent)


@contextlib.contextmanager
def _lock_entries(cache_dir: Path) -> Iterator[None]:
    """Lets one process at a time replace entries: another could move away an entry that is now complete."""
    descriptor = os.open(cache_dir, os.O_RDONLY)
    try:
        # Without file locks, only the atomicity of the rename remains. A lock is released when its process ends.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _try_rename(building: Path, folder: Path) -> bool:
    try:
        building.rename(folder)
    except OSError as error:
        # The name is taken; or, without file locks, another process moved this folder away.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.ENOENT):
            raise
        return False
    return True


def _remove_entry(folder: Path) -> None:
    # Renamed before it is deleted, so that no process sees a partly deleted entry.
    broken = folder.with_name(f".broken-{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(broken)
        if broken.is_dir():
            shutil.rmtree(broken)
        else:
            broken.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _nearest_folder(path: Path) -> str:
    for parent in path.absolute().parents:
        if parent.is_dir() and os.access(parent, os.W_OK):
            return f"; nearest: {str(parent)!r}"
    return ""
