"""Tests of untrusted checkpoints: none of their code runs, and invalid content is rejected with one line."""

import os
import pickle
import resource
import subprocess
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from comm.config import ParallelismConfig
from data.prepare import prepare
from launch.convert import main as convert
from tests.attacks import hostile
from tests.commands import run_command
from tests.finished_run import choices
from tests.launch.checkpoints import write_run
from tests.ranks import run_ranks
from tests.tiny import BATCH, tiny_config, write_text
from tests.train.job import close_job, open_job
from train.checkpoint import load as checkpoint
from train.checkpoint.dcp.metadata import read_metadata
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.state import SliceLoadPlanner
from train.checkpoint.verify import verify
from train.checkpoint.weights import CheckpointReader
from train.config import TrainConfig

# A refusal takes milliseconds; what is bounded here is a file of a terabyte that is read.
MOST_SECONDS = 20.0
MOST_BYTES = 2 * 2**30


def payload_as_values(folder: Path) -> None:
    """Declares a tensor to be another object, which torch's planner unpickles without restriction."""
    hostile.replace_first_chunk(folder, hostile.payload_bytes(folder / "proof"))

    def declare(metadata: Any) -> None:
        name = next(name for name in metadata.state_dict_metadata if "embed_tokens" in name)
        place = hostile.first_place(metadata)
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
        metadata.storage_data = {index: each for index, each in metadata.storage_data.items() if index.fqn != name} | {
            MetadataIndex(name): place
        }

    hostile.edit_metadata(folder, declare)


def change_place(**values: object) -> Callable[[Path], None]:
    """Changes the location of the embedding."""

    def change(folder: Path) -> None:
        hostile.edit_metadata(
            folder,
            lambda metadata: [setattr(hostile.first_place(metadata), key, value) for key, value in values.items()],
        )

    return change


def change_tensor(act: Callable[[Any], object]) -> Callable[[Path], None]:
    """Changes the entry of the embedding in the list."""

    def change(folder: Path) -> None:
        hostile.edit_metadata(folder, lambda metadata: act(metadata.state_dict_metadata["weights.model.norm.weight"]))

    return change


def put(name: str, content: Callable[[Path], bytes]) -> Callable[[Path], None]:
    """Replaces the bytes of a file."""
    return lambda folder: (folder / name).write_bytes(content(folder / "proof")) and None


def deflated(folder: Path) -> None:
    """Writes a few kilobytes that decompress to a gigabyte."""
    values = hostile.archive(b"\x80\x02N.", bytes(2**26), compression=zipfile.ZIP_DEFLATED)
    hostile.replace_first_chunk(folder, values)


def other_type(folder: Path) -> None:
    """Writes a tensor with the same shape and another type."""
    with CheckpointFile(folder) as tensor:
        tensor.values = tensor.values.to(torch.float16)


def other_shape(folder: Path) -> None:
    """Writes a tensor with one column less."""
    with CheckpointFile(folder) as tensor:
        tensor.values = tensor.values[:, :-1].clone()


class CheckpointFile:
    """The embedding of a checkpoint, for replacement by another tensor in the format of torch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.values = torch.empty(0)

    def __enter__(self) -> "CheckpointFile":
        self.values = CheckpointReader(self._folder, "path").tensor("model.embed_tokens.weight", torch.float32)
        return self

    def __exit__(self, *raised: object) -> None:
        path = self._folder / "tensor"
        torch.save(self.values, path)
        hostile.replace_first_chunk(self._folder, path.read_bytes())
        path.unlink()


CASES: list[tuple[str, Callable[[Path], object], str]] = [
    ("pickle as the list", put(".metadata", hostile.payload_bytes), "only plain records, names pathlib.Path.touch"),
    ("pickle within the list", lambda folder: hostile.edit_metadata(
        folder, lambda metadata: setattr(metadata, "planner_data", hostile.Payload(folder / "proof"))),
     "only plain records, names"),
    ("pickle as values", payload_as_values, "must be a TensorStorageMetadata"),
    ("pickle as a file of tensors", lambda folder: hostile.replace_first_chunk(
        folder, hostile.payload_bytes(folder / "proof")), "must hold a tensor as torch saves it"),
    ("pickle as a tensor's header", lambda folder: hostile.replace_first_chunk(
        folder, hostile.archive(hostile.payload_bytes(folder / "proof"), bytes(8))), "only plain records, names"),
    ("a memo of 32 GiB", put(".metadata", lambda proof: hostile.huge_memo()), "must be a Metadata"),
    ("tuples a million deep", put(".metadata", lambda proof: hostile.deep_tuples(10**6)), "at most three levels"),
    ("a list of 1 TiB", lambda folder: hostile.sparse(folder / ".metadata"), "in a file of at most"),
    ("a list that is a pipe", lambda folder: [(folder / ".metadata").unlink(), os.mkfifo(folder / ".metadata")],
     "is no file"),
    ("a list that links to itself", lambda folder: hostile.loop(folder / ".metadata"), "symbolic links"),
    ("millions of entries", put(".metadata", lambda proof: pickle.dumps([[]] * 3_000_000)), "in a file of at most"),
    ("a path out of the folder", change_place(relative_path="../../../../etc/passwd"), "must name files in its folder"),
    ("an absolute path", change_place(relative_path="/etc/passwd"), "must name files in its folder"),
    ("the folder above", change_place(relative_path=".."), "must name files in its folder"),
    ("a place beyond the file", change_place(offset=2**40), "must have at least"),
    ("a negative offset", change_place(offset=-1), "whole numbers from 0"),
    ("a negative length", change_place(length=-1), "whole numbers from 0"),
    ("a length of 1 TiB", change_place(length=2**40), "must take at most"),
    ("a number of 100 bits", change_place(length=2**100), "at most 64 bits"),
    ("a transformed file", change_place(transform_descriptors=["zstd"]), "must hold tensors without transformation"),
    ("a huge shape", change_tensor(lambda tensor: setattr(tensor, "size", torch.Size([2**40]))), "together"),
    ("a chunk too few", change_tensor(lambda tensor: tensor.chunks.pop()), "together"),
    ("ten thousand dimensions", change_tensor(lambda tensor: setattr(tensor, "size", torch.Size([1] * 10**4))),
     "at most 8 dimensions"),
    ("another type in the list", change_tensor(lambda tensor: setattr(tensor.properties, "dtype", torch.complex64)),
     "torch.complex64"),
    ("another type in the file", other_type, "must be torch.float32 as .metadata says, is torch.float16"),
    ("another shape in the file", other_shape, "must have shape"),
    ("a compressed archive", deflated, "must hold uncompressed values"),
    ("an archive of 100,000 members", lambda folder: hostile.replace_first_chunk(folder, hostile.many_members(10**5)),
     "must take at most"),
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
    checkpoint.save(config, learner, 1, prepare(config.data, config.batch.sequence_length_tokens))
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


@pytest.mark.usefixtures("_frugal")
@pytest.mark.parametrize(("spoil", "part"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_hostile_checkpoint_is_rejected_in_one_line(
    spoil: Callable[[Path], object], part: str, sources: Path, tmp_path: Path
) -> None:
    folder = alone(sources, tmp_path)
    spoil(folder)
    with pytest.raises(CheckpointError) as refused:
        convert(["from=checkpoint", f"path={folder}", f"to={tmp_path / 'new'}"])
    text = str(refused.value)
    assert text.startswith(f"path: {folder}: ")
    assert part in text
    assert "\n" not in text
    assert len(text) < 1000
    assert not (folder / "proof").exists()
    assert not (tmp_path / "new").exists()


RESUMED = [
    ("pickle as the list", put(".metadata", hostile.payload_bytes)),
    ("pickle as values", payload_as_values),
    ("pickle as a tensor's header", lambda folder: hostile.replace_first_chunk(
        folder, hostile.archive(hostile.payload_bytes(folder / "proof"), bytes(8)))),
    ("a place beyond the file", change_place(offset=2**40)),
]  # fmt: skip


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


def test_resume_command_runs_nothing_and_ends_with_code_2(tmp_path: Path) -> None:
    """Repeats the attack that was found: a crafted list with correct hashes, whose code ran on every rank."""
    write_text(tmp_path)
    first = [*choices(tmp_path, "first", 1), "parallelism=one_rank", "batch.global_sequences=2"]
    assert command(first).returncode == 0
    (folder,) = (tmp_path / "first" / "checkpoints").glob("step-*")
    (folder / ".metadata").write_bytes(hostile.payload_bytes(tmp_path / "proof"))
    hostile.rehash(folder)
    second = [*choices(tmp_path, "second", 2), "parallelism=one_rank", "batch.global_sequences=2"]
    done = command([*second, f"resume={folder}"])
    assert not (tmp_path / "proof").exists()
    assert done.returncode == 2, done.stderr
    assert "only plain records, names" in done.stderr
    assert "Traceback" not in done.stderr


def command(overrides: list[str]) -> subprocess.CompletedProcess[str]:
    return run_command(["-m", "launch.train", *overrides])


def test_bytes_are_never_loaded(sources: Path) -> None:
    """torch's own planner unpickles here without restriction."""
    planner = SliceLoadPlanner()
    folder = sources / "alone" / "checkpoints" / "step-00000000"
    planner.set_up_planner({"weights.absent": torch.empty(1)}, read_metadata(folder, "path"), True)
    with pytest.raises(ValueError, match=r"weights\.absent: must be a tensor of the checkpoint, is missing"):
        planner.create_local_plan()
    item: Any = type("Item", (), {"dest_index": MetadataIndex("weights.a")})
    with pytest.raises(ValueError, match=r"weights\.a: must be a tensor"):
        planner.load_bytes(item, None)  # type: ignore[arg-type]


MANIFESTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("edited", lambda folder: (folder / "manifest.json").write_text(
        (folder / "manifest.json").read_text().replace('"step": 0', '"step": 7')), "must have the hash that it states"),
    ("a path out of the folder", lambda folder: hostile.edit_manifest(
        folder, lambda record: record["files"].update({"../../../../etc/passwd": {"bytes": 1, "sha256": ""}})),
     "must list files in its folder"),
    ("the folder above", lambda folder: hostile.edit_manifest(
        folder, lambda record: record["files"].update({"..": {"bytes": 1, "sha256": ""}})),
     "must list files in its folder"),
    ("a file of 1 TiB", lambda folder: [hostile.sparse(folder / "__0_0.distcp"), hostile.edit_manifest(
        folder, lambda record: record["files"]["__0_0.distcp"].update(bytes=hostile.ONE_TIB))],
     "must have at most"),
    ("a manifest of 1 TiB", lambda folder: hostile.sparse(folder / "manifest.json"), "must be at most"),
    ("a manifest 100,000 deep", lambda folder: (folder / "manifest.json").write_text("[" * 10**5), "cannot be read"),
    ("a step of 400 digits", lambda folder: hostile.edit_manifest(
        folder, lambda record: record.update(step=10**400)), "must have a step"),
    ("a file that is a pipe", lambda folder: [(folder / "__0_0.distcp").unlink(), os.mkfifo(folder / "__0_0.distcp")],
     "must be a regular file, is not"),
    ("a file that links to itself", lambda folder: hostile.loop(folder / "__0_0.distcp"), "cannot be read"),
    ("sizes that are texts", lambda folder: hostile.edit_manifest(
        folder, lambda record: record["files"]["__0_0.distcp"].update(bytes="1")), "must list a size for every file"),
]  # fmt: skip


@pytest.mark.usefixtures("_frugal")
@pytest.mark.parametrize(("spoil", "part"), [case[1:] for case in MANIFESTS], ids=[case[0] for case in MANIFESTS])
def test_a_hostile_manifest_is_rejected_in_one_line(
    spoil: Callable[[Path], object], part: str, sources: Path, tmp_path: Path
) -> None:
    folder = alone(sources, tmp_path)
    hostile.rehash(folder)
    spoil(folder)
    with pytest.raises(CheckpointError) as refused:
        verify(folder)
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)
