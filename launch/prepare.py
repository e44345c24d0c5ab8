"""Prepares the text of a mixture as shards of tokens: `python -m launch.prepare`. Imports no torch."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Annotated, Any

from base.decode import decode
from base.figures import bytes_text, table
from base.files import replace_file
from base.ranges import AtLeast, NonNegativeInt, PositiveInt, Share, ShareBelowOne
from base.refusal import broken
from data.config import BatchSizes
from data.mix.manifest import read_manifest
from data.mix.mixture import Mixture
from data.readers.megatron import write_megatron
from data.shards.encode import none_to_split
from data.shards.format import PARTS, open_shards
from data.shards.run import build_folder
from data.shards.work import BuildSettings
from data.special_tokens import SpecialNames
from data.tokenizer import (
    NEWLINE_SPLIT_128K,
    SPECIAL_TOKENS,
    TOKENIZER_NAME,
    TRAIN_128K,
    Tokenizer,
    check_vocab_size,
)
from dualpipe.draw.style import document
from launch.cli.entry import command, preview_of
from launch.config.compose import compose, system_errors
from launch.config.run import expand_tokenizer
from train.terminal import progress_on, seconds_text

_PAGE_NAME = "report.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareDataConfig:
    """Keys of `data=mix` that decide what is in the folder; a run decides the others."""

    manifest: str
    tokenizer: str | None
    tokenizer_bos: str | None
    tokenizer_eos: str | None
    tokenizer_pad: str | None
    tokenizer_vocab_size: PositiveInt
    validation_fraction: ShareBelowOne
    fim_rate: Share
    seed: NonNegativeInt
    punctuation_newline_split: Share | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareCommandConfig:
    """Configuration of the command. `conf/prepare.yaml` explains the keys."""

    data: PrepareDataConfig
    out: str
    workers: PositiveInt | None
    sequence_length_tokens: Annotated[int, AtLeast(2)]
    order_steps: NonNegativeInt
    global_sequences: PositiveInt
    unit_bytes: PositiveInt | None
    megatron: str | None
    plugins: tuple[str, ...]


def main(overrides: Sequence[str]) -> int:
    """Prepares what is missing in the folder, and prints a summary."""
    config = _read(overrides)
    data = config.data
    tokenizer = _load_tokenizer(data)
    split = _newline_split(data)
    settings = BuildSettings(
        manifest=str(Path(data.manifest).expanduser().absolute()),
        tokenizer=_tokenizer_values(data, tokenizer),
        validation_fraction=data.validation_fraction,
        fim_rate=data.fim_rate,
        seed=data.seed,
        sequence_length_tokens=config.sequence_length_tokens,
        newline_split=split,
        unit_bytes=config.unit_bytes,
    )
    folder = Path(config.out).expanduser()
    workers = config.workers or len(os.sched_getaffinity(0))
    with system_errors():
        report = build_folder(settings, tokenizer, folder, workers, progress_on())
        page = _write_page(folder, report)
        if config.order_steps:
            _write_order(config, folder, report)
        print(_summary(report), flush=True)
        if line := none_to_split(Tokenizer.load(folder / TOKENIZER_NAME), split):
            print(f"tokenizer: {line}", flush=True)
        if config.megatron is not None:
            _export(folder, Path(config.megatron).expanduser(), report)
    print(page)
    return 0


def _write_page(folder: Path, report: Mapping[str, Any]) -> Path:
    """Writes what was kept of each source, and dropped, as a page, and returns its path."""
    sources: Mapping[str, Mapping[str, Any]] = report["sources"]
    reasons = list(next(iter(sources.values()))["dropped"])
    total = sum(source["tokens"] for source in sources.values())
    sizes = [
        [
            name,
            bytes_text(source["text_bytes"]),
            f"{source['tokens']:,}",
            f"{source['text_bytes'] / source['tokens']:.2f}" if source["tokens"] else "-",
            f"{source['tokens'] / max(total, 1):.1%}",
        ]
        for name, source in sources.items()
    ]
    documents = [
        [name, *(f"{count:,}" for count in (source["documents_read"], source["documents_kept"]))]
        + [f"{source['dropped'][reason]:,}" for reason in reasons]
        + [f"{source[part]['documents']:,}" for part in PARTS]
        for name, source in sources.items()
    ]
    facts = [
        ["sequence length", f"{report['sequence_length_tokens']:,} tokens"],
        ["vocabulary", f"{report['vocab_size']:,} tokens of {8 * int(report['token_dtype'][-1])} bits"],
        ["units", f"{report['units']['total']:,} of about {bytes_text(report['unit_bytes'])}"],
        ["units built by the last command", f"{report['units']['built']:,} in {seconds_text(report['seconds'])}"],
        ["peak memory of a process", bytes_text(report["peak_rss_bytes"])],
    ]
    title = f"Prepared text: {folder.name}"
    tables = {
        "Tokens": table(["source", "text", "tokens", "bytes per token", "share of tokens"], sizes),
        "Documents": table(
            ["source", "read", "kept", *(reason.replace("_", " ") for reason in reasons), *PARTS], documents
        ),
        "Folder": table(["", ""], facts),
    }
    body = f"<h1>{escape(title)}</h1>" + "".join(f"<h2>{name}</h2>{rows}" for name, rows in tables.items())
    replace_file(folder / _PAGE_NAME, document(title, body, "").encode("utf-8", errors="replace"))
    return folder / _PAGE_NAME


def _write_order(config: PrepareCommandConfig, folder: Path, report: Mapping[str, Any]) -> None:
    """Writes the source and the index of the sequences of the first steps of a run."""
    length = config.sequence_length_tokens
    sequences = {name: source["train"]["sequences"] for name, source in report["sources"].items()}
    mixture = Mixture(read_manifest(Path(config.data.manifest)), sequences, length, config.data.seed)
    batch_sizes = BatchSizes(config.global_sequences, length)
    mixture.check_epochs(batch_sizes.sequences_before(config.order_steps))
    mixture.write_order(folder, batch_sizes, config.order_steps)


def _read(overrides: Sequence[str]) -> PrepareCommandConfig:
    """Decodes and checks the configuration. Reads the manifest and the tokenizer, but no text."""
    values = compose("prepare", overrides)
    data = values["data"]
    if data["kind"] != "mix":
        raise broken(
            "data", "must be mix, whose manifest names the text", data["kind"], "data=mix data.manifest=MIX.yaml"
        )
    if data["tokenizer"] != TRAIN_128K:
        data["tokenizer"] = expand_tokenizer(data["tokenizer"], None, {})
    names = [field.name for field in fields(PrepareDataConfig)]
    config = decode(PrepareCommandConfig, {**values, "data": {name: data[name] for name in names}})
    if not config.out:
        raise broken("out", "must be a folder", repr(config.out), "prepared")
    with system_errors():
        read_manifest(Path(config.data.manifest))
        tokenizer = _load_tokenizer(config.data)
        if tokenizer is not None:
            none_to_split(tokenizer, config.data.punctuation_newline_split)  # rejects what cannot be split
        if tokenizer is None and config.data.tokenizer is None:
            check_vocab_size(config.data.tokenizer_vocab_size, len(SPECIAL_TOKENS))
    return config


def _load_tokenizer(data: PrepareDataConfig) -> Tokenizer | None:
    if data.tokenizer in (None, TRAIN_128K):
        return None
    names = SpecialNames(bos=data.tokenizer_bos, eos=data.tokenizer_eos, pad=data.tokenizer_pad)
    return Tokenizer.load(Path(data.tokenizer).expanduser(), "data.tokenizer", names)


def _tokenizer_values(data: PrepareDataConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns what decides the token ids."""
    if tokenizer is not None:
        return {"fingerprint": tokenizer.fingerprint, **tokenizer.token_names}
    return {"recipe": TRAIN_128K} if data.tokenizer == TRAIN_128K else {"vocab_size": data.tokenizer_vocab_size}


def _newline_split(data: PrepareDataConfig) -> float:
    default = NEWLINE_SPLIT_128K if data.tokenizer == TRAIN_128K else 0.0
    return default if data.punctuation_newline_split is None else data.punctuation_newline_split


def _export(folder: Path, out: Path, report: Mapping[str, Any]) -> None:
    """Writes each part of a source as a dataset of Megatron-Core, unless it is empty, and prints its path."""
    out.mkdir(parents=True, exist_ok=True)
    for name, source in report["sources"].items():
        for part in (part for part in PARTS if source[part]["documents"]):
            documents = (
                shard.read(slice(start, start + length))
                for shard in open_shards(folder, name, part)
                for start, length in zip(shard.starts.tolist(), shard.lengths.tolist(), strict=True)
            )
            num_tokens = write_megatron(out / f"{name}_{part}", documents, report["vocab_size"])
            print(f"{out / f'{name}_{part}'}.bin: {num_tokens:,} tokens", flush=True)


def _summary(report: Mapping[str, Any]) -> str:
    """Returns a line for each source."""
    lines = []
    for name, source in report["sources"].items():
        reasons = [f"{count:,} {reason.replace('_', ' ')}" for reason, count in source["dropped"].items() if count]
        dropped = f"; dropped: {', '.join(reasons)}" if reasons else ""
        lines.append(
            f"{name}: {source['tokens']:,} tokens of {source['documents_kept']:,} documents, "
            f"{bytes_text(source['text_bytes'])}{dropped}"
        )
    units = report["units"]
    state = "nothing to do" if report["cached"] else f"{units['built']} of {units['total']} units built"
    return "\n".join([*lines, f"{state} in {seconds_text(report['seconds'])}"])


preview = preview_of("prepare", _read)

if __name__ == "__main__":
    sys.exit(command("prepare", main, preview))
