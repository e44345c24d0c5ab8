"""Builds units: reads, filters, tokenizes and writes them, in a worker process. Imports no torch."""

import json
import os
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.corpus import DataError, grouped, is_validation
from data.mix.manifest import Manifest, MixSource, read_manifest
from data.quality.contamination import Contamination
from data.quality.duplicates import NUM_BANDS, full_blocks
from data.quality.filters import Inspector
from data.readers.files import list_sources
from data.readers.lines import TextField
from data.readers.rows import FilePiece, ReadCounts, keep_documents, pieces, read_rows
from data.readers.sources import FilesSource, list_files, size_bytes
from data.registry import DATA_SOURCES, BrokenRow, CorpusFile, DataSource, Document, Part
from data.shards.encode import DocumentEncoder, check_token_ids
from data.shards.format import (
    FORMAT_VERSION,
    INDEX,
    KEY_BLOCK_BYTES,
    PARTS,
    SOURCES_NAME,
    Shard,
    UnitWriter,
    folder_errors,
    read_unit,
)
from data.shards.units import Claims, TextUnit, agree_on_settings, choose_unit_bytes, divide
from data.tokenizer import TOKENIZER_NAME, Tokenizer

BATCH_CHARACTERS = 2**20
LISTED_DROPS = 1000  # dropped documents that a unit names
_FIRST_ROWS = 1000
_POLL_SECONDS = 0.2
_ERROR_CHARACTERS = 600  # a line of at most 4 KiB (`PIPE_BUF`) is not mixed with those of other workers
_KEY_END = re.compile(r"(?:@(?P<offset>\d+))?(?::(?P<row>\d{1,9}))?")  # end of a document's key


CORPUS = "corpus"
HELD_OUT = "held_out"
RunText = Mapping[str, DataSource]
"""The documents of a run without a manifest, which its own process prepares: `CORPUS`, and maybe `HELD_OUT`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSettings:
    """What a command prepares, in values that a worker process receives as JSON."""

    manifest: str  # path of the manifest; empty for the text of a run
    tokenizer: dict[str, Any]  # what decides the token ids
    validation_fraction: float  # share of documents that are held out
    fim_rate: float  # share of documents for fill-in-the-middle, of sources that have no own rate
    seed: int  # seed of the validation split and of fill-in-the-middle
    sequence_length_tokens: int  # length for which sequences are packed
    newline_split: float = 0.0  # share of tokens of punctuation and line breaks that is split
    unit_bytes: int | None = None  # bytes of text of a unit; None: 256 MiB, less for small corpora
    folder_key: str = "out"  # key of the folder, for errors


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerMessage:
    """What a worker reports: bytes of a unit that are done, a line for the user, or why it stopped."""

    unit: str = ""
    done_bytes: int = 0
    peak_rss_bytes: int = 0
    note: str = ""
    error: str = ""


def _manifest_of(text: RunText) -> Manifest:
    """Returns the mixture of one source that a run without a manifest reads."""
    sources = tuple(MixSource(name=name, paths=(), weight=float(name == CORPUS)) for name in text)
    manifest = Manifest(sources=sources, decontaminate=())
    if not isinstance(source := text[CORPUS], FilesSource):
        return manifest
    return replace(manifest, on_broken=source.on_broken, max_broken_share=source.max_broken_share)


class Build:
    """The work of a folder: its settings, which never change, and the units of each source in order."""

    def __init__(self, settings: BuildSettings, folder: Path, text: RunText | None = None) -> None:
        self.folder = folder
        self.settings = settings
        self.text = text
        self.manifest: Manifest = read_manifest(Path(settings.manifest)) if text is None else _manifest_of(text)
        self.contamination = Contamination.load(self.manifest.decontaminate)
        self.claims = Claims(folder)
        self.text_sources = text or {
            source.name: FilesSource(kind="files", paths=source.paths, text_field=source.text_field)
            for source in self.manifest.sources
        }
        self.notes: list[str] = []
        files = {name: self._list(name) for name in self.text_sources}
        if (evaluations := self.contamination) is not None and evaluations.num_searched < evaluations.num_lines:
            num_lines = evaluations.num_lines
            short = num_lines - evaluations.num_searched
            self.notes.append(f"{short:,} of {num_lines:,} lines of evaluation files are too short to be searched for")
        total_bytes = sum(size_bytes(file) for listed in files.values() for file in listed)
        self.stored = agree_on_settings(
            folder, self._values(total_bytes), self.claims, () if settings.unit_bytes else ("unit_bytes",)
        )
        self.units = {
            source.name: divide(
                source, files[source.name], self.stored["unit_bytes"], self._values_of(source), self._cut
            )
            for source in self.manifest.sources
        }

    def key(self, name: str) -> str:
        """Returns the name of a key, for errors."""
        return f"data.{name}" if self.text is not None else f"{self.settings.manifest}: {name}"

    def _list(self, name: str) -> list[CorpusFile]:
        """Returns the files of a source, and notes those that are ignored."""
        text = self.text_sources[name]
        if isinstance(text, FilesSource):
            in_run = {CORPUS: "paths", HELD_OUT: "validation_paths"}
            key = self.key(f"sources.{name}.paths" if self.text is None else in_run[name])
            listed = list_sources(text.paths, key)
            files = listed.files
            self.notes += filter(None, [listed.ignored_line(key)])
        else:
            files = list_files(text)
        # What earlier commands wrote is no text, also if the folder lies within that of a source.
        target = self.folder.resolve()
        return [file for file in files if not file.path.resolve().is_relative_to(target)]

    def _cut(self, file: CorpusFile, piece_bytes: int) -> list[FilePiece]:
        """Returns the pieces of a file, which is read whole if its source has another reader."""
        if self.text is None or isinstance(self.text[CORPUS], FilesSource):
            return pieces(file, piece_bytes)
        return [FilePiece(file=file, first=0, last=1, size_bytes=size_bytes(file))]

    def _values(self, total_bytes: int) -> dict[str, Any]:
        manifest = self.manifest
        return {
            "format": FORMAT_VERSION,
            "tokenizer": self.settings.tokenizer,
            "validation_fraction": self.settings.validation_fraction,
            "punctuation_newline_split": self.settings.newline_split,
            "seed": self.settings.seed,
            "filters": manifest.filters and asdict(manifest.filters),
            "decontaminate": self.contamination and self.contamination.fingerprint,
            "dedup": manifest.dedup,
            "unit_bytes": self.settings.unit_bytes or choose_unit_bytes(total_bytes),
            SOURCES_NAME: {
                source.name: {"text_field": source.text_field, "fim_rate": self.fim_rate_of(source)}
                for source in manifest.sources
            },
        }

    def _values_of(self, source: MixSource) -> object:
        shared = {key: value for key, value in self.stored.items() if key != SOURCES_NAME}
        return [shared, source.name, self.stored[SOURCES_NAME][source.name]]

    def fim_rate_of(self, source: MixSource) -> float:
        """Returns the share of a source's training documents that are rearranged for fill-in-the-middle."""
        return self.settings.fim_rate if source.fim_rate is None else source.fim_rate

    def folder_of(self, source: str) -> Path:
        """Returns the folder with the units of a source."""
        return self.folder / SOURCES_NAME / source

    def documents(self, unit: TextUnit, counts: ReadCounts) -> Iterator[tuple[int, Document]]:
        """Yields the documents of a unit, each with the number of its piece, and counts them."""
        for number, piece in enumerate(unit.pieces):
            for document in keep_documents(self._rows(unit, piece), counts, self.manifest.on_broken):
                yield number, document

    def _rows(self, unit: TextUnit, piece: FilePiece) -> Iterator[Document | BrokenRow]:
        source = self.text_sources[unit.source.name]
        if not isinstance(source, FilesSource):
            return DATA_SOURCES.get(source.kind).read(source, piece.file, None)
        key = self.key("text_field") if self.text else f"sources.{unit.source.name}.text_field"
        return read_rows(piece, TextField(source.text_field, key))

    def check_beginnings(self) -> None:
        """Rejects a source of which all the first rows are broken, before the others are prepared."""
        for units in self.units.values():
            rows = chain.from_iterable(self._rows(unit, piece) for unit in units for piece in unit.pieces)
            counts = ReadCounts()
            is_readable = any(True for _ in keep_documents(islice(rows, _FIRST_ROWS), counts, "skip"))
            if counts.broken and not is_readable:
                raise DataError(counts.broken_places[0])

    def part_of(self, unit: TextUnit, document: Document) -> Part:
        """Returns the part of a document."""
        settings = self.settings
        if self.text is not None and HELD_OUT in self.text:
            return "validation" if unit.source.name == HELD_OUT else "train"
        is_held_out = is_validation(document.key, settings.validation_fraction, settings.seed)
        return "validation" if is_held_out else "train"

    def close(self) -> None:
        """Releases all claims."""
        self.claims.close()

    def shard(self, unit: TextUnit, part: Part) -> Shard:
        """Returns one part of a complete unit."""
        dtype = np.dtype(np.uint32)  # tokens are not read
        return Shard(self.folder_of(unit.source.name), unit.name, part, dtype, vocab_size=0)

    def all_units(self) -> list[TextUnit]:
        """Returns the units of all sources in order."""
        return [unit for units in self.units.values() for unit in units]

    def read(self, unit: TextUnit) -> dict[str, Any] | None:
        """Returns the values of a unit; None if it must be built, because it is absent or a file has changed."""
        values = read_unit(self.folder_of(unit.source.name), unit.name)
        is_current = values is not None and values.get("inputs") == [list(file) for file in unit.files]
        with suppress(KeyError, TypeError, AttributeError, ValueError):  # another program has written it
            if is_current and values is not None and ReadCounts(**values["counts"]).is_valid():
                Counter[str]().update({name: int(count) for name, count in values["dropped"].items()})
                return values if isinstance(values["listed_drops"], list) else None
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """A document of a unit, with what the index says of it."""

    document: Document
    text: str
    num_bytes: int
    piece: int
    part: int  # position in `PARTS`


class UnitEncoder:
    """Reads and tokenizes units with the settings of a build."""

    def __init__(self, build: Build) -> None:
        self._build = build
        self._tokenizer = Tokenizer.load(build.folder / TOKENIZER_NAME)
        self._open_encoder = cache(partial(DocumentEncoder, self._tokenizer, seed=build.settings.seed))
        with_sketches = build.manifest.dedup == "minhash"
        self._inspector = Inspector(build.manifest.filters, build.contamination, with_sketches=with_sketches)

    @property
    def note(self) -> str:
        """A line for the user if the tokenizer is slow, otherwise empty."""
        reason = self._tokenizer.bulk.reason
        return "" if reason is None else f"text is encoded slowly, with tokenizers, as fastokens cannot: {reason}"

    def encode(self, unit: TextUnit) -> Iterator[int]:
        """Writes a unit. Yields the bytes of its files that are done, after each batch of about 1 MB."""
        counts = ReadCounts()
        dropped = Counter[str]()
        listed: list[tuple[str, str]] = []  # key and reason
        done = 0
        sketches = np.empty((0, 1 + NUM_BANDS), np.uint64)
        with UnitWriter(self._build.folder_of(unit.source.name), unit.name) as writer:
            for batch in grouped(self._read(unit, counts), lambda row: len(row.text), BATCH_CHARACTERS):
                inspection = self._inspector.inspect([row.text for row in batch])
                reasons = zip(batch, inspection.reasons, strict=True)
                drops = [(row.document.key, reason) for row, reason in reasons if reason is not None]
                dropped.update(reason for _, reason in drops)
                listed += drops[: LISTED_DROPS - len(listed)]
                numbers = [number for number, reason in enumerate(inspection.reasons) if reason is None]
                if numbers:
                    self._append(writer, unit, [batch[number] for number in numbers], inspection.hashes[numbers])
                if inspection.sketches is not None:
                    blocks, sketches = full_blocks(np.concatenate([sketches, inspection.sketches[numbers]]))
                    writer.append(f"{unit.name}.sketches", blocks)
                done += sum(row.num_bytes for row in batch)
                yield min(done, unit.size_bytes)
            if self._build.manifest.dedup == "minhash":
                writer.append(f"{unit.name}.sketches", sketches.T)
            totals = {"counts": asdict(counts), "dropped": dict(sorted(dropped.items()))}
            writer.finish({"inputs": unit.files, **totals, "listed_drops": listed})
        if self._build.manifest.dedup is None:  # otherwise they are packed when all duplicates are known
            for part in PARTS:
                self._build.shard(unit, part).sequences(self._build.settings.sequence_length_tokens)

    def _encoder(self, source: MixSource, part: Part) -> DocumentEncoder:
        # The validation loss is measured on plain text.
        if part == "validation":
            return self._open_encoder(fim_rate=0.0, newline_split=0.0)
        build = self._build
        return self._open_encoder(fim_rate=build.fim_rate_of(source), newline_split=build.settings.newline_split)

    def _read(self, unit: TextUnit, counts: ReadCounts) -> Iterator[_Row]:
        for number, document in self._build.documents(unit, counts):
            check_token_ids(document, self._tokenizer.vocab_size)
            text = document.text if document.tokens is None else self._tokenizer.decode(document.tokens.tolist())
            yield _Row(
                document=document,
                text=text,
                num_bytes=len(text.encode()),
                piece=number,
                part=PARTS.index(self._build.part_of(unit, document)),
            )

    def _append(self, writer: UnitWriter, unit: TextUnit, batch: Sequence[_Row], hashes: NDArray[np.uint64]) -> None:
        """Appends documents to the files of their parts and to the index."""
        rows = np.zeros(len(batch), INDEX)
        rows["hash"] = hashes
        rows["part"] = [row.part for row in batch]
        for number, part in enumerate(PARTS):
            chosen = [index for index, row in enumerate(batch) if row.part == number]
            if not chosen:
                continue
            documents = [batch[index].document for index in chosen]
            encoded = self._encoder(unit.source, part).encode(documents)
            writer.append(f"{part}-{unit.name}.tokens", encoded.ids)
            rows["length"][chosen] = np.diff(encoded.offsets)
        rows["bytes"] = [row.num_bytes for row in batch]
        rows["piece"] = [row.piece for row in batch]
        for index, row in enumerate(batch):
            ending = row.document.key.removeprefix(unit.pieces[row.piece].file.key)
            if (match := _KEY_END.fullmatch(ending)) is not None:
                rows["block"][index] = int(match["offset"] or 0) // KEY_BLOCK_BYTES
                rows["row"][index] = int(match["row"] or 0)
        writer.append(f"{unit.name}.index", rows)


def build_units(build: Build) -> Iterator[WorkerMessage]:
    """Builds units until all are complete, together with other processes and machines on the same folder."""
    encoder = UnitEncoder(build)
    units = build.all_units()
    # Without locks between machines, each machine starts at another unit, and repeats few.
    first = hash((os.uname().nodename, os.getpid())) % max(len(units), 1)
    pending = {unit.name: unit for unit in units[first:] + units[:first]}
    while pending:
        for name, unit in list(pending.items()):
            if build.read(unit) is None:
                if not build.claims.try_claim(name):
                    continue
                try:
                    if build.read(unit) is None:  # another process may have completed it just before
                        for done in encoder.encode(unit):
                            peak = peak_rss_bytes()
                            yield WorkerMessage(unit=name, done_bytes=done, peak_rss_bytes=peak, note=encoder.note)
                except FileNotFoundError:
                    if build.read(unit) is None:  # without locks, another process may have completed it and cleaned up
                        raise
                finally:
                    build.claims.release(name)
            del pending[name]
            yield WorkerMessage(unit=name, done_bytes=unit.size_bytes, peak_rss_bytes=peak_rss_bytes())
        time.sleep(_POLL_SECONDS if pending else 0)


def peak_rss_bytes() -> int:
    """Returns the largest resident memory that this process has had.

    On Linux, `ru_maxrss` begins with the memory of the process that started this one, so it is not used.
    """
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if (match := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)) is not None:
            return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Builds units of the job in its argument, and prints messages until all units are complete."""
    job = json.loads(sys.argv[1])
    folder = Path(job["folder"])
    settings = BuildSettings(**job["settings"])
    try:
        with folder_errors(folder, settings.folder_key):
            for message in build_units(Build(settings, folder)):
                _send(message)
    except DataError as error:
        if isinstance(error.__cause__, BrokenPipeError):  # the command has ended
            os._exit(1)
        _send(WorkerMessage(error=str(error)[:_ERROR_CHARACTERS]))


def _send(message: WorkerMessage) -> None:
    os.write(1, f"{json.dumps(asdict(message))}\n".encode())  # one call: other workers write to the same pipe


if __name__ == "__main__":
    main()
