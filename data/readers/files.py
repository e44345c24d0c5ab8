"""Finds the files that paths, folders and globs name, and counts those that no reader reads."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from base.registry import closest
from data.corpus import DataError, is_within
from data.registry import CorpusFile

Format = Literal["text", "jsonl", "parquet", "arrow", "megatron"]

_FORMATS: Mapping[str, Format] = {
    **dict.fromkeys((".txt", ".md", ".py"), "text"),
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".bin": "megatron",
}
_COMPRESSIONS: Mapping[str, str] = {".gz": "gzip", ".zst": "zstd"}
READ_SUFFIXES = ".txt, .md, .py, .jsonl, these with .gz or .zst, .parquet, .arrow, .bin next to .idx"
_GLOB_CHARACTERS = frozenset("*?[")
_LINKED_FOLDERS = "links to folders"
_NO_FILES = "links, pipes or devices"
_LINKS_OUT = "links out of the folder"


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """Files of a corpus, each once, in an order that depends only on their names."""

    files: tuple[CorpusFile, ...]
    ignored: Mapping[str, int]  # number of files in searched folders that are not read, by suffix

    def ignored_line(self, key: str = "data.paths") -> str | None:
        """Returns the line about files that are not read, None if all are."""
        if not self.ignored:
            return None
        kinds = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in sorted(self.ignored.items()))
        return f"{key}: {sum(self.ignored.values()):,} files are ignored ({kinds}); read are {READ_SUFFIXES}"


def format_of(path: Path) -> Format | None:
    """Returns how a file is read, by its suffixes; None if no reader reads it."""
    compressed = path.suffix.lower() in _COMPRESSIONS
    suffix = (path.with_suffix("") if compressed else path).suffix.lower()
    # Files of JSON lines are often called .json.gz; a .json file that is not compressed is seldom one.
    kind = _FORMATS.get(".jsonl" if compressed and suffix == ".json" else suffix)
    return None if compressed and kind not in ("text", "jsonl") else kind


def compression_of(path: Path) -> str | None:
    """Returns the compression of a file by its suffix."""
    return _COMPRESSIONS.get(path.suffix.lower())


def list_sources(paths: tuple[str, ...], key: str = "data.paths") -> Listed:
    """Returns the files that the paths name, and those with a known suffix in folders.

    Hidden files, and links to folders, are skipped. Raises DataError, which begins with `key`, for a path that is
    missing, has no file that can be read or is a Hugging Face dataset of several splits.
    """
    if not paths:
        raise DataError(f"{key}: at least one file or folder is needed, got none")
    files: dict[Path, CorpusFile] = {}
    ignored = Counter[str]()
    for path in paths:
        try:
            listed = _list_path(path, ignored)
        except DataError as error:
            raise DataError(f"{key}: {error}") from error
        # It is too long or forbidden, or has an unknown ~user, a NUL or a bad glob.
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(f"{key}: {path!r} cannot be looked up: {error}") from error
        # A file that is listed twice would count twice. With two keys, it could be both trained on and held out.
        for file in listed:
            files.setdefault(file.path.resolve(), file)
    return Listed(files=tuple(files.values()), ignored=ignored)


def search(
    root: Path, reads: Callable[[Path], bool], ignored: Counter[str], skipped_folders: frozenset[str] = frozenset()
) -> list[CorpusFile]:
    """Returns the regular files below a folder that `reads` accepts, sorted by key, and counts all others."""
    files: list[CorpusFile] = []
    for folder, folders, names in os.walk(root, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if name not in skipped_folders and not name.startswith(".")]
        ignored[_LINKED_FOLDERS] += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
        listed = _dataset_files(Path(folder), names)
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or (path.suffix == ".idx" and path.with_suffix(".bin").name in names):
                continue
            if not reads(path) or (listed is not None and name not in listed):
                ignored[path.suffix.lower()] += 1
            elif path.is_symlink() and path.is_file() and not is_within(path, root):
                ignored[_LINKS_OUT] += 1
            elif path.is_file():
                files.append(CorpusFile(key=path.relative_to(root).as_posix(), path=path))
            else:
                ignored[_NO_FILES] += 1
    ignored += Counter()  # drops zeros
    return sorted(files, key=lambda file: file.key)


def _list_path(name: str, ignored: Counter[str]) -> list[CorpusFile]:
    path = Path(name).expanduser()
    if not name.strip():
        raise DataError(f"a path must name a file or folder, got {name!r}; nearest: '.'")
    if path.is_dir():
        files = search(path, _reads, ignored)
    elif path.exists() or path.with_name(f"{path.name}.idx").exists():
        files = [_named_file(name, path)]
    elif _GLOB_CHARACTERS & set(name):
        files = list(_matching_files(path, ignored))
    else:
        raise DataError(f"{name!r} does not exist; a path must name a file or folder{_nearest(path)}")
    if not files:
        links = ignored[_LINKS_OUT]
        more = f"; {links:,} links out of it must be named to be read" if links else ""
        raise DataError(f"{name!r} contains no readable document; read are files ending in {READ_SUFFIXES}{more}")
    return files


def _named_file(name: str, path: Path) -> CorpusFile:
    if not path.exists() or path.suffix == ".idx":  # Megatron's own commands take the path without a suffix
        path = path.with_suffix(".bin") if path.suffix == ".idx" else path.with_name(f"{path.name}.bin")
    if not path.is_file():
        raise DataError(f"{name!r} must be a regular file or a folder, is neither; nearest: a copy of its content")
    suffix = "".join(path.suffixes[-2:]).lower() if compression_of(path) else path.suffix.lower()
    if format_of(path) is None:
        close = closest(suffix, [*_FORMATS, ".jsonl.gz", ".jsonl.zst"])
        hint = f"; nearest: {close[0]!r}" if close else ""
        raise DataError(f"{name!r} ends in {suffix!r}; a file must end in one of {READ_SUFFIXES}{hint}")
    if not _reads(path):
        raise DataError(f"{name!r} must lie next to its index, {path.with_suffix('.idx')} does not exist")
    return CorpusFile(key=path.name, path=path)


def _reads(path: Path) -> bool:
    kind = format_of(path)
    return kind is not None and (kind != "megatron" or path.with_suffix(".idx").is_file())


def _matching_files(path: Path, ignored: Counter[str]) -> Iterator[CorpusFile]:
    """Yields what a glob matches; keys are relative to its last folder without a wildcard."""
    parts = path.parts
    first = next(index for index, part in enumerate(parts) if _GLOB_CHARACTERS & set(part))
    root = Path(*parts[:first])
    for match in sorted(root.glob(str(Path(*parts[first:])))):
        relative = match.relative_to(root)
        if any(part.startswith(".") for part in relative.parts):
            continue
        if match.is_symlink() and match.is_dir():
            ignored[_LINKED_FOLDERS] += 1
        elif match.is_symlink() and match.is_file() and not is_within(match, root):
            ignored[_LINKS_OUT] += 1
        elif match.is_dir():
            for file in search(match, _reads, ignored):
                yield CorpusFile(key=(relative / file.key).as_posix(), path=file.path)
        elif _reads(match) and match.is_file():
            yield CorpusFile(key=relative.as_posix(), path=match)
        elif match.suffix != ".idx" or not match.with_suffix(".bin").exists():
            ignored[match.suffix.lower() if match.is_file() else _NO_FILES] += 1


def _dataset_files(folder: Path, names: list[str]) -> frozenset[str] | None:
    """Returns the data files of a Hugging Face dataset, without its caches; None for another folder."""
    if "dataset_dict.json" in names:
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        if len(splits) > 1:
            raise DataError(
                f"{str(folder)!r} is a Hugging Face dataset with the splits {', '.join(splits)}; a path must name one "
                f"split; nearest: {str(folder / ('train' if 'train' in splits else splits[0]))!r}"
            )
    if "state.json" not in names or not any(name.endswith(".arrow") for name in names):
        return None
    try:
        if not (folder / "state.json").is_file():
            raise ValueError("it is no regular file")
        state = json.loads((folder / "state.json").read_text("utf-8"))
        return frozenset(str(file["filename"]) for file in state["_data_files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{folder / 'state.json'} must list the dataset's files: {error!r}") from error


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"folder {error.filename} cannot be read: {error.strerror}") from error


def _nearest(path: Path) -> str:
    """Returns the end of an error: the existing path that is nearest to a missing path by its name."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    try:
        siblings = sorted(sibling.name for sibling in missing.parent.iterdir() if sibling.exists())
    except OSError:
        return ""
    if close := closest(missing.name, siblings):
        candidate = missing.with_name(close[0])
        corrected = candidate / path.relative_to(missing)
        return f"; nearest: {str(corrected if corrected.exists() else candidate)!r}"
    return f"; the nearest folder that exists is {str(missing.parent)!r}"
