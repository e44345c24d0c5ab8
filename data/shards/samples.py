"""Encodes and packs samples, such as conversations, and caches the arrays. Imports no torch."""

# Shape legend: N sequences, L tokens per sequence.

import hashlib
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig, held_out_fraction, with_parts
from data.corpus import DataError
from data.mix.mixture import ORDER_VERSION, hold_out, single_order
from data.pack import WEIGHTS, PackedSamples, SampleCounts, entropy_nats, pack_samples
from data.progress import Progress
from data.readers.sources import read_documents
from data.registry import DATA_SOURCES, Part, TrainingSample
from data.shards.format import PARTS, UnitWriter, folder_errors, read_unit
from data.shards.open import Prepared, PreparedPart
from data.shards.units import Claims
from data.tokenizer import TOKENIZER_NAME, Tokenizer

_UNIT = "samples"
_ARRAY = "_NL.npy"


def open_samples(
    config: DataConfig, tokenizer: Tokenizer | None, key: str, sequence_length_tokens: int, progress: Progress
) -> Prepared:
    """Opens the samples that are in the cache under a key, and builds them first if they are not."""
    folder = Path(config.cache_dir).expanduser() / f"samples-{sequence_length_tokens}-{key}"
    values = read_unit(folder, _UNIT)
    if values is None:
        with folder_errors(folder, "data.cache_dir"):
            folder.mkdir(parents=True, exist_ok=True)
            with closing(Claims(folder)) as claims, claims.claimed(_UNIT), UnitWriter(folder, _UNIT) as writer:
                values = read_unit(folder, _UNIT)  # of another process that has just completed it
                if values is None:
                    values = _build_samples(config, tokenizer, sequence_length_tokens, writer, progress)
                    writer.finish(values)
    train, validation = (_read_part(folder, part, values[f"{part}_tokens"]) for part in PARTS)
    return Prepared(
        tokenizer=Tokenizer.load(folder / TOKENIZER_NAME),
        train=train,
        validation=validation,
        unigram_entropy_nats=values["unigram_entropy_nats"],
        bytes_per_token=values["bytes_per_token"],
        order=single_order(values["train_sequences"], config.seed),
        held_out=hold_out([values["validation_sequences"]], config.seed),
        fingerprint=hashlib.sha256(f"{ORDER_VERSION} {values['fingerprint']}".encode()).hexdigest(),
        counts={part: SampleCounts(**values[f"{part}_samples"]) for part in PARTS},
    )


def train_on_samples(config: DataConfig) -> Tokenizer:
    """Trains a tokenizer on the text of the samples to train on."""
    documents = (document.text for part, document in with_parts(config, read_documents) if part == "train")
    return Tokenizer.train(documents, config.tokenizer_vocab_size, DATA_SOURCES.get(config.source.kind).special_tokens)


def _build_samples(
    config: DataConfig, loaded: Tokenizer | None, sequence_length_tokens: int, writer: UnitWriter, progress: Progress
) -> dict[str, Any]:
    """Writes the tokenizer, trained if none is given, and the packed samples; returns their counts."""
    tokenizer = loaded or train_on_samples(config)
    for path in tokenizer.save(writer.path(TOKENIZER_NAME)):
        writer.path(path.name)
    digest = hashlib.sha256()
    values: dict[str, Any] = {}
    has_targets = DATA_SOURCES.get(config.source.kind).has_targets
    for part, samples in _encode_samples(config, tokenizer, progress).items():
        packed = pack_samples(
            samples, sequence_length_tokens, tokenizer.special.pad, tokenizer.vocab_size, has_targets=has_targets
        )
        if part == "train" and not packed.counts.kept:
            rule = " with a token to predict" if has_targets else ""
            raise DataError(
                f"batch.sequence_length_tokens: {sequence_length_tokens} leaves no sample of {packed.counts.dropped}; "
                f"at least one must fit{rule}; nearest: "
                f"{min(sample.num_tokens for sample in samples)}"
            )
        arrays = {**packed.values, "tokens": packed.tokens_NL, "positions": packed.positions_NL}
        for name, array in arrays.items():
            np.save(writer.path(f"{part}_{name}{_ARRAY}"), array)
            digest.update(np.ascontiguousarray(array).data)
        values[f"{part}_sequences"] = len(packed.tokens_NL)
        values[f"{part}_tokens"] = int((packed.positions_NL >= 0).sum())
        values[f"{part}_samples"] = asdict(packed.counts)
        if predicted := _predicted_tokens(packed, has_targets=has_targets):
            values["unigram_entropy_nats"] = entropy_nats(np.bincount(predicted).astype(np.int64))
            text = tokenizer.decode(predicted, skip_special_tokens=True)
            values["bytes_per_token"] = max(len(text.encode()), 1) / len(predicted)
    values["fingerprint"] = digest.hexdigest()
    return values


def _read_part(folder: Path, part: Part, num_tokens: int) -> PreparedPart:
    """Returns a part with memory-mapped arrays."""
    paths = sorted(folder.glob(f"{part}_*{_ARRAY}"))
    arrays = {path.name[len(part) + 1 : -len(_ARRAY)]: np.load(path, mmap_mode="r") for path in paths}
    return PreparedPart(
        tokens_NL=arrays.pop("tokens"), positions_NL=arrays.pop("positions"), num_tokens=num_tokens, values=arrays
    )


def _encode_samples(config: DataConfig, tokenizer: Tokenizer, progress: Progress) -> dict[Part, list[TrainingSample]]:
    encode = DATA_SOURCES.get(config.source.kind).samples
    assert encode is not None
    samples = list(encode(config.source, tokenizer))
    fraction = held_out_fraction(config, (sample.key for sample in samples), "samples", progress)
    config = replace(config, validation_fraction=fraction)
    parts: dict[Part, list[TrainingSample]] = {"train": [], "validation": []}
    for part, sample in with_parts(
        config, lambda source: samples if source is config.source else encode(source, tokenizer)
    ):
        parts[part].append(sample)
    return parts


def _predicted_tokens(packed: PackedSamples, *, has_targets: bool) -> list[int]:
    """Returns the tokens of all trained predictions in order, or of all prompts if there are no targets."""
    is_predicted_NL = packed.positions_NL[:, 1:] >= 1
    if has_targets and WEIGHTS in packed.values:
        is_predicted_NL &= packed.values[WEIGHTS][:, :-1].astype(bool)
    tokens: list[int] = packed.tokens_NL[:, 1:][is_predicted_NL].tolist()
    return tokens
