"""A run's folder, Ctrl-C at any moment, temporary folders of ended commands, and a rank's environment."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from multiprocessing import process
from pathlib import Path

import pytest

from base.refusal import ConfigError
from comm.exits import SIGNALS, handled_signals
from launch.config.folder import check_folder, read_folder, write_run_folder
from launch.ranks.local import remove_leftovers, scratch_folder
from launch.ranks.machine import environment_lines, rank_environment
from tests import ROOT
from tests.commands import run_python
from tests.launch.test_config import build
from tests.launch.test_local import members, wait_for
from tests.train.test_run_lock import dead_owner
from train.files.run_lock import Owner

NOW = datetime(2024, 2, 3, 4, 5, 6)


def test_folder_holds_the_configuration_that_was_claimed(tmp_path: Path) -> None:
    config = build("experiment=two_nodes", f"out_dir='{tmp_path}/a/b'")
    check_folder(config)
    assert list(tmp_path.iterdir()) == []
    claimed = write_run_folder(config, NOW)
    assert claimed.out_dir == f"{tmp_path}/a/b"
    assert read_folder(tmp_path / "a" / "b") == claimed


def test_folder_of_two_runs_in_one_second_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [write_run_folder(build("name=x"), NOW).out_dir for _ in range(3)]
    first = "outputs/x/2024-02-03_04-05-06"
    assert names == [first, f"{first}-2", f"{first}-3"]


def test_folder_rejects_a_file_and_a_folder_with_content(tmp_path: Path) -> None:
    config = build()
    (tmp_path / "run").mkdir()
    check_folder(replace(config, out_dir=f"{tmp_path}/run"))
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"^out_dir: must be new or empty.*resume="):
        check_folder(replace(config, out_dir=f"{tmp_path}/run"))
    with pytest.raises(ConfigError, match=r"^out_dir: must be a folder"):
        check_folder(replace(config, out_dir=f"{tmp_path}/run/metrics.jsonl"))


def test_folder_takes_the_run_that_is_resumed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    for resume in (checkpoint, tmp_path / "run"):
        check_folder(replace(build(), out_dir=f"{tmp_path}/run", resume=str(resume)))
    with pytest.raises(ConfigError):
        check_folder(replace(build(), out_dir=f"{tmp_path}/run", resume=str(tmp_path / "another")))


def test_folder_accepts_any_run_with_auto_resume(tmp_path: Path) -> None:
    config = replace(build(), out_dir=f"{tmp_path}/run", resume="auto")
    check_folder(config)
    (tmp_path / "run").mkdir()
    check_folder(config)
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"^out_dir: must be new, empty or a run's folder for resume=auto"):
        check_folder(config)
    write_run_folder(config, NOW)
    check_folder(config)
    assert read_folder(tmp_path / "run").resume == "auto"


def test_folder_that_cannot_be_written_is_rejected_and_keeps_what_it_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(build(), out_dir=f"{tmp_path}/run", resume="auto")
    held = write_run_folder(config, NOW)

    def fail(path: Path, text: str, encoding: str) -> int:
        path.write_bytes(text[:7].encode())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(ConfigError, match=r"^out_dir: '.*' must be a folder that can be written: .*No space left"):
            write_run_folder(replace(config, seed=5), NOW)
    assert read_folder(tmp_path / "run") == held
    # One that was left so before anything was in it is as good as empty.
    (tmp_path / "run" / "config.yaml").unlink()
    check_folder(replace(config, resume=None))


# A test run in the background of a shell inherits a Ctrl-C that is ignored.
RESTORE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
IGNORE = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    """Starts a command in its own session and waits until it imports the project."""
    process = subprocess.Popen(
        [sys.executable, "-v", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("import 'launch'"):
            break
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "delays"),
    [("train", (0.0, 0.2, 0.7)), ("generate", (0.1,)), ("submit", (0.4,))],
)
def test_interrupt_while_a_command_is_imported_is_one_line(
    name: str, delays: tuple[float, ...], tmp_path: Path
) -> None:
    for delay in delays:
        process = start(["-m", f"launch.{name}", f"out_dir={tmp_path / 'run'}", "no_such_key=1"], tmp_path)
        time.sleep(delay)
        if process.poll() is not None:
            continue  # refused already: a fast machine
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (2, 130), err
        # Among the lines of python -v, which are written by pieces.
        assert "Traceback" not in err, err
        assert err.count("interrupted\n") == (process.returncode == 130), err
        assert wait_for(lambda: not members(process.pid), 20), members(process.pid)  # noqa: B023
    assert not (tmp_path / "run").exists()


def test_interrupt_that_a_library_answers_with_its_own_error_is_one_line() -> None:
    script = "import os, signal, time\nfrom launch.cli.entry import command\nimport sys\n"
    script += "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, 'changed by an import'\n"
    script += "def main(arguments):\n    try:\n        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(5)\n"
    script += "    except KeyboardInterrupt as error:\n        raise ImportError('half a module') from error\n"
    script += "sys.exit(command('train', main))"
    done = run_python("-c", RESTORE + script)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_second_interrupt_at_once_leaves_the_cleaning_up_alone() -> None:
    script = "import os, signal, sys, time\nfrom launch.cli.entry import command\ndef main(arguments):\n    try:\n"
    script += "        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(5)\n    finally:\n"
    script += "        os.kill(os.getpid(), signal.SIGINT)\n        print('cleaned up')\n"
    script += "sys.exit(command('train', main))"
    done = run_python("-c", RESTORE + script)
    assert (done.returncode, done.stdout, done.stderr) == (130, "cleaned up\n", "interrupted\n")


def test_closed_terminal_is_a_request_unless_it_is_ignored_as_under_nohup() -> None:
    assert handled_signals() == SIGNALS
    assert signal.SIGHUP in SIGNALS
    code = "import signal; from comm.exits import Preemption; made = Preemption.of_process(); "
    code += "import os; os.kill(os.getpid(), signal.SIGHUP); print(made.is_requested)"
    for ignore, expected in ((False, "True\n"), (True, "False\n")):
        done = run_python("-c", (IGNORE if ignore else "") + code)
        assert done.stdout == expected, done.stderr


def place(folder: Path, name: str, text: str | None, prefix: str = "launch") -> Path:
    made = folder / f"{prefix}-{name}"
    (made / "below").mkdir(parents=True)
    if text is not None:
        (made / "owner.json").write_text(text)
    return made


def test_leftovers_of_dead_commands_alone_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious, dead = tmp_path / "precious", dead_owner()
    precious.mkdir()
    (precious / "file").touch()
    (precious / "owner.json").write_text(dead.to_text())
    left = place(tmp_path, "left", dead.to_text())
    (left / "below" / "link").symlink_to(precious)
    sockets = place(tmp_path, "left", dead.to_text(), "pymp")
    kept = [
        place(tmp_path, "alive", Owner.of_this_process().to_text(), "pymp"),
        place(tmp_path, "unknown", None, "pymp"),
        place(tmp_path, "alive", Owner.of_this_process().to_text()),
        place(tmp_path, "elsewhere", replace(dead, machine="another").to_text()),
        place(tmp_path, "unknown", None),
        place(tmp_path, "garbage", "garbage"),
    ]
    (tmp_path / "launch-link").symlink_to(precious)
    pipe = place(tmp_path, "pipe", None)
    os.mkfifo(pipe / "owner.json")
    (tmp_path / "other-left").mkdir()
    (tmp_path / "other-left" / "owner.json").write_text(dead.to_text())
    if os.geteuid() == 0:
        kept.append(place(tmp_path, "of-another", dead.to_text()))
        os.chown(kept[-1], 65534, 65534)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept.append(place(tmp_path, "of-this-process", None, "pymp"))
    monkeypatch.setitem(process.current_process()._config, "tempdir", str(kept[-1]))  # type: ignore[attr-defined]
    with scratch_folder() as scratch:
        assert (kept[-1] / "owner.json").exists()
        assert not left.exists()
        assert not sockets.exists()
        remove_leftovers(tmp_path)
        assert scratch.parent == tmp_path
        assert scratch.is_dir()
    assert not scratch.exists()
    assert all(folder.is_dir() for folder in (*kept, pipe, tmp_path / "other-left"))
    assert (tmp_path / "launch-link").is_symlink()
    assert (precious / "file").exists()
    remove_leftovers(tmp_path / "nowhere")


@pytest.mark.slow
def test_next_command_removes_all_folders_of_a_killed_one_with_local_ranks(tmp_path: Path) -> None:
    script = "import os, pathlib, time; from launch.ranks import local as local_ranks\n"
    script += "from launch.config.run import compose_run\n"
    script += "local_ranks.start_fork_server(compose_run([]).cluster, [])\n"
    script += "print(*pathlib.Path(os.environ['TMPDIR']).glob('*/owner.json'), flush=True)\n"
    script += "with local_ranks.scratch_folder():\n    print('inside', flush=True)\n    time.sleep(60)"
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        (owner,) = map(Path, command.stdout.readline().split())
        assert owner.parent.name.startswith("pymp-")
        assert command.stdout.readline() == "inside\n"
        remove_leftovers(tmp_path)  # of a command that is running nothing is removed
        assert owner.exists()
        assert len(list(tmp_path.iterdir())) == 2
        command.kill()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


# Starts threads that all hold memory at the same time, then prints glibc's information about its heaps.
_HEAPS = """
import ctypes, threading
from launch.config.run import compose_run
from launch.ranks.machine import apply_rank_environment

apply_rank_environment(compose_run([]).cluster)
libc, barrier = ctypes.CDLL(None), threading.Barrier(8)

def hold():
    kept = [bytearray(10_000) for _ in range(100)]
    barrier.wait()
    del kept

threads = [threading.Thread(target=hold) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


def test_environment_follows_threads_and_yields_to_the_user_in_the_rest() -> None:
    cluster = build().cluster
    set_by_user = {"OMP_NUM_THREADS": "64", "OMP_WAIT_POLICY": "ACTIVE", "HOME": "/"}
    chosen = rank_environment(cluster, set_by_user)
    assert chosen["OMP_NUM_THREADS"] == str(cluster.threads_per_rank)
    assert chosen["OMP_WAIT_POLICY"] == "ACTIVE"
    assert chosen["DS_ACCELERATOR"] == "cpu"
    assert "HOME" not in chosen
    assert rank_environment(cluster, {})["TORCH_FR_BUFFER_SIZE"] == "0"
    assert rank_environment(cluster, {"TORCH_FR_BUFFER_SIZE": "9"})["TORCH_FR_BUFFER_SIZE"] == "9"
    # NCCL has torch's own record.
    assert "TORCH_FR_BUFFER_SIZE" not in rank_environment(replace(cluster, device="cuda", backend="nccl"), {})


def test_environment_of_nccl_ranks_yields_to_the_user() -> None:
    cluster = replace(build().cluster, device="cuda", backend="nccl")
    chosen = rank_environment(cluster, {})
    line = "CUDA_DEVICE_MAX_CONNECTIONS=32, CUDA_MODULE_LOADING=EAGER, PYTORCH_ALLOC_CONF=expandable_segments:True"
    assert list(environment_lines(cluster, chosen)) == [f"environment: {line}"]
    by_user = {"CUDA_DEVICE_MAX_CONNECTIONS": "16", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    kept = {**by_user, **rank_environment(cluster, by_user)}
    assert kept["CUDA_DEVICE_MAX_CONNECTIONS"] == "16"
    assert "PYTORCH_ALLOC_CONF" not in kept
    assert "max_split_size_mb:64" in next(environment_lines(cluster, kept))
    gloo = rank_environment(replace(cluster, backend="gloo"), {})
    assert not gloo.keys() & {"CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_MODULE_LOADING"}
    assert list(environment_lines(build().cluster, chosen)) == []


# Allocates and frees 24 MiB in parts twice; prints the page faults of the second time.
_FAULTS = """
import resource, sys
from launch.config.run import compose_run
from launch.ranks.machine import apply_rank_environment

if sys.argv[1] == "set":
    apply_rank_environment(compose_run([]).cluster)

def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [bytearray(b"1") * 2**20 for _ in range(24)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fill(), fill()
print(fill())
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="pages are kept by glibc's allocator, which is Linux's"
)
def test_environment_keeps_the_pages_of_freed_tensors() -> None:
    def faults(mode: str) -> int:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        command = [sys.executable, "-c", _FAULTS, mode]
        return int(subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True, check=True).stdout)

    assert faults("unset") > 1000
    assert faults("set") < 100


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="heaps of threads are glibc's, which is Linux's")
@pytest.mark.parametrize(("by_user", "most"), [(None, 1), ("3", 3)])
def test_environment_gives_a_ranks_threads_one_heap_unless_the_user_chose(by_user: str | None, most: int) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    environment = inherited if by_user is None else inherited | {"MALLOC_ARENA_MAX": by_user}
    command = [sys.executable, "-c", _HEAPS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert done.count("<heap nr=") == most
