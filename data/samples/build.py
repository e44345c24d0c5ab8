"""Encodes and packs a source's samples on disk. Imports no torch."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.config import DataConfig, with_parts
from data.corpus import DataError
from data.encode import train_tokenizer
from data.pack import WEIGHTS, PackedSamples, SampleCounts, entropy_nats, pack_samples
from data.progress import Progress
from data.registry import DATA_SOURCES, Part, TrainingSample
from data.tokenizer import Tokenizer

PARTS: tuple[Part, ...] = ("train", "validation")


def has_samples(config: DataConfig) -> bool:
    """Returns whether the source has samples, which are never split, instead of documents."""
    return DATA_SOURCES.get(config.source.kind).samples is not None


def build_samples(
    config: DataConfig, known: Tokenizer | None, sequence_length_tokens: int, folder: Path, progress: Progress
) -> dict[str, int | float | str]:
    """Writes `tokenizer.json`, trained if none is known, and each part's packed samples into a folder."""
    tokenizer = known or train_tokenizer(config, 0, progress)
    tokenizer.save(folder / "tokenizer.json")
    digest = hashlib.sha256()
    values: dict[str, int | float | str] = {}
    has_targets = DATA_SOURCES.get(config.source.kind).has_targets
    for part, samples in _encode_samples(config, tokenizer).items():
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


def _encode_samples(config: DataConfig, tokenizer: Tokenizer) -> dict[Part, list[TrainingSample]]:
    encode = DATA_SOURCES.get(config.source.kind).samples
    assert encode is not None
    parts: dict[Part, list[TrainingSample]] = {"train": [], "validation": []}
    for part, sample in with_parts(config, lambda source: encode(source, tokenizer)):
        parts[part].append(sample)
    if not parts["train"]:
        raise DataError(
            f"data.validation_fraction: {config.validation_fraction} of {len(parts['validation'])} samples, selected "
            f"by hash with data.seed {config.seed}, leaves the training part empty; it must have at least one sample; "
            f"nearest: a smaller fraction, or more samples"
        )
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
