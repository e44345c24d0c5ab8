"""Tests of batch scripts: they fit the run's layout, and invalid options are rejected with one line."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from base.refusal import ConfigError
from launch.config.compose import compose, own_keys, user_errors
from launch.submit import job_overrides, main, seconds_of, with_cluster
from launch.train import export_exit_code
from tests.commands import run_command
from tests.refusals import assert_refused

SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")


def rendered(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    assert main(["dry_run=true", *overrides]) == 0
    return capsys.readouterr().out


def place_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str = "echo 17") -> None:
    """Puts a command `sbatch` in front of all others."""
    sbatch = folder / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")


def options_of(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_script_asks_for_what_the_layout_needs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = rendered(
        capsys,
        *("model=v3_671b", "parallelism=v3_2048_ranks", "batch.global_sequences=8192", "name=big"),
        *("validation.sequences=8192", "slurm.partition=gpu", "slurm.account=lab", "slurm.time=2-12"),
        *("slurm.signal_seconds=900", "slurm.setup=[module load cuda]", "slurm.extra=['--constraint=h800']"),
        *("out_dir=runs/big", "cluster.max_restarts=5", "accept=[small_tokenizer,repeated_corpus]"),
    )
    run = tmp_path / "runs" / "big"
    assert options_of(script) == [
        "--job-name=big",
        "--nodes=256",
        "--ntasks-per-node=1",
        "--cpus-per-task=64",
        "--time=2-12",
        "--signal=B:USR1@900",
        f"--output={run}/log/slurm-%j.log",
        "--open-mode=append",
        "--partition=gpu",
        "--account=lab",
        "--gpus-per-node=8",
        "--exclusive",
        "--mem=0",
        "--requeue",
        "--constraint=h800",
    ]
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in (f"run={run}", f"cd {tmp_path} || exit 2", "module load cuda", "    cluster=slurm", "    name=big"):
        assert line in lines
    assert f"    out_dir={run}" in lines
    assert "    resume=auto" in lines
    assert "--nproc-per-node 8 " in script
    assert "--max-restarts 5 " in script
    assert "-m launch.ranks.machine gpus=8 ranks=8 rank_bytes=" in script
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_script_of_every_kind_is_shell(capsys: pytest.CaptureFixture[str]) -> None:
    kinds: tuple[list[str], ...] = (
        [],
        ["cluster=laptop", "experiment=quickstart", "slurm.requeue=false", 'samples.prompt="it\'s $HOME"'],
        ["slurm.image=registry/torch:1", "slurm.gpus_per_node=0", "slurm.cpus_per_node=3"],
    )
    scripts = [rendered(capsys, *overrides) for overrides in kinds]
    for script in scripts:
        checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")
        assert "@{" not in script.partition("#SBATCH")[2]
    assert {"--nodes=8", "--cpus-per-task=1", "--no-requeue"} <= set(options_of(scripts[1]))
    assert "may_requeue=0" in scripts[1].splitlines()
    assert "-m launch.ranks.machine gpus=0 ranks=1 rank_bytes=" in scripts[1]
    assert "--container-image=registry/torch:1 --container-mounts=" in scripts[2]
    assert "PYTHON=python3" in scripts[2]
    assert "--cpus-per-task=3" in options_of(scripts[2])
    assert not [option for script in scripts[1:] for option in options_of(script) if "gpus" in option]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        ([], [
            "predicted: the largest rank needs 27.3 GB of 84.9 GB",
            r"predicted with rates=h800_trace of launch.plan, not measured on this cluster: [\d.]+ s a step, "
            r"0\.\d days and \d+ GPU-hours on 8 GPUs, without time in the queue",
        ]),
        (["slurm.time=2:00:00"], [
            "", "", r"slurm.time=2:00:00 is shorter: the job saves, is requeued and continues about \d+ times",
        ]),
        (["slurm.time=2:00:00", "slurm.requeue=false"], [
            "", "", r"warning: slurm.time=2:00:00 is shorter: the run stops with code 75 after about \d+ % "
            r"of its time; nearest: slurm.requeue=true, or slurm.time=1-00:00:00",
        ]),
        (["slurm.exclusive=false", "cluster=laptop"], [
            "", r"predicted: no days and GPU-hours: cluster.peak_flops: must be known for rates of another device.*",
        ]),
    ],
)  # fmt: skip
def test_submit_predicts_memory_days_and_gpu_hours_on_stderr(
    overrides: list[str], lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").touch()
    os.truncate(tmp_path / "a.txt", 4 * 10**9)  # sparse: a corpus large enough for 20 billion tokens
    assert main(["experiment=ladder_1b", f"data.paths=[{tmp_path}]", "dry_run=true", *overrides]) == 0
    script, said = capsys.readouterr()
    assert len(said.splitlines()) == len(lines), said
    for line, expected in zip(said.splitlines(), lines, strict=True):
        assert not expected or re.fullmatch(expected, line), line
    assert ("--exclusive" in options_of(script)) == ("slurm.exclusive=false" not in overrides)
    assert ("--max-restarts 3 " in script) == ("cluster=laptop" not in overrides)


@pytest.mark.parametrize(
    ("given", "cluster"),
    [
        (["experiment=ladder_1b", "slurm.partition=gpu"], "h100"),
        (["experiment=ladder_1b", "cluster=h800"], "h800"),
        (["experiment=two_nodes"], "slurm"),
        ([], "slurm"),
    ],
)
def test_job_keeps_the_cluster_of_a_recipe_for_gpus(given: list[str], cluster: str, tmp_path: Path) -> None:
    job = job_overrides(with_cluster([*given, "data.fim_rate=0"]), str(tmp_path))
    assert [text for text in job if text.startswith("cluster=")] == [f"cluster={cluster}"]


@pytest.mark.parametrize("chosen", [[], ["cluster=laptop"], ["experiment=two_nodes", "seed=3", "resume=auto"]])
def test_job_trains_what_was_checked(chosen: list[str], tmp_path: Path) -> None:
    given = [*chosen, f"out_dir={tmp_path}", "slurm.time=60", "dry_run=true", "samples.prompt='a, b'"]
    values = compose("submit", given)
    ours = {key: value for key, value in values.items() if key not in own_keys("submit")}
    job = job_overrides(given, str(tmp_path))
    assert compose("train", job) == {**ours, "resume": "auto"}
    command = ["bash", "-c", f"printf '%s\\n' {shlex.join(job)}"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.splitlines() == job


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("slurm.time=soon", ["slurm.time", "'soon'", "[days-]hours:minutes:seconds"]),
        ("slurm.time=0", ["slurm.time", "above 0", "'0'"]),
        ("slurm.time=infinite", ["slurm.time", "'infinite'"]),
        ("slurm.time=5", ["slurm.signal_seconds", "at most 299", "is 300"]),
        ("slurm.signal_seconds=0", ["slurm.signal_seconds", "above 0", "is 0"]),
        ("slurm.partiton=gpu", ["slurm.partiton: unknown key", "slurm.partition"]),
        ("slurm.partition='a b'", ["slurm.partition", "'a b'"]),
        ("slurm.gpus_per_node=-1", ["slurm.gpus_per_node", "0 or above", "is -1"]),
        (
            "parallelism=four_ranks cluster=h800 slurm.gpus_per_node=2",
            ["slurm.gpus_per_node", "at least 4", "is 2", "nearest valid: 4, or cluster.ranks_per_node=2"],
        ),
        ("slurm.cpus_per_node=0", ["slurm.cpus_per_node", "above 0", "is 0"]),
        ('slurm.extra=["--array=0-3"]', ["slurm.extra[0]", "must not be an array", "--array=0-3"]),
        ('slurm.extra=[--exclusive,"--nodes=3"]', ["slurm.extra[1]", "--nodes=3", "set by the script"]),
        ("slurm.extra=[exclusive]", ["slurm.extra[0]", "'exclusive'", "--exclusive"]),
        ("slurm.requeue=yes", ["slurm.requeue", "true or false"]),
        ("slurm.python='a b'", ["slurm.python", "'a b'"]),
        ("dry_run=1", ["dry_run", "true or false"]),
        ("resume=outputs/other", ["resume", "auto", "out_dir=outputs/other", "init_from=outputs/other"]),
        ("out_dir='a b'", ["out_dir", "a b'"]),
        ("parallelism.pipeline=3 schedule=dualpipe", ["parallelism.pipeline", "even"]),
    ],
)
def test_submit_rejects_in_one_line(override: str, parts: list[str]) -> None:
    given = [override] if "'" in override else override.split()
    assert_refused(user_errors(), parts, lambda: main(["dry_run=true", *given]))


def test_submit_without_slurm_is_rejected_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^slurm: sbatch must be on PATH, is not; dry_run=true"):
        main([f"out_dir={tmp_path / 'run'}"])
    assert list(tmp_path.iterdir()) == []


def test_submit_hands_the_script_in_the_folder_to_sbatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place_sbatch(tmp_path, monkeypatch, f'cp "$2" {tmp_path}/seen; echo "17;here"')
    run = tmp_path / "run"
    assert main([f"out_dir={run}", "experiment=quickstart"]) == 0
    said = capsys.readouterr().out
    assert said == f"submitted job 17: {run}/job.sbatch; it writes to {run}/log\n"
    assert (tmp_path / "seen").read_text() == (run / "job.sbatch").read_text()
    assert (run / "overrides.txt").read_text().splitlines() == [
        "cluster=slurm", "experiment=quickstart", f"out_dir={run}", "resume=auto"
    ]  # fmt: skip
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "job.sbatch", "log", "overrides.txt"]
    # The same command continues the run.
    assert main([f"out_dir={run}", "experiment=quickstart"]) == 0


def test_run_starts_only_after_its_verification_has_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place_sbatch(tmp_path, monkeypatch, f'echo "$@" >> {tmp_path}/calls; echo 17')
    run = tmp_path / "run"
    assert main([f"out_dir={run}", "experiment=quickstart", "verify=true"]) == 0
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"--parsable {run}-verify/job.sbatch",
        f"--parsable --dependency=afterok:17 --kill-on-invalid-dep=yes {run}/job.sbatch",
    ]
    before, after = ((folder / "job.sbatch").read_text() for folder in (Path(f"{run}-verify"), run))
    assert '-m launch.verify "$@"' in before
    assert "may_requeue=0" in before.splitlines()
    assert '-m launch.train "$@"' in after
    assert f"out_dir={run}-verify" in (Path(f"{run}-verify") / "overrides.txt").read_text()


def test_script_is_readable_by_its_user_alone_from_its_creation_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shell lines of `slurm.setup` export keys: no other file has them, and no file is readable for a moment."""
    place_sbatch(tmp_path, monkeypatch)
    run = tmp_path / "run"
    modes: list[int] = []
    plain = os.open

    def watched(path: object, flags: int, mode: int = 0o777, **more: Any) -> int:
        descriptor = plain(path, flags, mode, **more)  # type: ignore[arg-type]
        if "job.sbatch" in str(path) or "overrides.txt" in str(path):
            modes.append(os.fstat(descriptor).st_mode & 0o777)
        return descriptor

    monkeypatch.setattr(os, "open", watched)
    old = os.umask(0)
    try:
        for _ in range(2):
            assert main([f"out_dir={run}", "experiment=quickstart", 'slurm.setup=["export MY_KEY=abc0123456789"]']) == 0
    finally:
        os.umask(old)
    assert modes == [0o600] * 4
    assert [(run / name).stat().st_mode & 0o777 for name in ("job.sbatch", "overrides.txt")] == [0o600] * 2
    holding = [path.name for path in run.rglob("*") if path.is_file() and b"abc0123456789" in path.read_bytes()]
    assert holding == ["job.sbatch"]
    assert "abc0123456789" not in capsys.readouterr().out


def test_times_are_read_as_sbatch_reads_them() -> None:
    read = {"90": 5400, "1:30": 90, "1:02:03": 3723, "1-2": 93600, "1-2:03": 93780, "1-02:03:04": 93784}
    assert {time: seconds_of(time) for time in read} == read
    assert [seconds_of(time) for time in ("", "1-", "a", "1:2:3:4", "-5", "1.5", "UNLIMITED")] == [None] * 7


def test_rank_leaves_its_code_where_the_job_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "exit"
    first = {"RANK": "0", "TORCHELASTIC_RUN_ID": "x", "LAUNCH_EXIT_FILE": str(path)}
    assert export_exit_code(75, {**first, "RANK": "1"}) == 0
    assert list(tmp_path.iterdir()) == []
    assert export_exit_code(75, first) == 0
    assert path.read_text() == "75\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["exit"]
    assert export_exit_code(75, {name: value for name, value in first.items() if name != "LAUNCH_EXIT_FILE"}) == 75


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_script_passes_shellcheck(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(rendered(capsys, "experiment=quickstart"))
    # The node's part is a text on purpose: SC2016.
    assert SHELLCHECK is not None
    command = [SHELLCHECK, "--exclude=SC2016", "--severity=info", str(tmp_path / "job.sh")]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_submit_as_a_command_rejects_with_code_2(tmp_path: Path) -> None:
    done = run_command(["-m", "launch.submit", "slurm.time=never"], env={**os.environ, "HOME": str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: slurm.time: must be a time above 0")
    assert done.stderr.count("\n") == 1
