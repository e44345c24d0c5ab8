"""Looking into steps: the files of those that were chosen, and nothing at all in any other."""

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_config
from train.config import ProfileConfig, TrainConfig
from train.records.profile import StepProfiler, profile_notice

CPU = torch.device("cpu")


def _config(folder: Path, **changes: object) -> TrainConfig:
    chosen = ProfileConfig(steps=(2, 4), ranks=(0, 3), trace=True, memory_snapshot=True)
    config = tiny_config(folder, profile=replace(chosen, **changes))  # type: ignore[arg-type]
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    return config


def test_profile_writes_a_trace_of_each_chosen_step_of_each_chosen_rank(tmp_path: Path) -> None:
    config = _config(tmp_path)
    for rank in range(4):
        profiler = StepProfiler(config.profile, Path(config.out_dir), rank, CPU)
        for done in range(1, 6):
            with profiler.step(done):
                (torch.ones(31, 17) @ torch.ones(17, 7)).sum()
    written = sorted(path.name for path in (Path(config.out_dir) / "profile").iterdir())
    assert written == [f"step-0000000{step}_rank-0000{rank}.trace.json.gz" for step in (2, 4) for rank in (0, 3)]
    with gzip.open(profiler.path(4, "trace.json.gz")) as file:
        events = json.load(file)["traceEvents"]
    product = next(event for event in events if event.get("name") == "aten::mm")
    assert product["args"]["Input Dims"][:2] == [[31, 17], [17, 7]]


@pytest.mark.parametrize("changes", [{"steps": ()}, {"trace": False}, {"ranks": ()}])
def test_profile_of_nothing_writes_nothing(tmp_path: Path, changes: dict[str, object]) -> None:
    config = _config(tmp_path, **changes)
    profiler = StepProfiler(config.profile, Path(config.out_dir), 0, CPU)
    for done in range(1, 6):
        with profiler.step(done):
            pass
    assert not list(Path(config.out_dir).glob("profile/*"))


def test_profile_does_not_hide_an_error_of_the_step(tmp_path: Path) -> None:
    config = _config(tmp_path)
    profiler = StepProfiler(config.profile, Path(config.out_dir), 0, CPU)
    with pytest.raises(ArithmeticError), profiler.step(2):
        raise ArithmeticError
    with profiler.step(4):
        pass
    assert profiler.path(4, "trace.json.gz").is_file()
    assert not profiler.path(2, "trace.json.gz").exists()


def test_profile_prints_what_is_recorded_and_what_a_cpu_cannot(tmp_path: Path) -> None:
    config = _config(tmp_path)
    cuda = replace(config, cluster=replace(config.cluster, device="cuda"))
    assert profile_notice(config) == (
        "profile: traces of steps 2, 4 on ranks 0, 3 in profile/; "
        "memory snapshots need cluster.device=cuda, and are not written on the CPU"
    )
    assert profile_notice(cuda) == "profile: traces and memory snapshots of steps 2, 4 on ranks 0, 3 in profile/"
    assert profile_notice(_config(tmp_path, steps=())) == ""


def test_profile_that_is_off_imports_nothing() -> None:
    """Checks for the module of event tables, because torch itself imports `torch.profiler`."""
    code = (
        "import sys, torch; before = set(sys.modules); import train.records.profile; "
        "print([name for name in set(sys.modules) - before if 'profiler' in name])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "[]\n", done.stderr


def test_profile_on_cuda_records_memory_only_during_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, calls = _config(tmp_path, trace=False), []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: calls.append(how))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", calls.append)
    profiler = StepProfiler(config.profile, Path(config.out_dir), 3, torch.device("cuda"))
    for done in (1, 2, 3):
        with profiler.step(done):
            calls.append(done)
    begun, ended = {"max_entries": 1_000_000}, {"enabled": None}
    snapshot = str(Path(config.out_dir) / "profile" / "step-00000002_rank-00003.memory.pickle")
    assert calls == [1, begun, 2, snapshot, ended, 3]
