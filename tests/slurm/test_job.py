"""Tests of jobs on a real Slurm: they end as a run of the built-in launcher, even after preemptions and a lost rank."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.finished_run import assert_same_end, choices, logs, num_steps_recorded, run_bare, waiting_plugin
from tests.slurm.cluster import Slurm, SlurmError
from tests.tiny import write_text

pytestmark = pytest.mark.long

NUM_STEPS = 7
SECONDS = 400.0
SUBMIT = (sys.executable, "-m", "launch.submit")
JOB = (
    *("slurm.time=20", "slurm.signal_seconds=60", "slurm.cpus_per_node=4", "slurm.max_requeues=1"),
    "cluster.ranks_per_node=1",
)
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    write_text(folder)
    return folder


@dataclass(frozen=True)
class Job:
    """A submitted run in the folder `run`. It waits in its steps 4 and 6."""

    slurm: Slurm
    number: str
    run: Path

    @classmethod
    def submit(cls, slurm: Slurm, folder: Path, name: str, parallelism: str, *options: str) -> "Job":
        """Submits a run with these options of sbatch."""
        overrides = [*JOB, waiting_plugin(folder / f"{name}-plugin"), "checkpointing.every_steps=5"]
        overrides.append(f"slurm.extra={json.dumps(options)}")
        said = slurm.run(*SUBMIT, *choices(folder, name, NUM_STEPS, parallelism), *overrides)
        assert said.startswith("submitted job "), said
        return cls(slurm, said.split()[2].rstrip(":"), folder / name)

    @property
    def state(self) -> dict[str, str]:
        return self.slurm.job(self.number)

    def wait_for_steps(self, number: int) -> None:
        self.slurm.wait_for(f"step {number}", lambda: num_steps_recorded(self.run) >= number, SECONDS)

    def go_on(self, step: int) -> None:
        self.run.with_name(f"{self.run.name}-plugin").joinpath(f"step_{step}").touch()

    def end(self) -> tuple[str, str, str]:
        """Returns the job's state, exit code and number of restarts at its end."""
        try:
            self.slurm.wait_for(f"end of job {self.number}", lambda: self.state["JobState"] in FINAL, SECONDS)
        except SlurmError as error:
            raise AssertionError(f"{error}\n{logs(self.run / 'log')}") from error
        state = self.state
        return state["JobState"], state["ExitCode"], state["Restarts"]

    def log(self, name: str = "") -> str:
        """Returns a log of the job: of its script, or `-node-0.log` of its first node."""
        return (self.run / "log" / f"slurm-{self.number}{name or '.log'}").read_text()


def test_job_on_a_node_that_fails_its_check_starts_no_rank(slurm: Slurm, folder: Path) -> None:
    job = Job.submit(slurm, folder, "unhealthy", "two_ranks", "--nodelist=n4,n5", "--hold")
    (job.run / ".health-n5").mkdir()  # so n5 cannot write the file of its check
    slurm.run("scontrol", "release", job.number)
    assert job.end() == ("FAILED", "78:0", "1"), job.log()
    said = job.log()
    assert said.count(f"error: node n5: out_dir: '{job.run}' must be writable, is not:") == 2
    assert "error: node n4" not in said
    assert "ended 2 times without a new checkpoint; not requeued" in said
    assert not list((job.run / "log").glob("*-node-*.log"))


def test_job_that_is_preempted_twice_and_loses_a_rank_ends_as_under_the_built_in_launcher(
    slurm: Slurm, folder: Path
) -> None:
    run_bare(folder, "bare", NUM_STEPS, "two_ranks")
    job = Job.submit(slurm, folder, "interrupted", "two_ranks", "--nodelist=n1,n2")
    log = job.run / "log"
    # Preempted while it starts.
    slurm.wait_for("start on a node", lambda: (log / f"slurm-{job.number}-node-0.log").exists(), SECONDS)
    slurm.run("scancel", "--signal=USR1", job.number)
    slurm.wait_for("its return to the queue", lambda: job.state["Restarts"] == "1", SECONDS)
    assert f"attempt {job.number}-0 ended with exit code 75" in job.log()
    # Preempted in step 4 by another job.
    job.wait_for_steps(3)
    slurm.run("sbatch", "--partition=high", "--nodelist=n1,n2", "--exclusive", "--output=/dev/null", "--wrap=true")
    slurm.wait_for("its second return", lambda: int(job.state["Restarts"]) >= 2, SECONDS)
    assert job.log("-1.exit") == "75\n", logs(log)
    assert "preempted; ranks save" in job.log()
    assert f"attempt {job.number}-1 ended with exit code 75" in job.log()
    # Killed in step 6.
    job.wait_for_steps(5)
    restarts = int(job.state["Restarts"])
    slurm.run("pkill", "--newest", "--signal", "KILL", "--full", f"^{sys.executable} .*-m launch.train .*name=inter")
    job.go_on(6)
    # Slurm starts a job that it preempted once more after its end; the run has no step left then.
    assert job.end()[:2] == ("COMPLETED", "0:0"), logs(log)
    assert job.log().count("ended with exit code 78") == 1
    assert f"attempt {job.number}-{restarts} ended with exit code 78" in job.log()
    assert job.log("-node-0.log").count("resumed after step") >= 2
    assert_same_end(job.run, folder / "bare")
    # Ranks follow the nodes' names: the first of them, which speaks, is on n1.
    assert "2 ranks" in job.log("-node-0.log")
    assert "2 ranks" not in job.log("-node-1.log")
    assert (log / "rank_00001.log").is_file()
    assert "resume=auto" in (job.run / "overrides.txt").read_text().splitlines()


def test_job_that_is_cancelled_stays_so(slurm: Slurm, folder: Path) -> None:
    job = Job.submit(slurm, folder, "cancelled", "one_rank", "--nodelist=n3")
    job.wait_for_steps(3)
    slurm.run("scancel", job.number)
    assert job.end()[0] == "CANCELLED"
    slurm.wait_for("end of its processes", lambda: not slurm.run("squeue", "--noheader"), SECONDS)
    assert job.state["JobState"] == "CANCELLED"
