"""Tests of untrusted checkpoints: none of their code runs, and invalid content is rejected with one line."""

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import distributed as dist

from comm.config import ParallelismConfig
from data.prepare import prepare
from launch.config.compose import user_errors
from launch.convert import main as convert
from launch.generate import main as generate
from tests.attacks import hostile
from tests.attacks.hostile_weights import FOLDERS, PRECISIONS
from tests.attacks.hostile_weights import MANIFESTS as MANIFEST_SPOILS
from tests.attacks.hostile_weights import RESUMED as LISTED
from tests.commands import run_command
from tests.finished_run import choices
from tests.launch.checkpoints import write_run
from tests.model.hf_checkpoints import write_tensors
from tests.ranks import run_ranks
from tests.refusals import assert_refused
from tests.tiny import BATCH, tiny_config, write_text
from tests.train.job import close_job, open_job, save_checkpoint
from train.checkpoint import load as checkpoint
from train.checkpoint.locate import verify
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.sources import check_source
from train.config import TrainConfig

# A refusal takes milliseconds; what is bounded here is a file of a terabyte that is read.
MOST_SECONDS = 20.0
MOST_BYTES = 2 * 2**30


PART = "rank_00000.safetensors"
NORM = "weights.model.norm.weight"

Spoil = Callable[[Path], object]


def change_index(**values: Any) -> Spoil:
    return lambda folder: hostile.edit_index(folder, lambda record: record.update(values))


def change_tensor(**values: Any) -> Spoil:
    """Replaces keys of a tensor in the index."""
    return lambda folder: hostile.edit_index(folder, lambda record: record["tensors"][NORM].update(values))


def change_part(place: int, value: object) -> Spoil:
    """Replaces a number of a tensor's only part: file, first element, count or CRC-32."""

    def change(record: dict[str, Any]) -> None:
        record["tensors"][NORM]["parts"][0][place] = value

    return lambda folder: hostile.edit_index(folder, change)


def name_file(name: object) -> Spoil:
    """Lets the index name another file."""
    return change_index(files=[name])


def split_parts(*parts: tuple[int, int]) -> Spoil:
    """Lets the index list parts, each from a first element to an end."""

    def change(record: dict[str, Any]) -> None:
        (file, _, _, checksum), *_ = record["tensors"][NORM]["parts"]
        record["tensors"][NORM]["parts"] = [[file, first, end - first, checksum] for first, end in parts]

    return lambda folder: hostile.edit_index(folder, change)


def change_header(**values: Any) -> Spoil:
    """Replaces keys of a tensor in the header of its file."""
    return lambda folder: hostile.edit_header(folder / PART, lambda header: header[NORM].update(values))


def put(name: str, content: Callable[[Path], bytes]) -> Spoil:
    """Replaces the bytes of a file. `content` receives the path of a proof."""
    return lambda folder: (folder / name).write_bytes(content(folder / "proof"))


def overwrite(first: int, content: bytes) -> Spoil:
    """Overwrites bytes of the file of tensors; a negative position is counted from its end."""

    def change(folder: Path) -> None:
        with (folder / PART).open("r+b") as file:
            file.seek(first, os.SEEK_SET if first >= 0 else os.SEEK_END)
            file.write(content)

    return change


CASES: list[tuple[str, Spoil, str]] = [
    ("a pickle as the index", put("index.json", hostile.payload_bytes), "index.json: must be JSON"),
    ("a pickle as tensors", put(PART, lambda proof: hostile.payload_bytes(proof) + bytes(2**20)),
     f"{PART}: header: must have at most"),
    ("a short pickle as tensors", put(PART, hostile.payload_bytes), f"{PART}: must have at least"),
    ("an index 100,000 deep", put("index.json", lambda proof: b"[" * 10**5), "index.json: must be JSON"),
    ("an index of 3,000,000 lists", put("index.json", lambda proof: b"[" + b"[]," * 3_000_000 + b"[]]"),
     "must be at most"),
    ("a key twice", put("index.json", lambda proof: b'{"files": [], "files": [], "tensors": {}}'), "every key once"),
    ("no number", put("index.json", lambda proof: b'{"files": [], "tensors": NaN}'), "it holds NaN"),
    ("an index without tensors", change_index(tensors=[]), "must hold a list of files and an object of tensors"),
    ("an index without files", change_index(files=None), "must hold a list of files and an object of tensors"),
    ("a path out of the folder", name_file("../../../../etc/passwd.safetensors"), "must name .safetensors files"),
    ("an absolute path", name_file("/etc/passwd.safetensors"), "must name .safetensors files"),
    ("the folder above", name_file(".."), "must name .safetensors files"),
    ("a path out of a node's folder", name_file("node_000001/../../x.safetensors"), "must name .safetensors files"),
    ("another file of the folder", name_file("tokenizer.json"), "must name .safetensors files"),
    ("a name of 1 MB", name_file("a" * 10**6), "must name .safetensors files"),
    ("a name with a null byte", name_file("a\0.safetensors"), "must name .safetensors files"),
    ("a number as a name", name_file(3), "must name .safetensors files"),
    ("an absent file", name_file("rank_00001.safetensors"), "rank_00001.safetensors: must be there"),
    ("a text as a tensor", lambda folder: hostile.edit_index(folder, lambda record: record["tensors"].update(a="b")),
     "index.json: a: must have one of the types"),
    ("a type that no weight has", change_tensor(dtype="C64"), "must have one of the types"),
    ("a list as a type", change_tensor(dtype=["F32"]), "must have one of the types"),
    ("another type in the index", change_tensor(dtype="F16"), "must be F16 of shape"),
    ("a negative size", change_tensor(shape=[-1]), "whole numbers"),
    ("a size of 100 bits", change_tensor(shape=[2**100]), "whole numbers"),
    ("ten thousand dimensions", change_tensor(shape=[1] * 10**4), "a shape of at most 8"),
    ("a huge shape", change_tensor(shape=[2**40]), "must have 1099511627776 elements"),
    ("another shape", change_tensor(shape=[4, 8]), "must have shape (32,), has (4, 8)"),
    ("a missing part", split_parts((0, 12)), "must have 32 elements of shape [32], have 12"),
    ("a gap between parts", split_parts((0, 8), (12, 32)), "must begin at element 8"),
    ("overlapping parts", split_parts((0, 16), (8, 32)), "must begin at element 16"),
    ("a part twice", split_parts((0, 32), (0, 32)), "must begin at element 32"),
    ("smaller parts than the file has", split_parts((0, 12), (12, 32)), "must be F32 of shape [12] by the index"),
    ("parts that are no list", change_tensor(parts="all"), "must have a list of parts"),
    ("a part of three numbers", change_tensor(parts=[[0, 0, 32]]), "a part must be a file's number"),
    ("a file that is not listed", change_part(0, 7), "a part must be a file's number"),
    ("a negative first element", change_part(1, -1), "a part must be a file's number"),
    ("a count of 1 TiB", change_part(2, hostile.ONE_TIB), "must have 32 elements of shape [32], have 1099511627776"),
    ("another checksum", change_part(3, 5), f"{PART}: {NORM}: must have the CRC-32 that the index lists"),
    ("values that were changed", overwrite(-4, b"\0\0\0\x40"), "must have the CRC-32 that the index lists"),
    ("a header of 2^63 bytes", overwrite(0, b"\xff" * 7 + b"\x7f"), "header: must have at most"),
    ("a header that is no JSON", overwrite(8, b"["), "header: must be JSON"),
    ("another type in the file", change_header(dtype="I32"), "dtype must be one of"),
    ("another shape in the file", change_header(shape=[2, 16]), "must be F32 of shape [32] by the index, is F32 of"),
    ("bytes beyond the file", change_header(data_offsets=[0, 2**40]), "header: must be one that safetensors reads"),
    ("a tensor less in the file", lambda folder: hostile.edit_header(
        folder / PART, lambda header: header.update(other=header.pop(NORM))), "must be in the file by the index"),
    ("a file cut short", lambda folder: os.truncate(folder / PART, 3000), f"{PART}: "),
]  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a checkpoint that two ranks wrote, and one that this process wrote."""
    folder = tmp_path_factory.mktemp("attacks")
    write_text(folder)
    run_ranks(2, save_one, run_config(folder))
    write_run(folder / "alone")
    return folder


def run_config(folder: Path) -> TrainConfig:
    batch = replace(BATCH, global_sequences=8)
    return tiny_config(folder, parallelism=ParallelismConfig(pipeline=1, data=2, expert=2), batch=batch)


def save_one(rank: int, world_size: int, config: TrainConfig) -> None:
    learner = open_job(config)
    save_checkpoint(config, learner, 1, prepare(config.data, config.batch.sequence_length_tokens))
    close_job(learner)


def alone(sources: Path, tmp_path: Path) -> Path:
    return hostile.copy_of(sources / "alone" / "checkpoints" / "step-00000000", tmp_path / "ours")


@pytest.fixture
def _frugal() -> Any:
    """Fails a case that reads a file of a terabyte: by time, and by memory."""
    began, before = time.monotonic(), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 * 2**30, before[1]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - began < MOST_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MOST_BYTES


@pytest.mark.slow
@pytest.mark.usefixtures("_frugal")
@pytest.mark.parametrize(("spoil", "part"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_hostile_checkpoint_is_rejected_in_one_line(spoil: Spoil, part: str, sources: Path, tmp_path: Path) -> None:
    folder = alone(sources, tmp_path)
    spoil(folder)
    hostile.rehash(folder)
    given = ["from=checkpoint", f"path={folder}", f"to={tmp_path / 'new'}"]
    text = assert_refused(CheckpointError, [f"path: {folder}: ", part], lambda: convert(given))
    assert len(text) < 1000
    assert not (folder / "proof").exists()
    assert not (tmp_path / "new").exists()


RESUMED: list[tuple[str, Spoil]] = [
    ("a pickle as the index", put("index.json", hostile.payload_bytes)),
    ("a pickle as tensors", put(PART, hostile.payload_bytes)),
    ("another type in the file", change_header(dtype="BF16")),
    ("an absent file", name_file("rank_00009.safetensors")),
]


def resume_from(rank: int, world_size: int, config: TrainConfig, folders: list[Path]) -> list[str]:
    """Returns each rank's error for each checkpoint; empty if it loads."""
    learner, said = open_job(config), []
    for folder in folders:
        try:
            checkpoint.load(learner, folder)
        except CheckpointError as error:
            said.append(str(error))
        else:
            said.append("")
        dist.barrier()
    close_job(learner)
    return said


def test_resume_runs_nothing_and_every_rank_rejects_alike(sources: Path, tmp_path: Path) -> None:
    """`guard=roll_back` reads checkpoints by the same function."""
    step = sources / "run" / "checkpoints" / "step-00000001"
    folders = [hostile.copy_of(step, tmp_path / name) for name, _ in RESUMED]
    for folder, (_, spoil) in zip(folders, RESUMED, strict=True):
        spoil(folder)
        hostile.rehash(folder)
    said = run_ranks(2, resume_from, run_config(sources), [*folders, step])
    assert said[0] == said[1]
    assert [bool(text) for text in said[0]] == [True] * len(folders) + [False]
    assert [text for text in said[0][:-1] if not text.startswith("resume: ") or "\n" in text] == []
    assert not list(tmp_path.rglob("proof"))


@pytest.mark.slow
def test_resume_command_runs_nothing_and_ends_with_code_2(tmp_path: Path) -> None:
    """Repeats the attack that was found: a crafted file with correct hashes, whose code ran on every rank."""
    write_text(tmp_path)
    first = [*choices(tmp_path, "first", 1), "parallelism=one_rank", "batch.global_sequences=2"]
    assert command(first).returncode == 0
    (folder,) = (tmp_path / "first" / "checkpoints").glob("step-*")
    (folder / "index.json").write_bytes(hostile.payload_bytes(tmp_path / "proof"))
    hostile.rehash(folder)
    second = [*choices(tmp_path, "second", 2), "parallelism=one_rank", "batch.global_sequences=2"]
    done = command([*second, f"resume={folder}"])
    assert not (tmp_path / "proof").exists()
    assert done.returncode == 2, done.stderr
    assert "cannot be read by rank 0: index.json: must be JSON" in done.stderr
    assert "Traceback" not in done.stderr


def command(overrides: list[str]) -> subprocess.CompletedProcess[str]:
    return run_command(["-m", "launch.train", *overrides])


MANIFESTS: list[tuple[str, Spoil, str]] = [
    ("edited", lambda folder: (folder / "manifest.json").write_text(
        (folder / "manifest.json").read_text().replace('"step": 0', '"step": 7')), "must have the hash that it states"),
    ("a path out of the folder", lambda folder: hostile.edit_manifest(
        folder, lambda record: record["files"].update({"../../../../etc/passwd": {"bytes": 1, "sha256": ""}})),
     "must list files in its folder"),
    ("the folder above", lambda folder: hostile.edit_manifest(
        folder, lambda record: record["files"].update({"..": {"bytes": 1, "sha256": ""}})),
     "must list files in its folder"),
    ("a file of 1 TiB", lambda folder: [hostile.sparse(folder / PART), hostile.edit_manifest(
        folder, lambda record: record["files"][PART].update(bytes=hostile.ONE_TIB))],
     "must have at most"),
    ("a manifest of 1 TiB", lambda folder: hostile.sparse(folder / "manifest.json"), "must be at most"),
    ("a manifest 100,000 deep", lambda folder: (folder / "manifest.json").write_text("[" * 10**5), "cannot be read"),
    ("a step of 400 digits", lambda folder: hostile.edit_manifest(
        folder, lambda record: record.update(step=10**400)), "must have a step"),
    ("a file that is a pipe", lambda folder: [(folder / PART).unlink(), os.mkfifo(folder / PART)],
     "must be a regular file, is not"),
    ("a file that links to itself", lambda folder: hostile.loop(folder / PART), "cannot be read"),
    ("a file that links to a device",
     lambda folder: [(folder / PART).unlink(), (folder / PART).symlink_to("/dev/zero")], "must be a regular file"),
    ("an index of 1 TiB", lambda folder: hostile.sparse(folder / "index.json"), "index.json must have"),
    ("an index that is a pipe", lambda folder: [(folder / "index.json").unlink(), os.mkfifo(folder / "index.json")],
     "must be a regular file, is not"),
    ("sizes that are texts", lambda folder: hostile.edit_manifest(
        folder, lambda record: record["files"][PART].update(bytes="1")), "must list a size for every file"),
]  # fmt: skip


@pytest.mark.usefixtures("_frugal")
@pytest.mark.parametrize(("spoil", "part"), [case[1:] for case in MANIFESTS], ids=[case[0] for case in MANIFESTS])
def test_a_hostile_manifest_is_rejected_in_one_line(spoil: Spoil, part: str, sources: Path, tmp_path: Path) -> None:
    folder = alone(sources, tmp_path)
    hostile.rehash(folder)
    spoil(folder)
    assert_refused(CheckpointError, [part], lambda: verify(folder))


@pytest.fixture(scope="module")
def weights(sources: Path) -> Path:
    """Creates the same weights as a checkpoint and as a Hugging Face folder of two shards."""
    hostile.copy_of(sources / "alone" / "checkpoints" / "step-00000000", sources / "checkpoint")
    assert convert(["from=checkpoint", f"path={sources / 'checkpoint'}", f"to={sources / 'hf'}"]) == 0
    tensors = load_file(sources / "hf" / "model.safetensors")
    write_tensors(sources / "hf", tensors, num_files=2)
    return sources


def readers(form: str, folder: Path) -> dict[str, Callable[[], object]]:
    """Returns the functions by which commands read a folder of weights."""
    new = folder.with_name("new")
    return {
        "generate": lambda: generate([f"ckpt={folder}", "prompt=a", "max_new_tokens=2"]),
        "convert": lambda: convert([f"from={form}", f"path={folder}", f"to={new}", "processes=1"]),
        "init_from": lambda: check_source(str(folder), "init_from"),
    }


def time_out(number: int, frame: object) -> None:
    raise TimeoutError("hangs")


@pytest.mark.slow
@pytest.mark.parametrize(("form", "table"), [("checkpoint", MANIFEST_SPOILS), ("hf", FOLDERS)])
def test_every_command_refuses_hostile_weights_in_one_line(
    form: str, table: Mapping[str, Spoil], weights: Path, tmp_path: Path
) -> None:
    """Sizes that are huge, negative, floats, texts, missing or contradict the files; links, pipes and folders."""
    whole = hostile.copy_of(weights / form, tmp_path / "whole" / form)
    assert outcomes(form, whole) == dict.fromkeys(readers(form, tmp_path), "done")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrong: dict[str, str] = {}
    for number, (name, spoil) in enumerate(table.items()):
        folder = hostile.copy_of(weights / form, tmp_path / str(number) / form)
        spoil(folder)
        wrong |= {f"{name}: {command}": text for command, text in outcomes(form, folder).items() if text != "refused"}
    assert wrong == {}
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MOST_BYTES


@pytest.mark.parametrize("name", PRECISIONS)
def test_hostile_precision_is_refused_in_one_line(name: str, weights: Path, tmp_path: Path) -> None:
    folder = hostile.copy_of(weights / "checkpoint", tmp_path / "checkpoint")
    PRECISIONS[name](folder)
    assert outcomes("checkpoint", folder)["generate"] == "refused"


@pytest.mark.usefixtures("_frugal")
def test_hostile_lists_of_files_are_refused_in_one_line(weights: Path, tmp_path: Path) -> None:
    verify(weights / "checkpoint")
    for number, (name, spoil) in enumerate(LISTED.items()):
        folder = hostile.copy_of(weights / "checkpoint", tmp_path / str(number))
        spoil(folder)
        assert ended(lambda: verify(folder)) == "refused", name  # noqa: B023  called at once


def outcomes(form: str, folder: Path) -> dict[str, str]:
    """Returns how each command ends: `done`, `refused` in one line, or with which other error."""
    return {command: ended(read) for command, read in readers(form, folder).items()}


def ended(read: Callable[[], object]) -> str:
    before = signal.signal(signal.SIGALRM, time_out)
    signal.alarm(10)
    try:
        read()
    except user_errors() as error:
        text = str(error)
        return "refused" if "\n" not in text and len(text) < 1000 and text.isprintable() else text[:2000]
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return "done"
