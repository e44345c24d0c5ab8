"""Checks the data of a run, and opens them; what the cache lacks is prepared first. Imports no torch."""

import hashlib
import json
from pathlib import Path

from data.chat.encode import check_template
from data.config import DataConfig
from data.corpus import DataError
from data.progress import NO_PROGRESS, Progress
from data.readers.files import compression_of, format_of
from data.readers.sources import check_source, list_files, read_beginning, size_bytes
from data.registry import DATA_SOURCES, DataSource
from data.shards.encode import none_to_split
from data.shards.format import FORMAT_VERSION
from data.shards.open import MixtureSource, Prepared, check_split, open_documents, open_mixture
from data.shards.samples import open_samples
from data.special_tokens import SpecialNames
from data.tokenizer import SPECIAL_TOKENS, Tokenizer, check_vocab_size

_SAMPLE_BYTES = 2**18
_MOST_BYTES_PER_TOKEN = 16


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
    for key in ("long_documents", "punctuation_newline_split"):
        if getattr(config, key) is not None and entry.samples is not None:
            raise DataError(
                f"data.{key}: must be null with data.kind={config.source.kind}, which has samples instead of "
                f"documents; nearest: null"
            )
    tokenizer = find_tokenizer(config)
    if tokenizer is not None:
        none_to_split(tokenizer, config.punctuation_newline_split)  # rejects a tokenizer that cannot be split
    _check_source(config.source, tokenizer)
    if isinstance(config.source, MixtureSource) and config.source.folder is not None:
        check_split(config.punctuation_newline_split, Path(config.source.folder).expanduser())
    _check_validation_paths(config, tokenizer)
    return config.tokenizer_vocab_size if tokenizer is None else tokenizer.vocab_size


def _check_source(source: DataSource, tokenizer: Tokenizer | None) -> None:
    entry = DATA_SOURCES.get(source.kind)
    if source.chat_template is not None:
        check_template(source.chat_template, tokenizer)
    if entry.check is None:
        check_source(source)
    else:
        entry.check(source, tokenizer)


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
    build = DATA_SOURCES.get(config.source.kind).tokenizer
    return read_tokenizer(config) or (None if build is None else build(config.source))


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

    The names of entries of `config.cache_dir`, in which `~` is allowed, depend on the settings, on a given tokenizer's
    content, and on every file's path, size and modification time. Any number of processes may call this function
    concurrently. Raises DataError as `check_config`, or if a part would be empty, or if the cache cannot be written.
    """
    if sequence_length_tokens < 2:
        raise DataError(
            f"batch.sequence_length_tokens: must be at least 2, one token to read and one to predict, "
            f"got {sequence_length_tokens}; nearest: 2"
        )
    tokenizer = find_tokenizer(config)
    if isinstance(config.source, MixtureSource):
        return open_mixture(config, config.source, tokenizer, sequence_length_tokens, progress)
    key = _cache_key(config, tokenizer)
    if not any(Path(config.cache_dir).expanduser().glob(f"*-{key}")):
        check_config(config)
    open_parts = open_documents if DATA_SOURCES.get(config.source.kind).samples is None else open_samples
    return open_parts(config, tokenizer, key, sequence_length_tokens, progress)


def _cache_key(config: DataConfig, tokenizer: Tokenizer | None) -> str:
    """Returns a hash of what decides the tokens: settings, the tokenizer, and size and time of every file."""
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
        *config.split_settings,
    ]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
