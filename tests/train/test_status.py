"""Tests the status of a run, its events, and the checkpoint from which it resumes."""

from pathlib import Path

import pytest

from launch.config.run_config import check
from tests.launch.test_config import build
from train.checkpoint.locate import newest_whole
from train.checkpoint.manifest import CheckpointError, write_manifest
from train.config.errors import ConfigError
from train.files.json_lines import append_event, read_events
from train.files.status import StatusFile, read_status, write_end
from train.guard.guard import to_json_values


def test_status_is_written_by_one_rank_and_at_a_limited_rate(tmp_path: Path) -> None:
    StatusFile(tmp_path, is_writer=False).starting()
    assert read_status(tmp_path) is None
    file = StatusFile(tmp_path, is_writer=True, every_seconds=60.0)
    for tell, expected in (
        (file.starting, ("starting", 0, None)),
        (lambda: file.running(3), ("running", 3, None)),
        (lambda: file.running(4), ("running", 3, None)),  # too early to be written
        (lambda: file.running(5, "there"), ("running", 5, "there")),
        (lambda: file.ended("preempted", 75, "preempted by a signal"), ("preempted", 5, "there")),
    ):
        tell()
        status = read_status(tmp_path)
        assert status is not None
        assert (status.state, status.step, status.checkpoint) == expected
    assert status is not None
    assert (status.exit_code, status.reason) == (75, "preempted by a signal")
    assert status.time > 1.7e9
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_status_of_an_ended_run_keeps_step_and_checkpoint(tmp_path: Path) -> None:
    file = StatusFile(tmp_path, is_writer=True)
    file.running(5, "there")
    write_end(tmp_path, "lost", 78, "rank 0 is lost")
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.step, status.checkpoint, status.exit_code) == ("lost", 5, "there", 78)
    again = StatusFile(tmp_path, is_writer=True)
    again.starting()
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.step, status.checkpoint, status.exit_code) == ("starting", 5, "there", None)
    for text in ("{", "[]", '{"state": "done", "more": 1}'):
        (tmp_path / "status.json").write_text(text)
        assert read_status(tmp_path) is None


def test_events_are_lines_of_json_with_any_numbers(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    append_event(
        tmp_path, "skipped", 3, "loss is nan", values=to_json_values({"loss": float("nan"), "gradient norm": 2.5})
    )
    append_event(tmp_path, "restarted", 4, "rank 1 is lost", restart=1)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "ev')
    first, second = read_events(tmp_path)
    assert (first["kind"], first["step"], first["values"]) == ("skipped", 3, {"loss": "nan", "gradient norm": 2.5})
    assert (second["text"], second["restart"]) == ("rank 1 is lost", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_event(tmp_path, "skipped", 3, "", loss=float("nan"))
    # What was left half takes no later line with it.
    append_event(tmp_path, "preempted", 5, "preempted by a signal")
    assert [event["kind"] for event in read_events(tmp_path)] == ["skipped", "restarted", "preempted"]


def place(out_dir: Path, steps: int, *overrides: str) -> Path:
    """The manifest of a checkpoint of the default model."""
    folder = out_dir / "checkpoints" / f"step-{steps:08d}"
    folder.mkdir(parents=True)
    write_manifest(folder, steps, build(*overrides), "f00d")
    return folder


def test_newest_checkpoint_is_the_last_whole_one(tmp_path: Path) -> None:
    assert newest_whole(tmp_path / "none") is None
    assert newest_whole(tmp_path) is None
    two, four = place(tmp_path, 2), place(tmp_path, 4)
    (tmp_path / "checkpoints" / "step-00000006").mkdir()
    (tmp_path / "checkpoints" / "step-00000008.partial").mkdir()
    assert newest_whole(tmp_path) == four
    assert [newest_whole(tmp_path, steps) for steps in (1, 2, 3, 4, 9)] == [None, two, two, four, four]


def test_automatic_resume_is_checked_against_the_newest_checkpoint(tmp_path: Path) -> None:
    auto = ("resume=auto", f"out_dir={tmp_path / 'run'}")
    check(build(*auto))
    place(tmp_path / "run", 10)
    check(build(*auto))
    check(build(*auto, f"init_from={tmp_path / 'run'}"))  # of its first start; it is not read again
    check(build(*auto, "task.steps=10"))  # done but for its end
    with pytest.raises(CheckpointError, match=r"model\.hidden_size"):
        check(build(*auto, "model.hidden_size=64"))
    with pytest.raises(ConfigError, match=r"^resume: auto searches out_dir for checkpoints, but out_dir is empty"):
        check(build("resume=auto"))
