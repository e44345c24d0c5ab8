"""Prepares a folder of shards: starts workers, and writes the report. Imports no torch.

Any number of commands with the same settings may run on a folder at the same time, on any number of machines.
"""

import hashlib
import io
import json
import os
import re
import select
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import lru_cache
from io import FileIO
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from base.files import remove_abandoned, replace_file
from base.workers import worker_command
from comm.exits import STOPPED_LOOKS, is_stopped
from data.corpus import DataError, hash_unit
from data.progress import Progress
from data.quality.duplicates import EXACT, find_duplicates
from data.quality.filters import CONTAMINATED
from data.readers.rows import ReadCounts
from data.shards.encode import token_dtype
from data.shards.format import (
    FOLDER_KEY,
    KEY_BLOCK_BYTES,
    PARTS,
    REPORT_NAME,
    SOURCES_NAME,
    check_entries,
    folder_errors,
    read_drops,
    read_rows,
)
from data.shards.units import SETTINGS_NAME, TextUnit
from data.shards.work import Build, BuildSettings, RunText, WorkerMessage, build_units, peak_rss_bytes
from data.tokenizer import RELEASED_LEARNED, TOKENIZER_NAME, TRAIN_128K, Tokenizer

BROKEN_NAME = "broken.txt"
DUPLICATES_NAME = "duplicates.jsonl"
DROPPED_NAME = "dropped.jsonl"
_LISTED_DROPS = 100_000
DUPLICATE_KINDS = ("exact_duplicate", "near_duplicate")  # by the value that `find_duplicates` gives, from 1
# More text for training the tokenizer takes time and hardly changes its merges.
TOKENIZER_TEXT_BYTES = 64 * 2**20
TOKENIZER_128K_BYTES = 512 * 2**20
TOKENIZER_CHUNK_CHARACTERS = 2**16
_UNIT_FILE = re.compile(
    r"((train|validation)-)?(?P<unit>[0-9a-f]{16})\.(json|index|tokens|sketches|drop\.npy|sequences-.*)"
)
_PARTIAL_FILE = re.compile(rf"\.{_UNIT_FILE.pattern}-[0-9a-f]{{32}}\.partial")
_BUILDING = re.compile(r"\.building-[0-9a-f]{16}-[0-9a-f]{32}")
_OPEN_UNITS = 64  # indexes that are mapped into memory at a time
_ROOT = Path(__file__).resolve().parents[2]


def build_folder(
    settings: BuildSettings,
    tokenizer: Tokenizer | None,
    folder: Path,
    workers: int,
    progress: Progress,
    text: RunText | None = None,
) -> dict[str, Any]:
    """Prepares what is missing in a folder, and returns the values of its `prepare.json`.

    The text is that of the manifest, or of a run. Without a tokenizer, one is trained, unless the folder has one.
    Raises DataError if the folder belongs to something else or to other settings, or cannot be written, or too many
    rows are broken. Complete units always stay.
    """
    began = time.monotonic()
    with folder_errors(folder, settings.folder_key):
        _check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with closing(Build(settings, folder, text)) as build:
            with build.claims.claimed(REPORT_NAME):  # another command may write the report, which must stay then
                missing = [unit for unit in build.all_units() if build.read(unit) is None]
                report = None if missing else _read_current(build)
                if missing:
                    (folder / REPORT_NAME).unlink(missing_ok=True)
                elif report is not None:
                    report |= {"cached": True, "seconds": round(time.monotonic() - began, 3)}
                    replace_file(folder / REPORT_NAME, json.dumps(report, indent=1).encode())
            if report is None:
                build.check_beginnings()
                _install_tokenizer(build, tokenizer, progress)
                peak = _build_missing(build, missing, workers, progress) if missing else 0
                with build.claims.claimed(REPORT_NAME):
                    report = _read_current(build)  # of another command that has just finished
                    if report is None and build.manifest.dedup is not None:
                        _drop_duplicates(build)
                    report = report or _write_report(build, len(missing), max(peak, peak_rss_bytes()), began, progress)
            return report


def _check_folder(folder: Path) -> None:
    """Rejects a folder with anything that `launch.prepare` did not write."""
    if folder.is_file():
        raise DataError(f"{FOLDER_KEY}: must be a folder, {str(folder)!r} is a file; nearest: {folder}.prepared")
    others = [path.name for path in sorted(folder.iterdir()) if path.name[0] != "."] if folder.is_dir() else []
    check_entries(folder)
    # Another command may be filling the folder. Its settings come first, so they are looked for after the list.
    if others and not (folder / SETTINGS_NAME).exists():
        raise DataError(
            f"{FOLDER_KEY}: must be a new or empty folder, or one of launch.prepare, {str(folder)!r} has {others[0]!r};"
            f" nearest: {str(folder / 'prepared')!r}"
        )


def _read_current(build: Build) -> dict[str, Any] | None:
    """Returns the report of a folder, if it is about the same units and sequences."""
    try:
        report: dict[str, Any] = json.loads((build.folder / REPORT_NAME).read_bytes())
        units = {name: values["units"] for name, values in report[SOURCES_NAME].items()}
        is_current = report["sequence_length_tokens"] == build.settings.sequence_length_tokens
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return report if is_current and units == _unit_names(build) else None


def _unit_names(build: Build) -> dict[str, list[str]]:
    return {source: [unit.name for unit in units] for source, units in build.units.items()}


def _install_tokenizer(build: Build, tokenizer: Tokenizer | None, progress: Progress) -> None:
    """Writes the folder's tokenizer, which stays when files change, because tokens depend on it."""
    path = build.folder / TOKENIZER_NAME
    with build.claims.claimed(TOKENIZER_NAME):
        if path.exists():
            return
        chosen = tokenizer or _train_tokenizer(build, progress)
        with TemporaryDirectory(prefix=".tokenizer-", dir=build.folder) as partial:
            for written in reversed(chosen.save(Path(partial) / TOKENIZER_NAME)):  # the tokenizer last
                written.rename(build.folder / written.name)


def _train_tokenizer(build: Build, progress: Progress) -> Tokenizer:
    """Trains a tokenizer on chunks of the text, sampled by hash so that sources count by their weights."""
    is_128k = build.settings.tokenizer.get("recipe") == TRAIN_128K
    shares, total = _sample_shares(build, TOKENIZER_128K_BYTES if is_128k else TOKENIZER_TEXT_BYTES)
    samples: dict[str, str] = {}

    def chunks() -> Iterator[str]:
        for unit in build.all_units():
            source = unit.source.name
            documents = (document for _, document in build.documents(unit, ReadCounts()))
            for document in (document for document in documents if build.part_of(unit, document) == "train"):
                for start in range(0, len(document.text), TOKENIZER_CHUNK_CHARACTERS):
                    if hash_unit("tokenizer", build.settings.seed, f"{document.key}@{start}") < shares[source]:
                        chunk = document.text[start : start + TOKENIZER_CHUNK_CHARACTERS]
                        samples.setdefault(source, chunk)
                        yield chunk

    read = progress.over("reading text for the tokenizer", chunks(), total, lambda text: len(text.encode()))
    if not is_128k:
        values = build.settings.tokenizer
        return Tokenizer.train(read, values["vocab_size"], values.get("special_tokens", ()))
    tokenizer = Tokenizer.train_128k(read)
    broken = [source for source, chunk in samples.items() if tokenizer.decode(tokenizer.encode(chunk)) != chunk]
    learned = f"tokenizer: {tokenizer.num_learned:,} of {RELEASED_LEARNED - 3:,} tokens learned"
    restored = f"does not restore a sample of {', '.join(broken)}" if broken else "restores a sample of every source"
    progress.note(f"{learned}; decoding {restored}")
    return tokenizer


def _sample_shares(build: Build, budget_bytes: int) -> tuple[dict[str, float], int]:
    """Returns the share of each source's text to sample, by weight, and the bytes of the sample.

    What a small source leaves of its part goes to the others.
    """
    sizes = {name: sum(unit.size_bytes for unit in units) for name, units in build.units.items()}
    weights = dict(zip(sizes, build.manifest.weights(), strict=True))
    sampled = dict.fromkeys(sizes, 0.0)
    while open_sources := [name for name in sizes if weights[name] and sampled[name] < sizes[name]]:
        left = budget_bytes - sum(sampled.values())
        if left < 1:
            break
        weight = sum(weights[name] for name in open_sources)
        for name in open_sources:
            sampled[name] = min(sizes[name], sampled[name] + left * weights[name] / weight)
    return {name: sampled[name] / max(size, 1) for name, size in sizes.items()}, int(sum(sampled.values()))


def _build_missing(build: Build, missing: list[TextUnit], workers: int, progress: Progress) -> int:
    """Builds units with worker processes and shows the progress. Returns the largest memory of a worker."""
    sizes = {unit.name: unit.size_bytes for unit in missing}
    done = dict.fromkeys(sizes, 0)
    notes = set[str]()
    peak = 0

    def advance(message: WorkerMessage) -> int:
        step = max(message.done_bytes - done.get(message.unit, message.done_bytes), 0)
        done[message.unit] = done.get(message.unit, 0) + step
        return step

    messages = _messages(build, min(workers, len(missing))) if build.text is None else build_units(build)
    for message in progress.over("preparing text", messages, sum(sizes.values()), advance):
        peak = max(peak, message.peak_rss_bytes)
        notes |= {message.note}
    for note in sorted(notes - {""}):
        progress.note(note)
    return peak


def _messages(build: Build, workers: int) -> Iterator[WorkerMessage]:
    """Yields what workers report until all units are complete. Ends the others if one fails."""
    job = json.dumps({"settings": asdict(build.settings), "folder": str(build.folder)})
    # Each worker computes on one core: libraries would start threads for all of them. One arena is less memory.
    limits = "FASTOKENS_BPE_THREADS RAYON_NUM_THREADS OMP_NUM_THREADS OPENBLAS_NUM_THREADS MALLOC_ARENA_MAX"
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **dict.fromkeys(limits.split(), "1"), "PYTHONPATH": path}
    command = worker_command("data.shards.work", job)
    reading, writing = os.pipe()  # of all workers: a line is written whole
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with open(reading, "rb", buffering=0) as pipe:
            with open(writing, "wb") as stream:
                for _ in range(workers):
                    # Ctrl-C must reach this process alone, which ends the workers.
                    process = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=stream, process_group=0, env=environment
                    )
                    processes.append(process)
            for line in _lines(pipe, processes):
                message = WorkerMessage(**json.loads(line))
                if message.error:
                    raise DataError(message.error)
                yield message
        if failed := [process.wait() for process in processes if process.wait()]:
            raise DataError(
                f"workers: a worker ended with code {failed[0]}, out of memory if it is -9; complete units stay, and "
                f"the same command continues; nearest: workers={max(1, workers // 2)}"
            )
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _lines(pipe: FileIO, processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[bytes]:
    """Yields the lines of workers until all have ended. Raises DataError if one of them stays stopped."""
    looks = [0] * len(processes)  # at each worker since it is stopped
    look_at = time.monotonic()
    partial = b""
    while True:
        if select.select([pipe], [], [], 1.0)[0]:
            if not (received := pipe.read(2**16)):
                return
            *lines, partial = (partial + received).split(b"\n")
            yield from lines
        if time.monotonic() < look_at:
            continue
        look_at = time.monotonic() + 1.0
        for worker, process in enumerate(processes):
            looks[worker] = looks[worker] + 1 if is_stopped(process.pid) else 0
            if looks[worker] == STOPPED_LOOKS:
                raise DataError(
                    f"workers: each must run, worker {worker} of {len(processes)} (process {process.pid}) is stopped "
                    f"by a signal and does not continue; complete units stay; nearest: the same command again"
                )


def _drop_duplicates(build: Build) -> None:
    """Decides which documents of complete units are dropped, and writes what has changed.

    Of equal or similar documents, the first one in the order of the sources is kept. `duplicates.jsonl` names each
    document that is dropped, and the one that is kept for it.
    """
    units = build.all_units()

    @lru_cache(_OPEN_UNITS)
    def rows_of(unit: int) -> NDArray[Any]:
        return read_rows(build.folder_of(units[unit].source.name), units[unit].name)

    def key_of(unit: int, row: int) -> str:
        return _document_key(units[unit], rows_of(unit)[row])

    sketches = [build.folder_of(unit.source.name) / f"{unit.name}.sketches" for unit in units]
    duplicates = find_duplicates(
        [len(rows_of(unit)) for unit in range(len(units))],
        lambda unit: rows_of(unit)["hash"],
        sketches if build.manifest.dedup == "minhash" else None,
    )
    drops = duplicates.drops
    for unit, drop in zip(units, drops, strict=True):
        _write_drop(build, unit, drop)
    lines = (
        {
            "dropped": key_of(*dropped),
            "kind": "exact" if drops[dropped[0]][dropped[1]] == EXACT else "near",
            "kept": key_of(*earlier),
        }
        for dropped, earlier in duplicates.pairs()
    )
    encoded = (f"{json.dumps(line, ensure_ascii=False)}\n".encode("utf-8", "surrogateescape") for line in lines)
    replace_file(build.folder / DUPLICATES_NAME, encoded)


def _write_drop(build: Build, unit: TextUnit, drop: NDArray[np.uint8]) -> None:
    """Writes why each document of a unit is dropped, unless the file has the same content."""
    stream = io.BytesIO()
    np.save(stream, drop)
    path = build.folder_of(unit.source.name) / f"{unit.name}.drop.npy"
    if not path.exists() or path.read_bytes() != stream.getvalue():
        for packed in path.parent.glob(f"*{unit.name}.sequences-*"):
            packed.unlink(missing_ok=True)
        replace_file(path, stream.getvalue())


def _document_key(unit: TextUnit, row: NDArray[Any]) -> str:
    """Returns the source and the key of a document."""
    key = unit.pieces[int(row["piece"])].file.key
    block = f"@{int(row['block']) * KEY_BLOCK_BYTES}" if row["block"] else ""
    line = f":{row['row']}" if row["row"] else ""
    return f"{unit.source.name}/{key}{block}{line}"


def _write_report(build: Build, built: int, peak: int, began: float, progress: Progress) -> dict[str, Any]:
    """Checks the counts, removes files of units that are no longer needed, and writes `prepare.json`."""
    tokenizer = Tokenizer.load(build.folder / TOKENIZER_NAME)
    counts = {source: ReadCounts() for source in build.units}
    sources = {source: _count(build, source, counts[source]) for source in build.units}
    _check_counts(build, counts, progress)
    drops = islice(_listed_drops(build), _LISTED_DROPS)
    replace_file(build.folder / DROPPED_NAME, (line.encode("utf-8", "surrogateescape") for line in drops))
    for source, units in _unit_names(build).items():
        _remove_others(build.folder_of(source), frozenset(units))
    report = {
        "manifest": build.manifest.plain(),
        "seed": build.settings.seed,
        "validation_fraction": build.settings.validation_fraction,
        "sequence_length_tokens": build.settings.sequence_length_tokens,
        "token_dtype": np.dtype(token_dtype(tokenizer)).newbyteorder("<").str,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.fingerprint,
        "unit_bytes": build.stored["unit_bytes"],
        SOURCES_NAME: sources,
        "units": {"total": len(build.all_units()), "built": built},
        "peak_rss_bytes": peak,
        "seconds": round(time.monotonic() - began, 3),
        "cached": False,
    }
    replace_file(build.folder / REPORT_NAME, json.dumps(report, indent=1).encode())
    return report


def _listed_drops(build: Build) -> Iterator[str]:
    """Yields a line for each document that filters or evaluation files dropped, the first of each unit."""
    for unit in build.all_units():
        for key, reason in (build.read(unit) or {}).get("listed_drops", ()):
            line = {"dropped": f"{unit.source.name}/{key}", "reason": reason}
            yield f"{json.dumps(line, ensure_ascii=False)}\n"


def _remove_others(folder: Path, units: frozenset[str]) -> None:
    """Removes the files of earlier units, and what killed workers left."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _BUILDING.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif _PARTIAL_FILE.fullmatch(path.name):
            remove_abandoned([path])
        elif (match := _UNIT_FILE.fullmatch(path.name)) and match["unit"] not in units:
            path.unlink(missing_ok=True)


def _check_counts(build: Build, counts: Mapping[str, ReadCounts], progress: Progress) -> None:
    """Reports ignored files, replaced bytes and broken rows, and rejects too many of those."""
    total = ReadCounts()
    for source_counts in counts.values():
        total.add(source_counts)
    for line in (*build.notes, *total.lines(build.key("on_broken") if build.text else "on_broken")):
        progress.note(line)
    broken = "".join(f"{line}\n" for line in total.broken_places)
    replace_file(build.folder / BROKEN_NAME, broken.encode("utf-8", "surrogateescape"))
    if total.broken and build.manifest.on_broken == "stop":  # of units that were built when rows were skipped
        raise DataError(total.broken_places[0])
    total.check(build.manifest.max_broken_share, build.key("max_broken_share"))


def _count(build: Build, source: str, counts: ReadCounts) -> dict[str, Any]:
    """Returns what `prepare.json` says of a source, and adds the counts of its units to `counts`."""
    units = build.units[source]
    dropped = Counter[str]()
    parts = {part: Counter[str]() for part in PARTS}
    digest = hashlib.sha256()
    for unit in units:
        values = build.read(unit)
        if values is None:
            raise DataError(f"{FOLDER_KEY}: unit {unit.name} of {source} has vanished; nearest: the same command again")
        counts.add(ReadCounts(**values["counts"]))
        dropped.update(values["dropped"])
        drop = read_drops(build.folder_of(source), unit.name)
        digest.update(json.dumps(values["files"], sort_keys=True).encode() + drop.tobytes())
        dropped.update({kind: int((drop == value).sum()) for value, kind in enumerate(DUPLICATE_KINDS, start=1)})
        for part, totals in parts.items():
            shard = build.shard(unit, part)
            totals["documents"] += len(shard.documents)
            totals["tokens"] += int(shard.lengths.sum())
            totals["text_bytes"] += int(shard.documents["bytes"].sum())
            totals["sequences"] += len(shard.sequences(build.settings.sequence_length_tokens))
    return {
        "documents_read": counts.documents + counts.broken,
        "documents_kept": sum(part["documents"] for part in parts.values()),
        "dropped": {
            **{kind: dropped.pop(kind, 0) for kind in (*DUPLICATE_KINDS, CONTAMINATED)},
            "broken": counts.broken,
            "filtered": dropped.total(),
        },
        "filtered": dict(sorted(dropped.items())),
        "tokens": sum(part["tokens"] for part in parts.values()),
        "text_bytes": sum(part["text_bytes"] for part in parts.values()),
        **{part: dict(values) for part, values in parts.items()},
        "units": [unit.name for unit in units],
        "sha256": digest.hexdigest(),
    }
