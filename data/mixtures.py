"""Opens a folder that `launch.prepare` wrote as the corpus of a run, or prepares it in the cache.

Imports no torch.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from data.build.run import build_folder
from data.build.work import BuildSettings
from data.config import DataConfig
from data.corpus import DataError
from data.mix.manifest import Manifest, parse_manifest, read_manifest
from data.mix.mixture import Mixture, hold_out
from data.mix.rows import ShardRows
from data.pack import entropy_nats
from data.prepare import Prepared, find_tokenizer
from data.progress import Progress
from data.registry import Part
from data.shards import REPORT_NAME, SOURCES_NAME, Shard, open_shards, read_report, replace_file
from data.tokenizer import TOKENIZER_NAME, Tokenizer

if TYPE_CHECKING:
    from data.mix.source import MixtureSource

_ENTROPY_TOKENS = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureFolder:
    """A prepared folder, opened for one sequence length."""

    folder: Path
    report: Mapping[str, Any]  # prepare.json
    manifest: Manifest
    length: int
    counts: Mapping[Part, Mapping[str, Sequence[int]]]  # sequences of each shard of a source

    def mixture(self, seed: int) -> Mixture:
        """Returns the order of the training sequences."""
        return Mixture(self.manifest, self.sequences("train"), self.length, seed)

    def sequences(self, part: Part) -> dict[str, int]:
        """Returns the number of a part's sequences of each source."""
        return {source.name: sum(self.counts[part][source.name]) for source in self.manifest.sources}

    def shards(self, part: Part) -> dict[str, tuple[Shard, ...]]:
        """Returns the shards of each source."""
        return {source.name: open_shards(self.folder, source.name, part) for source in self.manifest.sources}


def open_mixture(
    config: DataConfig, place: "MixtureSource", sequence_length_tokens: int, progress: Progress
) -> Prepared:
    """Opens the folder of a run's mixture; without `data.folder`, prepares it in the cache first."""
    tokenizer = find_tokenizer(config)
    if place.folder is None:
        assert place.manifest is not None
        folder = _prepare_in_cache(config, place.manifest, tokenizer, sequence_length_tokens, progress)
    else:
        folder = Path(place.folder).expanduser()
    opened = open_folder(folder, place.manifest, sequence_length_tokens)
    stored = Tokenizer.load(folder / TOKENIZER_NAME)
    if tokenizer is not None and tokenizer.fingerprint != stored.fingerprint:
        raise DataError(
            f"data.tokenizer: must be the tokenizer that {str(folder)!r} was prepared with, is {config.tokenizer}; "
            f"nearest: data.tokenizer={folder / TOKENIZER_NAME}"
        )
    if place.local_cache is not None:
        local = copy_locally(folder, Path(place.local_cache).expanduser(), opened.report)
        opened = replace(opened, folder=local)
    return _prepared(opened, tokenizer or stored, config.seed)


def open_folder(folder: Path, manifest: str | None, sequence_length_tokens: int) -> MixtureFolder:
    """Opens a complete folder, with the weights of another manifest if one is given.

    Raises DataError if the folder is not complete, or lacks a source of the manifest.
    """
    report = read_report(folder)
    if manifest is None:
        chosen = parse_manifest(report["manifest"], str(folder / REPORT_NAME), folder)
    else:
        chosen = read_manifest(Path(manifest))
    names = list(report[SOURCES_NAME])
    if missing := [source.name for source in chosen.sources if source.name not in names]:
        raise DataError(
            f"data.folder: must have every source of data.manifest, {str(folder)!r} lacks {missing[0]}, has "
            f"{', '.join(names)}; nearest: python -m launch.prepare data.manifest={manifest} out=NEW_FOLDER"
        )
    counts = _sequence_counts(folder, report, sequence_length_tokens)
    return MixtureFolder(folder=folder, report=report, manifest=chosen, length=sequence_length_tokens, counts=counts)


def _sequence_counts(folder: Path, report: Mapping[str, Any], length: int) -> dict[Part, dict[str, list[int]]]:
    """Returns the number of sequences of every shard, from a file that the first run of a length writes."""
    path = folder / f"sequences-{length}.json"
    units = {name: source["units"] for name, source in report[SOURCES_NAME].items()}
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored: dict[str, Any] = json.loads(path.read_bytes())
        if stored["units"] == units:
            return cast("dict[Part, dict[str, list[int]]]", stored["counts"])
    parts: tuple[Part, ...] = ("train", "validation")
    counts = {
        part: {name: [len(shard.sequences(length)) for shard in open_shards(folder, name, part)] for name in units}
        for part in parts
    }
    with suppress(OSError):  # a folder that cannot be written is counted by every run
        replace_file(path, json.dumps({"units": units, "counts": counts}).encode())
    return counts


def _prepare_in_cache(
    config: DataConfig, manifest_path: str, tokenizer: Tokenizer | None, length: int, progress: Progress
) -> Path:
    path = Path(manifest_path).expanduser().absolute()
    settings = BuildSettings(
        manifest=str(path),
        tokenizer={"vocab_size": config.tokenizer_vocab_size}
        if tokenizer is None
        else {"fingerprint": tokenizer.fingerprint, **tokenizer.token_names},
        validation_fraction=config.validation_fraction,
        fim_rate=config.fim_rate,
        seed=config.seed,
        sequence_length_tokens=length,
    )
    manifest = read_manifest(path)
    sources = [replace(item, weight=1.0, max_epochs=None) for item in manifest.sources]
    text = replace(manifest, sources=tuple(sources), phases=()).plain()  # weights and phases change no token
    decides = [text, settings.tokenizer, config.validation_fraction, config.fim_rate, config.seed]
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]
    folder = Path(config.cache_dir).expanduser() / f"mix-{key}"
    build_folder(settings, tokenizer, folder, len(os.sched_getaffinity(0)), progress)
    return folder


def copy_locally(folder: Path, cache: Path, report: Mapping[str, Any]) -> Path:
    """Copies a folder to a local disk, what is not there yet, and returns the copy."""
    name = hashlib.sha256(f"{folder.absolute()}:{json.dumps(report[SOURCES_NAME], sort_keys=True)}".encode())
    local = cache / f"shards-{name.hexdigest()[:32]}"
    try:
        for path in sorted(folder.rglob("*")):
            target = local / path.relative_to(folder)
            if path.name.startswith(".") or path.is_dir():
                continue
            if target.exists() and target.stat().st_size == path.stat().st_size:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
            try:
                shutil.copyfile(path, partial)
                partial.rename(target)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"data.local_cache: {str(cache)!r} must be a folder with space for {str(folder)!r}: {error}; nearest: null"
        ) from error
    return local


def _prepared(opened: MixtureFolder, tokenizer: Tokenizer, seed: int) -> Prepared:
    sources = [opened.report[SOURCES_NAME][source.name] for source in opened.manifest.sources]
    mixture = opened.mixture(seed)
    rows = {}
    for part in opened.counts:
        shards = opened.shards(part)
        flat = [shard for name in mixture.names for shard in shards[name]]
        counts = [count for name in mixture.names for count in opened.counts[part][name]]
        for holds, pad_id in (("tokens", tokenizer.pad_id), ("positions", None)):
            # Indexed as an array is, and read from disk only then.
            rows[part, holds] = cast("NDArray[Any]", ShardRows(flat, counts, opened.length, pad_id))
    measured: Part = "validation" if any(opened.sequences("validation").values()) else "train"
    ratios = [
        source[measured]["text_bytes"] / (source[measured]["tokens"] - begins)
        for source in sources
        if source[measured].get("tokens")
        for begins in [source[measured]["documents"] if tokenizer.begin_of_sentence_id is not None else 0]
    ]
    return Prepared(
        tokenizer=tokenizer,
        train_tokens_NL=rows["train", "tokens"],
        train_positions_NL=rows["train", "positions"],
        validation_tokens_NL=rows["validation", "tokens"],
        validation_positions_NL=rows["validation", "positions"],
        train_tokens=sum(source["train"].get("tokens", 0) for source in sources),
        validation_tokens=sum(source["validation"].get("tokens", 0) for source in sources),
        unigram_entropy_nats=_entropy(opened, measured, tokenizer),
        bytes_per_token=sum(ratios) / max(len(ratios), 1),
        fingerprint=_fingerprint(opened, seed),
        order=mixture,
        held_out=hold_out([*opened.sequences("validation").values()], seed),
        is_mixture=True,
    )


def _entropy(opened: MixtureFolder, part: Part, tokenizer: Tokenizer) -> float:
    """Returns the entropy of token frequencies, with equal shares of the sources."""
    frequencies = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for shards in opened.shards(part).values():
        tokens = next((shard.tokens[:_ENTROPY_TOKENS] for shard in shards if len(shard.tokens)), np.empty(0, np.int64))
        counts = np.bincount(tokens, minlength=tokenizer.vocab_size)
        frequencies += (counts * _ENTROPY_TOKENS / max(counts.sum(), 1)).astype(np.int64)
    return entropy_nats(frequencies) if frequencies.any() else 0.0


def _fingerprint(opened: MixtureFolder, seed: int) -> str:
    """Returns what is equal if and only if two machines read the same samples in the same order."""
    manifest = opened.manifest
    weights = [[phase and phase.until_tokens, manifest.weights(phase)] for phase in (*manifest.phases, None)]
    units = {source.name: opened.report[SOURCES_NAME][source.name]["units"] for source in manifest.sources}
    decides = [opened.report["tokenizer"], units, opened.counts, weights, seed, opened.length]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()
