"""Tests of folders of shards: each document once, equal files after interruptions, and only changes are built."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from base.files import replacing
from data.corpus import DataError
from data.progress import NO_PROGRESS
from data.shards.format import PARTS, UnitWriter, open_shards, read_drops, read_report, read_rows
from data.shards.run import _sample_shares, build_folder
from data.shards.work import Build, BuildSettings, UnitEncoder, build_units
from data.tokenizer import Tokenizer
from tests import ROOT
from train.terminal import ProgressLines

PROGRAM = """
import json, sys
from pathlib import Path
from data.shards.run import build_folder
from data.shards.work import BuildSettings
from data.progress import NO_PROGRESS
from data.tokenizer import Tokenizer
settings, tokenizer, folder, workers = json.load(sys.stdin)
build_folder(BuildSettings(**settings), Tokenizer.load(Path(tokenizer)), Path(folder), workers, NO_PROGRESS)
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a few words of text\n"] * 3, 300)


@pytest.fixture
def settings(tmp_path: Path) -> BuildSettings:
    """Two sources: 12 small files and one large file of rows."""
    words = ["seven", "one", "données", "数字", "\n", "x = 1\n"]
    draw = random.Random(1)
    (tmp_path / "notes").mkdir()
    for number in range(12):
        (tmp_path / "notes" / f"{number:02}.txt").write_text(" ".join(draw.choices(words, k=300)), "utf-8")
    rows = [{"body": f"row {row} {' '.join(draw.choices(words, k=40))}"} for row in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    (tmp_path / "mix.yaml").write_text(
        "sources:\n"
        "- {name: notes, paths: [notes], weight: 1, fim_rate: 0}\n"
        "- {name: rows, paths: [rows.jsonl], weight: 2, text_field: body, fim_rate: 0}\n"
    )
    return BuildSettings(
        manifest=str(tmp_path / "mix.yaml"),
        tokenizer={},
        validation_fraction=0.2,
        fim_rate=0.5,
        seed=0,
        sequence_length_tokens=64,
        unit_bytes=4000,
    )


@pytest.fixture(autouse=True)
def worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets this process work, which saves the start of another one. Programs of tests start workers."""

    def work(build: Build, workers: int) -> Iterator[object]:
        yield from build_units(build)

    monkeypatch.setattr("data.shards.run._messages", work)


@pytest.fixture
def folder(settings: BuildSettings, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    build_folder(settings, tokenizer, tmp_path / "out", 1, NO_PROGRESS)
    return tmp_path / "out"


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.name != "prepare.json"}


def times_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("sources/*/*")}


def test_text_that_must_be_encoded_slowly_is_reported_once(
    settings: BuildSettings, tokenizer: Tokenizer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    lines: list[str] = []
    build_folder(settings, tokenizer, tmp_path / "slow", 1, ProgressLines(lines.append))
    assert [line.partition(":")[0] for line in lines if "slowly" in line] == [
        "text is encoded slowly, with tokenizers, as fastokens cannot"
    ]
    assert files_of(tmp_path / "slow") == files_of(folder)


def test_folder_holds_each_document_once(folder: Path, settings: BuildSettings, tokenizer: Tokenizer) -> None:
    texts = dict[str, list[str]]()
    report = json.loads((folder / "prepare.json").read_text())
    for source, counts in report["sources"].items():
        texts[source] = []
        for part in PARTS:
            shards = open_shards(folder, source, part)
            documents = [
                shard.tokens[start : start + length].tolist()
                for shard in shards
                for start, length in zip(shard.starts.tolist(), shard.lengths.tolist(), strict=True)
            ]
            texts[source] += [tokenizer.decode(ids, skip_special_tokens=True) for ids in documents]
            tables = [shard.sequences(64) for shard in shards]
            assert counts[part]["sequences"] == sum(len(table) for table in tables)
            assert [int(table.pieces[:, 2].sum()) for table in tables] == [int(shard.lengths.sum()) for shard in shards]
            assert counts[part]["documents"] == len(documents) > 0
            assert counts[part]["tokens"] == sum(len(ids) for ids in documents)
        assert counts["documents_read"] == counts["documents_kept"] == len(texts[source])
        assert counts["text_bytes"] == sum(len(text.encode()) for text in texts[source])
        assert len(counts["units"]) > 2
    parent = Path(settings.manifest).parent
    assert sorted(texts["notes"]) == sorted(path.read_text("utf-8") for path in parent.glob("notes/*"))
    rows = (parent / "rows.jsonl").read_text("utf-8").splitlines()
    assert sorted(texts["rows"]) == sorted(json.loads(row)["body"] for row in rows)


@pytest.mark.slow
def test_commands_and_workers_on_one_folder_build_each_unit_once(
    folder: Path, settings: BuildSettings, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    together = [start(settings, tmp_path / "tokenizer.json", tmp_path / "both", 2) for _ in range(2)]
    assert [process.wait() for process in together] == [0, 0]
    assert files_of(tmp_path / "both") == files_of(folder)


def start(settings: BuildSettings, tokenizer: Path, folder: Path, workers: int) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdin=subprocess.PIPE, text=True, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps([asdict(settings), str(tokenizer), str(folder), workers]))
    process.stdin.close()
    return process


def workers_of(process: "subprocess.Popen[str]") -> list[int]:
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


def kill_with_workers(process: "subprocess.Popen[str]") -> None:
    """Kills a command and its workers, and waits for the end of all."""
    workers: list[int] = []
    with suppress(FileNotFoundError):  # the command has ended
        workers = workers_of(process)
    process.kill()
    for worker in workers:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    assert process.stderr is not None
    process.stderr.read()  # its end is that of the last process that could write there
    process.wait()


@pytest.mark.long
def test_killed_commands_leave_the_files_of_an_uninterrupted_one(
    folder: Path, settings: BuildSettings, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    again = tmp_path / "again"
    draw = random.Random(0)
    num_workers = 2
    num_units = sum(len(units) for units in Build(settings, folder).units.values())
    for _ in range(4):
        complete: dict[str, int] = {}
        begun = set[Path]()
        for kills in range(1, 6):
            process = start(settings, tmp_path / "tokenizer.json", again, num_workers)
            most_files = len(times_of(again)) + draw.randrange(20)
            while process.poll() is None and sum(1 for _ in again.glob("sources/*/*")) <= most_files:
                time.sleep(0.001)
            kill_with_workers(process)
            begun |= set(again.glob("sources/*/.building-*"))
            assert len(begun) <= num_workers * kills
            complete |= {name: time for name, time in times_of(again).items() if name.endswith(".json")}
        assert start(settings, tmp_path / "tokenizer.json", again, num_workers).wait() == 0
        # A partial file of a killed process is removed by a later command, after an hour.
        complete_files = {name: data for name, data in files_of(again).items() if Path(name).name[0] != "."}
        assert complete_files == files_of(folder)
        after = times_of(again)
        assert {name: after[name] for name in complete} == complete
        report = json.loads((again / "prepare.json").read_text())
        # A command that had finished before it was killed has written the report.
        assert report["cached"] or report["units"]["built"] <= num_units - len(complete)
        for path in sorted(again.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.slow
def test_stopped_worker_ends_with_its_killed_command(
    settings: BuildSettings, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    process = start(settings, tmp_path / "tokenizer.json", tmp_path / "out", 2)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "out" / "sources").exists() and time.monotonic() < until:  # a worker has begun a unit
            time.sleep(0.01)
        worker, _ = workers_of(process)
        os.kill(worker, signal.SIGSTOP)
        process.kill()
        process.wait()
        while has_not_ended(worker) and time.monotonic() < until:
            time.sleep(0.01)
        assert not has_not_ended(worker)
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def has_not_ended(pid: int) -> bool:
    """Returns whether a process runs or is stopped. One that nobody waits for stays as a zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
def test_stopped_worker_is_named_and_ends_the_command_with_all_workers(
    settings: BuildSettings, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker is stopped for a moment only, which is no reason to end."""
    tokenizer.save(tmp_path / "tokenizer.json")
    program = f"import data.shards.run as run; run.STOPPED_LOOKS = 2\n{PROGRAM}"
    monkeypatch.setattr("tests.data.shards.test_run.PROGRAM", program)
    process = start(settings, tmp_path / "tokenizer.json", tmp_path / "out", 3)
    try:
        until = time.monotonic() + 60
        while len(workers := workers_of(process)) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        for worker in workers[1:]:
            os.kill(worker, signal.SIGSTOP)
        os.kill(workers[2], signal.SIGCONT)
        assert process.stderr is not None
        *_, line = process.stderr.read().splitlines()  # ends with the last process
        stopped = f"worker 1 of 3 (process {workers[1]}) is stopped by a signal and does not continue"
        assert line.endswith(f"{stopped}; complete units stay; nearest: the same command again")
        assert process.wait() == 1
        assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    finally:
        kill_with_workers(process)
    assert start(settings, tmp_path / "tokenizer.json", tmp_path / "out", 2).wait() == 0


def test_partial_files_of_killed_processes_are_removed_after_an_hour(
    folder: Path, settings: BuildSettings, tokenizer: Tokenizer
) -> None:
    name = f".{'0' * 16}.index-{'1' * 31}"
    abandoned, recent = (folder / "sources" / "notes" / f"{name}{number}.partial" for number in range(2))
    for path in (abandoned, recent):
        path.touch()
    os.utime(abandoned, (time.time() - 4000,) * 2)
    (folder / "prepare.json").unlink()
    build_folder(settings, tokenizer, folder, 1, NO_PROGRESS)
    assert (abandoned.exists(), recent.exists()) == (False, True)


@pytest.mark.long
def test_memory_of_a_worker_does_not_grow_with_the_text(
    settings: BuildSettings, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    draw = random.Random(0)
    letters = str.maketrans("0123456789", "ghijklmnop")
    peaks = []
    for size in (3 * 2**22, 2**26):
        with (tmp_path / "rows.jsonl").open("w") as stream:
            for _ in range(size // 2**16):  # almost all words occur once
                words = draw.randbytes(2**15).hex().translate(letters)
                text = " ".join(words[at : at + 7] for at in range(0, 2**16, 8))
                stream.write(f"{json.dumps({'body': text})}\n")
        folder = tmp_path / f"out-{size}"
        large = replace(settings, unit_bytes=2**24)
        assert start(large, tmp_path / "tokenizer.json", folder, 1).wait() == 0
        peaks.append(json.loads((folder / "prepare.json").read_text())["peak_rss_bytes"])
    assert peaks[1] - peaks[0] < 50 * 2**20
    assert peaks[1] < 600 * 2**20


@pytest.fixture
def prepared(folder: Path, settings: BuildSettings, tokenizer: Tokenizer) -> Build:
    """The finished folder with an absent unit: its JSON file is removed."""
    build = Build(settings, folder)
    build.folder_of("rows").joinpath(f"{build.units['rows'][1].name}.json").unlink()
    return build


@pytest.mark.parametrize("batches", range(3))
def test_unit_that_is_given_up_is_absent_and_then_equal(
    prepared: Build, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(prepared.folder)
    unit = prepared.units["rows"][1]
    monkeypatch.setattr("data.shards.work.BATCH_CHARACTERS", 1500)
    steps = UnitEncoder(prepared).encode(unit)
    for _ in range(batches):
        next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert prepared.read(unit) is None
    assert files_of(prepared.folder) == before
    built = {message.unit for message in build_units(prepared) if message.peak_rss_bytes}
    assert unit.name in built
    assert prepared.read(unit) is not None


def test_only_the_units_of_a_changed_file_are_built(
    folder: Path, settings: BuildSettings, tokenizer: Tokenizer
) -> None:
    before = times_of(folder)
    assert build_folder(settings, tokenizer, folder, 1, NO_PROGRESS)["cached"] is True
    assert times_of(folder) == before
    changed = Path(settings.manifest).parent / "notes" / "03.txt"
    changed.write_text(changed.read_text("utf-8").replace("seven", "eight"), "utf-8")
    report = build_folder(settings, tokenizer, folder, 1, NO_PROGRESS)
    after = times_of(folder)
    unit = next(
        unit.name for unit in Build(settings, folder).units["notes"] if "03.txt" in [key for key, *_ in unit.files]
    )
    assert {name for name in after if after[name] != before.get(name)} == {name for name in after if unit in name}
    assert set(after) == set(before)
    assert (report["cached"], report["units"]["built"]) == (False, 1)


def test_folder_of_other_settings_or_content_is_refused(
    folder: Path, settings: BuildSettings, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    before = files_of(folder)
    with pytest.raises(DataError, match=r"out: .*with the same settings.* prepared with seed=0, which is 1 now"):
        build_folder(replace(settings, seed=1), tokenizer, folder, 1, NO_PROGRESS)
    manifest = Path(settings.manifest)
    manifest.write_text(manifest.read_text().replace("fim_rate: 0", "fim_rate: 0.25", 1))
    with pytest.raises(DataError, match=r"sources\.notes\.fim_rate=0.0, which is 0.25 now"):
        build_folder(settings, tokenizer, folder, 1, NO_PROGRESS)
    assert files_of(folder) == before
    with pytest.raises(DataError, match="out: must be a new or empty folder"):
        build_folder(settings, tokenizer, tmp_path, 1, NO_PROGRESS)


def test_files_of_the_user_are_kept_and_links_in_a_folder_refused(
    folder: Path, settings: BuildSettings, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    (mine / "drafts").mkdir()
    notes = folder / "sources" / "notes"
    (notes / "README.txt").touch()
    (notes / "photos").mkdir()
    (notes / f"{'0' * 16}.index").touch()  # of an earlier unit
    (folder / "prepare.json").unlink()
    build_folder(settings, tokenizer, folder, 1, NO_PROGRESS)
    assert [(notes / name).exists() for name in ("README.txt", "photos", f"{'0' * 16}.index")] == [True, True, False]
    for name in ("sources/notes", "sources", "tokenizer.json"):
        path = folder / name
        path.rename(tmp_path / "moved")
        path.symlink_to(mine)
        before = files_of(folder)
        with pytest.raises(DataError, match=rf"^out: {path} must be a f.*is a link"):
            build_folder(settings, tokenizer, folder, 1, NO_PROGRESS)
        assert files_of(folder) == before
        assert sorted(path.name for path in mine.iterdir()) == ["drafts", "thesis.tex"]
        path.unlink()
        (tmp_path / "moved").rename(path)


@pytest.mark.parametrize("name", ["sources/rows/*.index", "settings.json", "sources/rows/*.drop.npy"])
def test_damaged_folder_is_refused_by_the_key_of_the_command(
    folder: Path, settings: BuildSettings, tokenizer: Tokenizer, name: str
) -> None:
    (path, *_) = [*folder.glob(name)] or [*folder.glob("sources/rows/train-*.sequences-64.npy")]
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")
    (folder / "prepare.json").unlink()
    for key in ("out", "data.cache_dir"):
        with pytest.raises(DataError, match=rf"^{key}: {path} must be a file"):
            build_folder(replace(settings, folder_key=key), tokenizer, folder, 1, NO_PROGRESS)


def test_folder_that_another_command_begins_meanwhile_is_not_refused(
    settings: BuildSettings, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another command writes its settings between any two looks at the folder."""
    folder = tmp_path / "out"
    folder.mkdir()
    list_folder = Path.iterdir

    def list_after_another(path: Path) -> Iterator[Path]:
        monkeypatch.setattr(Path, "iterdir", list_folder)
        build_folder(settings, tokenizer, folder, 1, NO_PROGRESS)
        return list_folder(path)

    monkeypatch.setattr(Path, "iterdir", list_after_another)
    assert build_folder(settings, tokenizer, folder, 1, NO_PROGRESS)["cached"]


def test_folder_in_which_another_process_finishes_a_file_meanwhile_is_read(
    settings: BuildSettings, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file gets its name between the list of the folder and the look at the file."""
    folder = tmp_path / "out"
    build_folder(settings, tokenizer, folder, 1, NO_PROGRESS)
    list_folder = Path.iterdir

    def list_before_another(path: Path) -> Iterator[Path]:
        with replacing(path / "finished.json") as partial:
            partial.touch()
            listed = [*list_folder(path)]
        return iter(listed)

    monkeypatch.setattr(Path, "iterdir", list_before_another)
    assert read_report(folder)["cached"] is False
    assert (folder / "finished.json").exists()


def test_files_that_another_process_removes_meanwhile_are_absent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file goes after the first look at it, and packed sequences as soon as they have their name."""
    (tokens, *_) = (folder / "sources" / "rows").glob("train-*.tokens")
    unit = tokens.stem.removeprefix("train-")
    (shard,) = (shard for shard in open_shards(folder, "rows", "train") if shard.unit == unit)
    num_sequences = len(replace(shard).sequences(32))
    drop = tokens.with_name(f"{unit}.drop.npy")

    @contextmanager
    def remove_replaced(path: Path) -> Iterator[Path]:
        with replacing(path) as partial:
            yield partial
        path.unlink()

    with monkeypatch.context() as patch:
        patch.setattr("data.shards.format.replacing", remove_replaced)
        tokens.with_name(f"train-{unit}.sequences-32.npy").unlink()
        assert len(replace(shard).sequences(32)) == num_sequences
    drop.touch()
    for name in ("stat", "lstat", "exists"):
        look = getattr(Path, name)

        def look_before_another(path: Path, look: Callable[..., Any] = look, **options: bool) -> Any:
            found = look(path, **options)
            if path in (drop, tokens.with_name(f"{unit}.index")):
                path.unlink(missing_ok=True)
            return found

        monkeypatch.setattr(Path, name, look_before_another)
    assert not read_drops(folder / "sources" / "rows", unit).any()
    assert not len(read_rows(folder / "sources" / "rows", unit))


def test_packed_sequences_that_another_process_removes_meanwhile_stay_removed(
    settings: BuildSettings, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Path(settings.manifest)
    manifest.write_text(f"{manifest.read_text()}dedup: {{kind: exact}}\n")
    find = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [*find(path, pattern), path / "train-0.sequences-64.npy"])
    assert build_folder(settings, tokenizer, tmp_path / "out", 1, NO_PROGRESS)["units"]["built"]


def test_broken_rows_of_files_with_any_name_are_a_line_each(settings: BuildSettings, tokenizer: Tokenizer) -> None:
    manifest = Path(settings.manifest)
    for name in (b"lat\xe9.jsonl", b"two\nlines.jsonl"):
        Path(os.fsdecode(os.fsencode(manifest.parent / "notes") + b"/" + name)).write_text('{"text": 5}\n')
    with pytest.raises(DataError, match=r"\.jsonl:1: a line of .jsonl must be an object with a string field"):
        build_folder(settings, tokenizer, manifest.parent / "out", 1, NO_PROGRESS)
    strict = manifest.read_text()
    manifest.write_text(f"{strict}on_broken: skip\nmax_broken_share: 0.1\n")
    build_folder(settings, tokenizer, manifest.parent / "out", 1, NO_PROGRESS)  # continues there
    places = [line.partition(b": ")[0] for line in (manifest.parent / "out/broken.txt").read_bytes().splitlines()]
    assert [os.path.basename(place) for place in places] == [b"lat\xe9.jsonl:1", b"two\\nlines.jsonl:1"]
    manifest.write_text(strict)
    (manifest.parent / "out" / "prepare.json").unlink()
    with pytest.raises(DataError, match=r"\.jsonl:1: a line of .jsonl must be an object"):
        build_folder(settings, tokenizer, manifest.parent / "out", 1, NO_PROGRESS)


def test_field_that_no_row_of_a_source_has_is_found_before_others_are_prepared(
    settings: BuildSettings, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    manifest = Path(settings.manifest)
    text = manifest.read_text().replace("text_field: body", "text_field: boody")
    manifest.write_text(f"{text}on_broken: skip\nmax_broken_share: 0.5\n")
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*; nearest: sources.rows.text_field='body'$"):
        build_folder(settings, tokenizer, tmp_path / "out", 1, NO_PROGRESS)
    assert not (tmp_path / "out" / "sources").exists()


def test_documents_that_filters_and_evaluation_files_drop_are_listed(
    settings: BuildSettings, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Path(settings.manifest)
    (tmp_path / "notes" / "00.txt").write_text("two words")
    (tmp_path / "notes" / "01.txt").write_text(
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi"
    )
    (tmp_path / "eval.jsonl").write_text(json.dumps({"q": (tmp_path / "notes" / "01.txt").read_text()}))
    limits = "max_repeated_line_share: null, max_symbol_share: null, max_repeated_ngram_share: null"
    manifest.write_text(f"{manifest.read_text()}filters: {{min_words: 3, {limits}}}\ndecontaminate: [eval.jsonl]\n")
    build_folder(settings, tokenizer, tmp_path / "out", 1, NO_PROGRESS)
    lines = (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"dropped": "notes/00.txt", "reason": "min_words"},
        {"dropped": "notes/01.txt", "reason": "contaminated"},
    ]
    monkeypatch.setattr("data.shards.work.LISTED_DROPS", 0)
    build_folder(settings, tokenizer, tmp_path / "bounded", 1, NO_PROGRESS)
    assert (tmp_path / "bounded" / "dropped.jsonl").read_text() == ""


@pytest.mark.parametrize("name", ["notes", "rows.jsonl"])
def test_folder_or_file_of_text_is_a_mixture_of_itself(
    settings: BuildSettings, tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows.replace('"body"', '"text"'))
    alone = replace(settings, manifest=str(tmp_path / name))
    report = build_folder(alone, tokenizer, tmp_path / "out", 1, NO_PROGRESS)
    (source,) = report["sources"]
    assert (source, report["sources"][source]["documents_kept"]) == {"notes": ("notes", 12)}.get(name, ("rows", 100))


@pytest.mark.parametrize("file", ["train", "index"])
def test_without_locks_a_unit_that_another_command_completes_is_equal(
    file: str, settings: BuildSettings, tokenizer: Tokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = UnitWriter.append
    twice = folder.with_name("twice")
    monkeypatch.setattr("fcntl.lockf", lambda *_: os.stat("/no locks"))

    def append_before_another_command_runs(writer: UnitWriter, name: str, values: Any) -> None:
        append(writer, name, values)
        if file in name:
            monkeypatch.setattr(UnitWriter, "append", append)
            build_folder(settings, tokenizer, twice, 1, NO_PROGRESS)

    monkeypatch.setattr(UnitWriter, "append", append_before_another_command_runs)
    build_folder(settings, tokenizer, twice, 1, NO_PROGRESS)
    assert files_of(twice) == files_of(folder)


def test_full_disk_is_one_line_and_complete_units_stay(
    settings: BuildSettings, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = UnitWriter.append
    full = iter([False] * 4)

    def append_until_full(self: UnitWriter, name: str, values: Any) -> None:
        if next(full, True):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, name, values)

    with monkeypatch.context() as patch:
        patch.setattr(UnitWriter, "append", append_until_full)
        with pytest.raises(DataError, match=r"out: .* No space left on device; complete units stay"):
            build_folder(settings, tokenizer, tmp_path / "out", 1, NO_PROGRESS)
    complete = times_of(tmp_path / "out")
    assert complete
    assert not [name for name in complete if "building" in name]
    build_folder(settings, tokenizer, tmp_path / "out", 1, NO_PROGRESS)
    after = times_of(tmp_path / "out")
    assert {name: after[name] for name in complete} == complete


def test_tokenizer_sees_sources_by_weight_and_what_small_ones_leave(settings: BuildSettings, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    build = Build(settings, tmp_path / "out")
    sizes = {name: sum(unit.size_bytes for unit in units) for name, units in build.units.items()}
    assert list(build.manifest.weights()) == [1, 2]
    for budget in (600, 3 * min(sizes.values()) // 4, sizes["rows"] + 300, 10**9):
        shares, total = _sample_shares(build, budget)
        sampled = {name: share * sizes[name] for name, share in shares.items()}
        assert abs(total - min(budget, sum(sizes.values()))) <= 2
        assert sampled["rows"] == pytest.approx(min(2 * sampled["notes"], sizes["rows"])) or shares["notes"] == 1.0
    build.close()
