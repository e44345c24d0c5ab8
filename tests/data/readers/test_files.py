"""Files of paths, folders and globs: what is read, what is counted as ignored, and what is refused."""

import json
import os
import re
from pathlib import Path

import pytest

from data.corpus import DataError
from data.readers.files import list_sources


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("text")


def keys(*paths: Path) -> list[str]:
    return [file.key for file in list_sources(tuple(map(str, paths))).files]


def test_folder_counts_what_it_does_not_read(tmp_path: Path) -> None:
    make(
        tmp_path,
        "a.txt",
        "b/c.PARQUET",
        "b/d.json.gz",
        "b/e.json",
        "f.pdf",
        "g.pdf",
        "README",
        "h.bin",
        "i.bin",
        "i.idx",
    )
    make(tmp_path, ".hidden.txt", ".git/a.txt", "j.txt.bz2", "k.parquet.gz")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.jsonl")
    listed = list_sources((str(tmp_path),))
    assert [file.key for file in listed.files] == ["a.txt", "b/c.PARQUET", "b/d.json.gz", "i.bin"]
    expected = {".pdf": 2, "": 1, ".json": 1, ".bin": 1, ".bz2": 1, ".gz": 1, "links to folders": 1}
    assert listed.ignored == expected | {"links, pipes or devices": 3}
    line = listed.ignored_line()
    assert line is not None
    assert line.startswith("data.paths: 11 files are ignored (1 without suffix, 1 .bin, ")


def test_glob_is_keyed_from_its_last_plain_folder_and_reads_each_file_once(tmp_path: Path) -> None:
    make(tmp_path, "x/1/a.txt", "x/2/a.txt", "x/2/b.md", "x/2/c.pdf", "x/.h/a.txt", "x/[1].txt")
    (tmp_path / "x" / "2" / "loop").symlink_to(tmp_path / "x")
    assert keys(tmp_path / "x/*/a.txt") == ["1/a.txt", "2/a.txt"]
    assert keys(tmp_path / "x/**/*.txt", tmp_path / "x/1") == ["1/a.txt", "2/a.txt", "[1].txt"]
    assert keys(tmp_path / "x/[12]") == ["1/a.txt", "2/a.txt", "2/b.md"]
    assert keys(tmp_path / "x/[1].txt") == ["[1].txt"]
    assert list_sources((str(tmp_path / "x/2/*"),)).ignored[".pdf"] == 1


def test_hugging_face_folder_has_the_files_that_it_lists(tmp_path: Path) -> None:
    for split in ("train", "test"):
        make(tmp_path, f"{split}/data-00000-of-00001.arrow", f"{split}/cache-1.arrow", f"{split}/dataset_info.json")
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (tmp_path / split / "state.json").write_text(json.dumps(state))
    make(tmp_path, "dataset_dict.json")
    assert keys(tmp_path / "train") == ["data-00000-of-00001.arrow"]
    with pytest.raises(DataError, match=r"the splits test, train; a path must name one split; nearest: '.*/train'"):
        keys(tmp_path)
    (tmp_path / "train" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state\.json must list the dataset's files"):
        keys(tmp_path / "train")


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("absent/*.txt", "contains no readable document"),
        ("link", "does not exist; a path must name a file or folder; the nearest folder"),
        ("*.pdf", "contains no readable document"),
        ("a**b/*.txt", "cannot be looked up: Invalid pattern"),
        ("pipe.txt", "must be a regular file or a folder, is neither"),
        ("a.txt.xz", "ends in '.xz'; a file must end in one of"),
        ("a.jsnl.gz", "nearest: '.jsonl.gz'"),
        ("a.bin", "must lie next to its index, "),
        ("a.idx", "must be a regular file"),
    ],
)
def test_path_that_names_no_corpus_is_refused_in_a_line(name: str, rule: str, tmp_path: Path) -> None:
    make(tmp_path, "a.txt.xz", "a.jsnl.gz", "b.pdf", "a.bin" if name == "a.bin" else "a.idx")
    os.mkfifo(tmp_path / "pipe.txt")
    os.symlink("nowhere", tmp_path / "link")
    with pytest.raises(DataError, match=rf"^mix\.yaml: .*{re.escape(rule)}"):
        list_sources((str(tmp_path / name),), key="mix.yaml")


def test_links_lead_within_their_folder_or_are_named(tmp_path: Path) -> None:
    make(tmp_path, "key.txt", "in/a.txt", "hub/blobs/1", "hub/snapshots/r1/readme.md")
    (tmp_path / "in" / "b.txt").symlink_to("a.txt")
    (tmp_path / "in" / "key.txt").symlink_to("../key.txt")
    (tmp_path / "hub/snapshots/r1/c.txt").symlink_to("../../blobs/1")
    listed = list_sources((str(tmp_path / "in"),))
    assert ([file.key for file in listed.files], listed.ignored) == (["a.txt"], {"links out of the folder": 1})
    assert keys(tmp_path / "in/key.txt") == ["key.txt"]
    assert keys(tmp_path / "in/*.txt") == ["a.txt"]
    assert keys(tmp_path / "hub/snapshots/r1") == ["c.txt", "readme.md"]
    (tmp_path / "in" / "a.txt").unlink()
    with pytest.raises(DataError, match="1 links out of it must be named to be read"):
        list_sources((str(tmp_path / "in"),))


def test_list_of_a_dataset_that_is_a_pipe_does_not_wait(tmp_path: Path) -> None:
    make(tmp_path, "data.arrow")
    os.mkfifo(tmp_path / "state.json")
    with pytest.raises(DataError, match="no regular file"):
        list_sources((str(tmp_path),))
