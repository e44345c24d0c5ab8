"""Registers mixtures as a source of text, and opens folders of shards as the corpus of a run.

What the cache lacks is prepared first. Imports no torch.
"""

# Shape legend: N sequences, L tokens per sequence.

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from base.files import replace_file, replacing
from data.config import DataConfig, LongDocumentsConfig, held_out_fraction
from data.corpus import DataError
from data.mix.manifest import Manifest, MixSource, parse_manifest, read_manifest
from data.mix.mixture import ORDER_VERSION, HeldOut, Mixture, hold_out
from data.pack import SampleCounts, entropy_nats
from data.progress import Progress
from data.readers.sources import read_documents
from data.registry import DATA_SOURCES, DataSource, DataSourceEntry, Part
from data.shards.encode import SPLIT_KEY
from data.shards.format import (
    ANY_LENGTH,
    PARTS,
    REPORT_NAME,
    SOURCES_NAME,
    Shard,
    ShardRows,
    open_shards,
    read_json,
    read_report,
    read_unit,
)
from data.shards.units import SETTINGS_NAME
from data.tokenizer import TOKENIZER_NAME, Tokenizer

if TYPE_CHECKING:
    from data.shards.work import BuildSettings

_ENTROPY_TOKENS = 2**20
_LONG = "data.long_documents"


@dataclass(frozen=True, kw_only=True, slots=True)
class LongDocuments:
    """The long documents of a prepared training part."""

    min_document_tokens: int  # tokens from which a document is long
    share: float  # share of the training sequences that hold long documents only
    num_sequences: int  # number of these sequences in the corpus; they precede all others
    tokens: int  # number of their tokens
    other_sequences: int  # number of the sequences without long documents
    other_tokens: int  # number of their tokens

    @property
    def own_share(self) -> float:
        """Share of the corpus's tokens that are in long documents."""
        return self.tokens / (self.tokens + self.other_tokens)

    @property
    def read_share(self) -> float:
        """Share of the tokens that the run reads that are in long documents."""
        return self.share_of(self.share, 1 - self.share)

    def share_of(self, num_long: float, num_others: float) -> float:
        """Returns the share of tokens in long documents, given how many sequences of both kinds are read."""
        long = num_long * self.tokens / max(self.num_sequences, 1)
        others = num_others * self.other_tokens / max(self.other_sequences, 1)
        return long / (long + others)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PreparedPart:
    """The packed sequences of one part. Its arrays are read from disk when they are indexed."""

    tokens_NL: NDArray[np.integer]  # token ids, uint16, int32 or int64
    positions_NL: NDArray[np.int32]  # position within the piece, int32; -1 for padding
    num_tokens: int  # number of tokens without padding
    # further values of the tokens by name, each [N, L, ...]; see `data.pack`.
    values: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prepared:
    """A prepared corpus."""

    tokenizer: Tokenizer  # the given tokenizer, or one that was trained on the training part
    train: PreparedPart
    validation: PreparedPart  # empty if no document was held out
    # entropy of the token frequencies in the validation part, over the tokens that a model predicts (not padding, not
    # the first token of a piece). No model that ignores context has a lower validation loss. Without a validation part,
    # the entropy of the training part.
    unigram_entropy_nats: float
    order: Mixture  # order in which runs read the training part
    held_out: HeldOut  # order in which runs read the validation part
    bytes_per_token: float  # UTF-8 bytes of text per token of the same part, without begin of sentence
    fingerprint: str  # SHA-256 of the arrays; equal if and only if two machines read the same samples
    # number of samples of each part; empty if the source has documents.
    counts: Mapping[Part, SampleCounts] = field(default_factory=dict)
    # long documents of the training part; None: they are packed with others.
    long_documents: LongDocuments | None = None
    is_mixture: bool = False  # whether what is read is also recorded by source, of which the order has the names

    @property
    def parts(self) -> Mapping[Part, PreparedPart]:
        """Both parts by name."""
        return {"train": self.train, "validation": self.validation}


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureSource(DataSource):
    """Sources with weights, prepared as shards."""

    manifest: str | None  # a manifest; None: the one that the folder was prepared from
    folder: str | None  # a folder that launch.prepare wrote; None: the sources are prepared in the cache
    local_cache: str | None  # a folder on a local disk to which the shards are copied once; None: they are not


def _check_mixture(source: MixtureSource, tokenizer: Tokenizer | None) -> None:
    if source.manifest is None and source.folder is None:
        raise DataError(
            "data.folder: a value is needed with data=mix; write data.folder=FOLDER, which python -m launch.prepare "
            "data.manifest=MIX.yaml out=FOLDER makes, or data.manifest=MIX.yaml"
        )
    if source.manifest is not None:
        read_manifest(Path(source.manifest))
    if source.folder is not None:
        read_report(Path(source.folder).expanduser())


DATA_SOURCES.register(
    "mix",
    DataSourceEntry(
        summary="sources mixed by weight, from a manifest or a folder of launch.prepare",
        config=MixtureSource,
        place=lambda source: f"data.folder: {source.folder}" if source.folder else f"data.manifest: {source.manifest}",
        check=_check_mixture,
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFolder:
    """A prepared folder, opened for one sequence length."""

    folder: Path
    report: Mapping[str, Any]  # prepare.json
    manifest: Manifest  # weights of the sources
    length: int
    long: LongDocumentsConfig | None = None  # the training part is read as two sources: long documents, and others

    def shards(self, part: Part) -> dict[str, tuple[Shard, ...]]:
        """Returns the shards of each source that runs read."""
        if self.long is None or part == "validation":
            return {name: open_shards(self.folder, name, part) for name in self.stored_names}
        (name, *_) = self.stored_names
        least = self.long.min_document_tokens
        lengths = (range(least, ANY_LENGTH.stop), range(least))
        return {
            source.name: open_shards(self.folder, name, part, some)
            for source, some in zip(self.manifest.sources, lengths, strict=True)
        }

    @property
    def stored_names(self) -> list[str]:
        """Names of the sources that runs read, as the folder has them."""
        read = [source.name for source in self.manifest.sources]
        return read if self.long is None else list(self.report[SOURCES_NAME])

    def counts(self) -> dict[str, Any]:
        """Returns sequences of each shard and tokens of each source of both parts, and the entropy of tokens.

        They are stored in a file that the first run of a length writes.
        """
        name = f"sequences-{self.length}{f'-{self.long.min_document_tokens}' if self.long else ''}.json"
        decides = {name: source["units"] for name, source in self.report[SOURCES_NAME].items()}
        decides["order"] = [source.name for source in self.manifest.sources]
        with suppress(OSError, ValueError, KeyError, TypeError):
            stored = read_json(self.folder / name)
            if stored["decides"] == decides and self._is_possible(stored):
                return stored
        counts: dict[str, Any] = {"decides": decides, "entropy_nats": 0.0}
        for part in PARTS:
            shards = self.shards(part)
            # Copies, because a shard keeps what it has read.
            counts[part] = {
                name: [len(copy(shard).sequences(self.length)) for shard in opened] for name, opened in shards.items()
            }
            counts[f"{part}_tokens"] = {name: self._count_tokens(part, name, opened) for name, opened in shards.items()}
            if any(counts[f"{part}_tokens"].values()):  # of the held-out part, if there is one
                counts["entropy_nats"] = self._entropy_nats(shards)
        with suppress(OSError):  # a folder that cannot be written is counted by every run
            replace_file(self.folder / name, json.dumps(counts).encode())
        return counts

    def _is_possible(self, counts: Mapping[str, Any]) -> bool:
        """Returns whether stored counts can be those of the shards: a sequence has at least one token."""
        for part in PARTS:
            for name, shards in self.shards(part).items():
                sequences = counts[part][name]
                tokens = counts[f"{part}_tokens"][name]
                is_whole = all(type(count) is int and count >= 0 for count in (*sequences, tokens))
                if not is_whole or len(sequences) != len(shards) or not sum(sequences) <= tokens < 2**48:
                    return False
        return 0 <= float(counts["entropy_nats"]) < 100

    def _count_tokens(self, part: Part, name: str, shards: Iterable[Shard]) -> int:
        if name in self.report[SOURCES_NAME]:
            return int(self.report[SOURCES_NAME][name][part].get("tokens", 0))
        return sum(int(copy(shard).lengths.sum()) for shard in shards)

    def _entropy_nats(self, shards: Mapping[str, tuple[Shard, ...]]) -> float:
        """Returns the entropy of the tokens that a model predicts, with equal shares of the sources."""
        shares_V = np.zeros(self.report["vocab_size"])
        for opened in shards.values():
            counts_V = np.zeros_like(shares_V)
            for shard in opened:
                if counts_V.sum() < _ENTROPY_TOKENS:
                    counts_V += np.bincount(_predicted(copy(shard), self.length), minlength=len(shares_V))
            shares_V += counts_V / max(counts_V.sum(), 1)
        return entropy_nats(shares_V) if shares_V.any() else 0.0

    def mixture(self, seed: int) -> Mixture:
        """Returns the order of the training sequences."""
        sequences = {name: sum(of_shards) for name, of_shards in self.counts()["train"].items()}
        return Mixture(self.manifest, sequences, self.length, seed)


def _predicted(shard: Shard, length: int) -> NDArray[np.unsignedinteger[Any]]:
    """Returns the tokens of a shard's first sequences that are not the first of a piece."""
    document, first, sizes = shard.sequences(length).pieces.T.astype(np.int64)
    num_pieces = int(np.searchsorted(np.cumsum(sizes), _ENTROPY_TOKENS)) + 1
    starts = (shard.starts[document] + first + 1)[:num_pieces]
    sizes = sizes[:num_pieces] - 1
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    predicted: NDArray[np.unsignedinteger[Any]] = shard.read(np.repeat(starts, sizes) + within)
    return predicted


def open_mixture(
    config: DataConfig, source: MixtureSource, tokenizer: Tokenizer | None, length: int, progress: Progress
) -> Prepared:
    """Opens the folder of a run's mixture; without `data.folder`, prepares it in the cache first."""
    if source.folder is None:
        assert source.manifest is not None
        folder = _prepare_in_cache(config, source.manifest, tokenizer, length, progress)
    else:
        folder = Path(source.folder).expanduser()
        check_split(config.punctuation_newline_split, folder)
    opened = open_folder(folder, source.manifest, length)
    stored = Tokenizer.load(folder / TOKENIZER_NAME)
    if stored.vocab_size != opened.report["vocab_size"]:
        raise DataError(
            f"data.folder: {folder / TOKENIZER_NAME} must have the {opened.report['vocab_size']:,} tokens of "
            f"{REPORT_NAME}, has {stored.vocab_size:,}; nearest: prepare the folder again with launch.prepare"
        )
    if tokenizer is not None and tokenizer.fingerprint != stored.fingerprint:
        raise DataError(
            f"data.tokenizer: must be the tokenizer that {str(folder)!r} was prepared with, is {config.tokenizer}; "
            f"nearest: data.tokenizer={folder / TOKENIZER_NAME}"
        )
    if source.local_cache is not None:
        local = copy_locally(folder, Path(source.local_cache).expanduser(), opened.report)
        opened = replace(opened, folder=local)
    return replace(_open(opened, tokenizer or stored, config.seed), is_mixture=True)


def check_split(share: float | None, folder: Path) -> None:
    """Rejects another share of split tokens than that of a prepared folder."""
    if share is not None and share != (stored := _stored_settings(folder).get("punctuation_newline_split", 0.0)):
        rule = f"must be the share that {str(folder)!r} was prepared with"
        raise DataError(f"{SPLIT_KEY}: {rule}, is {share}; nearest: {stored}, or null")


def unused_settings(config: DataConfig) -> str:
    """Returns which shares have no effect, as a folder was prepared with others; empty if all have."""
    source = config.source
    if not isinstance(source, MixtureSource) or source.folder is None:
        return ""
    folder = Path(source.folder).expanduser()
    stored = _stored_settings(folder)
    try:
        rates = {each["fim_rate"] for each in stored[SOURCES_NAME].values()}
        prepared = {"validation_fraction": {stored["validation_fraction"]}, "fim_rate": rates}
        return "; ".join(
            f"data.{key}={getattr(config, key):g} has no effect, as data.folder was prepared with "
            + " and ".join(f"{value:g}" for value in sorted(values))
            for key, values in prepared.items()
            if getattr(config, key) not in values
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"data.folder: {folder / SETTINGS_NAME} must be one of launch.prepare, lacks {error}"
        ) from error


def _stored_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS_NAME
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"data.folder: {path} must be JSON of launch.prepare, is not: {error}") from error


def open_folder(folder: Path, manifest: str | None, length: int) -> ShardFolder:
    """Opens a complete folder, with the weights of another manifest if one is given.

    Raises DataError if the folder is not complete, or lacks a source of the manifest.
    """
    report = read_report(folder)
    if manifest is None:
        chosen = parse_manifest(report.get("manifest"), str(folder / REPORT_NAME), folder)
    else:
        chosen = read_manifest(Path(manifest))
    names = list(report[SOURCES_NAME])
    if missing := [source.name for source in chosen.sources if source.name not in names]:
        raise DataError(
            f"data.folder: must have every source of data.manifest, {str(folder)!r} lacks {missing[0]}, has "
            f"{', '.join(names)}; nearest: python -m launch.prepare data.manifest={manifest} out=NEW_FOLDER"
        )
    return ShardFolder(folder=folder, report=report, manifest=chosen, length=length)


def _prepare_in_cache(
    config: DataConfig, manifest_path: str, tokenizer: Tokenizer | None, length: int, progress: Progress
) -> Path:
    from data.shards.run import build_folder  # imports what builds shards, which most starts do not need

    path = Path(manifest_path).expanduser().absolute()
    settings = _settings(config, str(path), tokenizer, length)
    manifest = read_manifest(path)
    sources = [replace(item, weight=1.0, max_epochs=None) for item in manifest.sources]
    text = replace(manifest, sources=tuple(sources), phases=()).plain()  # weights and phases change no token
    decides = [text, settings.tokenizer, config.validation_fraction, config.fim_rate, config.seed]
    decides += config.split_settings
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]
    folder = Path(config.cache_dir).expanduser() / f"mix-{key}"
    build_folder(settings, tokenizer, folder, len(os.sched_getaffinity(0)), progress)
    return folder


def open_documents(
    config: DataConfig, tokenizer: Tokenizer | None, key: str, length: int, progress: Progress
) -> Prepared:
    """Opens the documents that are in the cache under a key, and prepares them first if they are not."""
    folder = Path(config.cache_dir).expanduser() / f"documents-{key}"
    if not _is_complete(folder):
        _prepare_documents(config, tokenizer, length, folder, progress)
    report = read_report(folder)
    long = config.long_documents
    first, *others = report[SOURCES_NAME]
    weights = (
        {first: 1.0, **dict.fromkeys(others, 0.0)} if long is None else {"long": long.share, "other": 1 - long.share}
    )
    sources = (MixSource(name=name, paths=(), weight=weight) for name, weight in weights.items())
    opened = ShardFolder(
        folder=folder, report=report, manifest=Manifest(sources=tuple(sources)), length=length, long=long
    )
    return _open(opened, tokenizer or Tokenizer.load(folder / TOKENIZER_NAME), config.seed)


def _prepare_documents(
    config: DataConfig, tokenizer: Tokenizer | None, length: int, folder: Path, progress: Progress
) -> None:
    from data.shards.run import build_folder
    from data.shards.work import CORPUS, HELD_OUT

    held_out = config.validation_source
    text = {CORPUS: config.source} | ({} if held_out is None else {HELD_OUT: held_out})
    keys = (document.key for document in read_documents(config.source))
    config = replace(config, validation_fraction=held_out_fraction(config, keys, "documents", progress))
    build_folder(_settings(config, "", tokenizer, length), tokenizer, folder, 1, progress, text)


def _is_complete(folder: Path) -> bool:
    try:
        sources = read_report(folder)[SOURCES_NAME]
    except DataError:
        return False
    named = [(folder / SOURCES_NAME / name, unit) for name, source in sources.items() for unit in source["units"]]
    return all(read_unit(source_folder, unit) is not None for source_folder, unit in named)


def _settings(config: DataConfig, manifest: str, tokenizer: Tokenizer | None, length: int) -> "BuildSettings":
    from data.shards.work import BuildSettings

    trained = {
        "vocab_size": config.tokenizer_vocab_size,
        "special_tokens": list(DATA_SOURCES.get(config.source.kind).special_tokens),
    }
    return BuildSettings(
        manifest=manifest,
        tokenizer=trained if tokenizer is None else {"fingerprint": tokenizer.fingerprint, **tokenizer.token_names},
        validation_fraction=config.validation_fraction,
        fim_rate=config.fim_rate,
        seed=config.seed,
        sequence_length_tokens=length,
        newline_split=config.punctuation_newline_split or 0.0,
        folder_key="data.cache_dir",
    )


def copy_locally(folder: Path, cache: Path, report: Mapping[str, Any]) -> Path:
    """Copies a folder to a local disk, what is not there yet, and returns the copy."""
    name = hashlib.sha256(f"{folder.absolute()}:{json.dumps(report[SOURCES_NAME], sort_keys=True)}".encode())
    local = cache / f"shards-{name.hexdigest()[:32]}"
    try:
        for parent, folders, names in os.walk(folder):  # skips a folder that another process removes
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            (local / Path(parent).relative_to(folder)).mkdir(parents=True, exist_ok=True)
            for path in sorted(Path(parent, name) for name in names if not name.startswith(".")):
                _copy_file(path, local / path.relative_to(folder))
    except OSError as error:
        raise DataError(
            f"data.local_cache: {str(cache)!r} must be a folder with space for {str(folder)!r}: {error}; nearest: null"
        ) from error
    return local


def _copy_file(path: Path, target: Path) -> None:
    """Copies a regular file, unless the target has its size or another process has removed it."""
    with suppress(FileNotFoundError):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and not (target.exists() and target.stat().st_size == status.st_size):
            with replacing(target) as partial:
                shutil.copyfile(path, partial)


def _open(opened: ShardFolder, tokenizer: Tokenizer, seed: int) -> Prepared:
    counts = opened.counts()
    train, validation = (_open_part(opened, part, counts, tokenizer.special.pad) for part in PARTS)
    measured: Part = "validation" if validation.num_tokens else "train"
    sources = [opened.report[SOURCES_NAME][name][measured] for name in opened.stored_names]
    ratios = [
        source.get("text_bytes", 0) / max(1, source["tokens"] - begins)
        for source in sources
        if source.get("tokens")
        for begins in [source.get("documents", 0) if tokenizer.special.bos is not None else 0]
    ]
    return Prepared(
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        unigram_entropy_nats=counts["entropy_nats"],
        bytes_per_token=sum(ratios) / max(len(ratios), 1),
        long_documents=_long_documents(opened, counts),
        order=opened.mixture(seed),
        held_out=hold_out([*map(sum, counts["validation"].values())], seed),
        fingerprint=_fingerprint(opened, counts, seed),
    )


def _open_part(opened: ShardFolder, part: Part, counts: Mapping[str, Any], pad_id: int) -> PreparedPart:
    shards = [*chain.from_iterable(opened.shards(part).values())]
    sequences = [*chain.from_iterable(counts[part].values())]
    read = partial(ShardRows, shards, sequences, opened.length)
    return PreparedPart(
        # Indexed as arrays are, and read from disk only then.
        tokens_NL=cast("NDArray[Any]", read(pad_id)),
        positions_NL=cast("NDArray[Any]", read(None)),
        num_tokens=sum(counts[f"{part}_tokens"].values()),
    )


def _long_documents(opened: ShardFolder, counts: Mapping[str, Any]) -> LongDocuments | None:
    """Returns the counts of long documents. Raises DataError if there are none, or too few others."""
    if (config := opened.long) is None:
        return None
    tokens = counts["train_tokens"]
    if not tokens["long"]:
        longest = max(int(shard.lengths.max(initial=0)) for shard in opened.shards("train")["other"])
        raise DataError(
            f"{_LONG}.min_document_tokens: at least one training document must have as many tokens, the longest has "
            f"{longest}, is {config.min_document_tokens}; nearest: {longest}"
        )
    if not tokens["other"] and config.share < 1:
        raise DataError(
            f"{_LONG}.share: must be 1, because every training document has at least {config.min_document_tokens} "
            f"tokens, is {config.share:g}; nearest: 1, or {_LONG}=null"
        )
    return LongDocuments(
        min_document_tokens=config.min_document_tokens,
        share=config.share,
        num_sequences=sum(counts["train"]["long"]),
        tokens=tokens["long"],
        other_sequences=sum(counts["train"]["other"]),
        other_tokens=tokens["other"],
    )


def _fingerprint(opened: ShardFolder, counts: Mapping[str, Any], seed: int) -> str:
    """Returns what is equal if and only if two machines read the same samples in the same order."""
    manifest = opened.manifest
    weights = [[phase and phase.until_tokens, manifest.weights(phase)] for phase in (*manifest.phases, None)]
    content = [source.get("sha256", source["units"]) for source in opened.report[SOURCES_NAME].values()]
    decides = [ORDER_VERSION, opened.report.get("tokenizer"), content, counts, weights, seed, opened.length]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()
