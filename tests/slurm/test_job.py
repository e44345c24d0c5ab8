"""Tests of jobs on a real Slurm with two nodes: they equal runs of the built-in launcher, even after preemption."""

import sys
from pathlib import Path

import pytest

from tests.finished_run import assert_same_end, choices, logs, num_steps_recorded, run_bare
from tests.slurm.cluster import Slurm, SlurmError
from tests.tiny import write_text

pytestmark = pytest.mark.long

NUM_STEPS = 60
SECONDS = 400.0
SUBMIT = (sys.executable, "-m", "launch.submit")
JOB = ("slurm.time=20", "slurm.signal_seconds=60", "slurm.cpus_per_node=4")
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates the text, and the run that all others must equal."""
    folder = tmp_path_factory.mktemp("jobs")
    write_text(folder)
    run_bare(folder, "bare", NUM_STEPS)
    return folder


def submit(slurm: Slurm, folder: Path, name: str, *overrides: str) -> str:
    """Submits the run and returns the job's number."""
    said = slurm.run(*SUBMIT, *choices(folder, name, NUM_STEPS), *JOB, *overrides)
    assert said.startswith("submitted job "), said
    return said.split()[2].rstrip(":")


def wait_until_over(slurm: Slurm, number: str, run: Path) -> dict[str, str]:
    """Returns Slurm's record of the job at its end."""
    try:
        slurm.wait_for(f"end of job {number}", lambda: slurm.job(number)["JobState"] in FINAL, SECONDS)
    except SlurmError as error:
        raise AssertionError(f"{error}\n{logs(run / 'log')}") from error
    return slurm.job(number)


def test_job_of_two_nodes_ends_as_under_the_built_in_launcher(slurm: Slurm, folder: Path) -> None:
    number, run = submit(slurm, folder, "uninterrupted"), folder / "uninterrupted"
    job = wait_until_over(slurm, number, run)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), logs(run / "log")
    assert_same_end(run, folder / "bare")
    # Ranks follow the nodes' names: the first of them, which speaks, is on n1.
    assert "4 ranks" in (run / "log" / f"slurm-{number}-node-0.log").read_text()
    assert "4 ranks" not in (run / "log" / f"slurm-{number}-node-1.log").read_text()
    assert (run / "log" / "rank_00003.log").is_file()
    assert "resume=auto" in (run / "overrides.txt").read_text().splitlines()


def test_job_that_is_preempted_saves_is_requeued_and_ends_the_same(slurm: Slurm, folder: Path) -> None:
    number, run = submit(slurm, folder, "preempted"), folder / "preempted"
    slurm.wait_for("first steps", lambda: num_steps_recorded(run) >= 3, SECONDS)
    slurm.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    job = wait_until_over(slurm, number, run)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), logs(run / "log")
    assert int(job["Restarts"]) >= 1, logs(run / "log")
    assert (run / "log" / f"slurm-{number}-0.exit").read_text() == "75\n", logs(run / "log")
    said = (run / "log" / f"slurm-{number}.log").read_text()
    assert "preempted; ranks save" in said
    assert f"attempt {number}-0 ended with exit code 75" in said
    assert "resumed after step" in (run / "log" / f"slurm-{number}-node-0.log").read_text()
    assert_same_end(run, folder / "bare")


def test_job_preempted_while_it_starts_is_requeued(slurm: Slurm, folder: Path) -> None:
    number, log = submit(slurm, folder, "early"), folder / "early" / "log"
    slurm.wait_for("start on a node", lambda: (log / f"slurm-{number}-node-0.log").exists(), SECONDS)
    slurm.run("scancel", "--signal=USR1", number)
    slurm.wait_for("its return to the queue", lambda: slurm.job(number)["Restarts"] == "1", SECONDS)
    assert f"attempt {number}-0 ended with exit code 75" in (log / f"slurm-{number}.log").read_text()
    slurm.run("scancel", number)
    slurm.wait_for("its end", lambda: not slurm.run("squeue", "--noheader"), SECONDS)


def test_job_that_loses_a_rank_is_requeued_and_ends_the_same(slurm: Slurm, folder: Path) -> None:
    number, run = submit(slurm, folder, "lost", "checkpointing.every_steps=5"), folder / "lost"
    slurm.wait_for("a checkpoint", lambda: num_steps_recorded(run) >= 8, SECONDS)
    slurm.run("pkill", "--newest", "--signal", "KILL", "--full", f"^{sys.executable} .*-m launch.train .*name=lost")
    job = wait_until_over(slurm, number, run)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), logs(run / "log")
    assert f"attempt {number}-0 ended with exit code 78" in (run / "log" / f"slurm-{number}.log").read_text()
    assert "resumed after step" in (run / "log" / f"slurm-{number}-node-0.log").read_text()
    assert_same_end(run, folder / "bare")


def test_job_on_a_node_that_fails_its_check_starts_no_rank(slurm: Slurm, folder: Path) -> None:
    number = submit(slurm, folder, "unhealthy", "slurm.max_requeues=1", 'slurm.extra=["--hold"]')
    run = folder / "unhealthy"
    (run / ".health-n2").mkdir()  # so n2 cannot write the file of its check
    slurm.run("scontrol", "release", number)
    job = wait_until_over(slurm, number, run)
    said = (run / "log" / f"slurm-{number}.log").read_text()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "78:0", "1"), said
    assert said.count(f"error: node n2: out_dir: '{run}' must be writable, is not:") == 2
    assert "error: node n1" not in said
    assert "ended 2 times without a new checkpoint; not requeued" in said
    assert not list((run / "log").glob("*-node-*.log"))


def test_job_that_is_cancelled_stays_so(slurm: Slurm, folder: Path) -> None:
    number, run = submit(slurm, folder, "cancelled"), folder / "cancelled"
    slurm.wait_for("first steps", lambda: num_steps_recorded(run) >= 3, SECONDS)
    slurm.run("scancel", number)
    job = wait_until_over(slurm, number, run)
    assert job["JobState"] == "CANCELLED"
    slurm.wait_for("end of its processes", lambda: not slurm.run("squeue", "--noheader"), SECONDS)
    assert slurm.job(number)["JobState"] == "CANCELLED"
    assert slurm.job(number)["Restarts"] == "0"


def test_job_that_slurm_rejects_is_one_line_and_leaves_nothing(slurm: Slurm, folder: Path) -> None:
    done = slurm.attempt(*SUBMIT, *choices(folder, "refused", NUM_STEPS), *JOB, "slurm.partition=none")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: slurm: sbatch must accept the job, did not: ")
    assert "invalid partition" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (folder / "refused").exists()
