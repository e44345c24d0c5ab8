"""What a run reports about its time: bubbles, profiles and the metrics of a step."""

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from xml.etree import ElementTree

import pytest
import torch
from torch import distributed as dist

from comm.config import ParallelismConfig
from dualpipe.builder import build_schedule
from dualpipe.draw.svg import measured_cells
from dualpipe.ir import Schedule
from dualpipe.registry import ScheduleConfig
from dualpipe.runtime.measured import LaneSpan, Measured, RankBusyTime, measured_bubble, rank_spans
from launch.config.folder import read_folder
from launch.config.run import compose_run
from tests.covering import exhaustive
from tests.dualpipe.clockwork import measured_run
from tests.ranks import run_ranks
from tests.tiny import MODEL, tiny_config, write_text
from tests.train.job import close_job, open_job, open_loader
from tests.train.test_command import read_metrics, run_train
from train.config import ProfileConfig, TrainConfig
from train.core.learner import Learner
from train.core.step import StepResult, train_step
from train.predict.measured import MEASURED_NAME, read_measured, stage_phases
from train.records.step_record import (
    PAGE_NAME,
    SVG_NAME,
    TRACE_NAME,
    PipelineTimeline,
    StepProfiler,
    bubble_of,
    mfu,
    profile_notice,
    window_slots,
    write_pictures,
)
from train.records.trackers import Wandb
from train.report.plan_comparison import compared_run

SVG = "{http://www.w3.org/2000/svg}"

PICTURES = {SVG_NAME, TRACE_NAME, PAGE_NAME}

FILES = {*PICTURES, MEASURED_NAME}


def operations_of(schedule: Schedule) -> list[str]:
    return sorted(str(op) for groups in schedule.ranks for group in groups for op in group)


def shapes_of(text: str) -> list[str]:
    """The operations drawn in an SVG, plan and run together."""
    titles = [rect.findtext(f"{SVG}title") for rect in ElementTree.fromstring(text).iter(f"{SVG}rect")]
    return sorted(title.split(":")[0] for title in titles if title is not None)


def lanes_of(text: str) -> set[str]:
    events = json.loads(text)["traceEvents"]
    return {event["args"]["name"] for event in events if event["name"] == "thread_name"}


def config_of(folder: Path, kind: str, parallelism: ParallelismConfig, pairing: str) -> TrainConfig:
    (folder / "run").mkdir()
    write_text(folder)
    return tiny_config(
        folder,
        parallelism=parallelism,
        model=replace(MODEL, mtp_depth=0) if kind == "1f1b" else MODEL,
        schedule=ScheduleConfig(kind=kind, chunks=None, pairing=pairing),  # type: ignore[arg-type]
    )


def _spans(learner: Learner, result: StepResult) -> tuple[LaneSpan, ...]:
    groups = learner.replica.schedule.ranks[learner.world.pipeline_index]
    return rank_spans(groups, learner.replica.train_program, result.execution.spans, result.execution.origin_seconds)


def _watch(rank: int, world_size: int, config: TrainConfig) -> tuple[float, bool, tuple[LaneSpan, ...]]:
    """The bubble as the ranks reduce it, whether this rank drew, and its spans."""
    learner, loader = open_job(config), open_loader(config)
    watch = PipelineTimeline(learner.world, config.name, Path(config.out_dir))
    result = train_step(learner, config.task, loader, 0)
    use = watch.use(learner.replica, result.execution)
    slots = window_slots(use, learner.world.data_index, config.parallelism.data)
    used, largest = torch.tensor([use.busy_seconds], dtype=torch.float64), torch.tensor(slots, dtype=torch.float64)
    dist.all_reduce(used)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    bubble = bubble_of(float(used), largest.tolist(), config.parallelism.pipeline)
    drawn = watch.draw(learner.replica, result.execution, 1)
    for number, stage in learner.replica.stages.items():
        named = stage_phases(config.model, learner.replica.cut, number)
        assert stage.lanes == tuple("comm" if name in ("dispatch", "combine") else "compute" for _, name in named)
    dist.barrier()
    close_job(learner)
    return bubble, drawn, _spans(learner, result)


def check_measured(folder: Path, config: TrainConfig, run: Measured, schedule: Schedule) -> None:
    """The written times are those of the spans, and together they are the time that the ranks computed."""
    found = read_measured(folder / MEASURED_NAME)
    assert found is not None
    assert found.schedule == schedule
    assert found.measured.scope.tokens == config.batch.sequence_length_tokens * config.batch.micro_sequences
    times = found.measured.measured
    phases = times.phases
    spans = [span for spans in run.ranks for span in spans if span.lane in ("compute", "comm") and span.phase >= 0]
    assert sum(phase.count for phase in phases) == len(spans)
    assert {phase.part for phase in phases} >= {"dense", "moe", "embedding", "head"}
    of_layers = [getattr(times.times, part) for part in ("dense", "moe", "embedding", "head", "mtp")]
    numbers = {part.forward for part in of_layers} | {part.backward_weight for part in of_layers}
    assert 0 < max(numbers) <= max(span.seconds for span in spans) * 8 / times.alone
    if config.schedule.pairing == "sequential":
        assert times.alone == 1.0
        assert all(phase.overlapped_seconds is None for phase in phases)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mesh", "pairing"),
    [
        ("dualpipe_split", (2, 2, 2), "overlapped"),
        ("dualpipe_split", (2, 1, 1), "sequential"),
        *exhaustive(("1f1b", (3, 1, 1), "overlapped"), ("zb_v", (2, 1, 1), "overlapped")),
    ],
)
def test_step_draws_every_operation_and_reduces_the_bubble_of_its_spans(
    tmp_path: Path, kind: str, mesh: tuple[int, int, int], pairing: str
) -> None:
    pipeline, data, expert = mesh
    config = config_of(tmp_path, kind, ParallelismConfig(pipeline=pipeline, data=data, expert=expert), pairing)
    ranks = run_ranks(pipeline * data, _watch, config)
    assert [drawn for _, drawn, _ in ranks] == [True] + [False] * (pipeline * data - 1)
    runs = [Measured(ranks=tuple(spans for _, _, spans in ranks[place::data])) for place in range(data)]
    makespans = [run.makespan_seconds for run in runs]
    idle = sum(measured_bubble(run) * makespan for run, makespan in zip(runs, makespans, strict=True))
    assert {bubble for bubble, _, _ in ranks} == {ranks[0][0]}
    # The wall clock's seconds have a resolution of a quarter of a microsecond.
    assert ranks[0][0] == pytest.approx(idle / sum(makespans), abs=1e-5)
    assert 0 <= ranks[0][0] < 1
    schedule = build_schedule(kind, pipeline, config.num_micro_batches)
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    check_measured(tmp_path / "run", config, runs[0], schedule)
    twice = sorted(2 * operations_of(schedule))
    assert shapes_of((tmp_path / "run" / SVG_NAME).read_text()) == twice
    page = (tmp_path / "run" / PAGE_NAME).read_text()
    assert page.count("(this run)") == 1
    own = next(figure for figure in page.split("<figure")[1:] if "hidden" not in figure.split(">")[0])
    assert own.count("<title>") == len(twice)
    assert page.count("hidden>") >= 1  # pictures of the other schedules
    assert "measured compute" in lanes_of((tmp_path / "run" / TRACE_NAME).read_text())


@pytest.mark.parametrize("kind", ["dualpipe_split", "1f1b"])
def test_pictures_show_a_cell_per_group_and_replace_earlier_ones(tmp_path: Path, kind: str) -> None:
    schedule = build_schedule(kind, 3, 5)
    for name in PICTURES:
        (tmp_path / name).write_text("of an earlier step")
    run = measured_run(schedule)
    shown = write_pictures(tmp_path, "step <7>", schedule, run)
    cells, _ = measured_cells(schedule, run)
    assert len(cells) == sum(map(len, schedule.ranks))
    assert {path.name for path in tmp_path.iterdir()} == PICTURES
    assert shapes_of((tmp_path / SVG_NAME).read_text()) == sorted(2 * operations_of(schedule))
    assert "step &lt;7&gt;" in (tmp_path / PAGE_NAME).read_text()
    assert shown.measured == run
    assert shown.simulation.makespan > 0
    assert 0 <= shown.simulation.bubble_fraction < 1
    events: list[dict[str, Any]] = json.loads((tmp_path / TRACE_NAME).read_text())["traceEvents"]
    planned = [event for event in events if event.get("cat") == "planned" and event["ph"] == "X"]
    end = max(event["ts"] + event["dur"] for event in planned)
    assert end == pytest.approx(1e6 * shown.simulation.makespan, abs=0.01)


def test_bubble_counts_each_pipelines_own_time() -> None:
    # Two pipelines of two ranks: 10 s and 4 s long, begun at different times; 22 of their 28 rank seconds are used.
    uses = [(10.0, 100.0, 110.0), (6.0, 101.0, 107.0), (4.0, 50.0, 54.0), (2.0, 52.0, 54.0)]
    slots = [
        window_slots(
            RankBusyTime(busy_seconds=used, exposed_seconds=0.0, start_seconds=start, end_seconds=end), place // 2, 2
        )
        for place, (used, start, end) in enumerate(uses)
    ]
    largest = [max(column) for column in zip(*slots, strict=True)]
    assert bubble_of(sum(used for used, _, _ in uses), largest, 2) == pytest.approx(6 / 28)
    assert bubble_of(0.0, [0.0, 0.0], 2) == 0.0


@pytest.mark.slow
def test_run_draws_when_due_and_writes_the_bubble_of_every_step(tmp_path: Path) -> None:
    write_text(tmp_path)
    choices = ("parallelism=two_ranks", "batch.global_sequences=4", "task.steps=5", "samples.prompt=")
    done = run_train(tmp_path, "drawn", *choices, "track.picture_every_steps=2")
    assert done.returncode == 0, done.stderr
    drawn = [line.split()[1] for line in done.stdout.splitlines() if "planned and measured time" in line]
    assert drawn == ["2", "4", "5"]
    run = tmp_path / "drawn"
    assert {path.name for path in run.iterdir()} >= FILES
    assert not list(run.glob("*.partial"))
    assert "drawn, step 5: dualpipe_split, 2 ranks, 4 micro-batches" in (run / SVG_NAME).read_text()
    assert shapes_of((run / SVG_NAME).read_text()) == sorted(2 * operations_of(build_schedule("dualpipe_split", 2, 4)))
    bubbles = [line["pipeline_bubble"] for line in read_metrics(tmp_path, "drawn")]
    assert len(bubbles) == 5
    assert all(0 < bubble < 1 for bubble in bubbles)
    assert done.stdout.count("bubble ") == 5
    comparison = compared_run(read_folder(run), run)
    assert comparison.num_steps == 4
    # The run's own times explain most of its steps, also on a busy machine.
    assert 0.5 < comparison.factor < 2
    assert "Predicted and measured</h2>" in (run / "report.html").read_text()


CPU = torch.device("cpu")


def _config(folder: Path, **changes: Any) -> TrainConfig:
    chosen = ProfileConfig(steps=(2, 4), ranks=(0, 3), trace=True, memory_snapshot=True)
    config = tiny_config(folder, profile=replace(chosen, **changes))
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


def test_mfu_of_deepseek_v3_is_what_its_report_implies() -> None:
    """2.788M H800 hours, 2,664K of them for 14.8T tokens: 1,543 tokens a second and GPU (section 1)."""
    choices = ["model=v3_671b", "parallelism=v3_2048_ranks", "cluster=h800", "batch.sequence_length_tokens=4096"]
    config = compose_run(choices)
    tokens_per_second = 14.8e12 / (2664e3 * 3600) * 2048
    assert config.cluster.peak_flops is not None
    peak = config.cluster.peak_flops * config.parallelism.world_size
    assert mfu(config.model, 4096, tokens_per_second, peak) == {"mfu": pytest.approx(0.39, abs=0.003)}


def test_mfu_is_left_out_if_the_peak_is_unknown() -> None:
    assert mfu(MODEL, 24, 1000.0, None) == {}
    assert mfu(MODEL, 24, 2000.0, 1e9)["mfu"] == 2 * mfu(MODEL, 24, 1000.0, 1e9)["mfu"] > 0


def test_wandb_receives_the_same_record_offline_and_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, list[tuple[dict[str, Any], int]]] = {}

    def init(*, mode: str, **_: Any) -> object:
        def log(values: dict[str, Any], step: int) -> None:
            logged.setdefault(mode, []).append((values, step))

        return SimpleNamespace(config=SimpleNamespace(update=lambda *_, **__: None), log=log, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=lambda **_: None))
    records = [{"step": step, "loss": 1.5 / step, "router": {"layer_1": {"bias_most": 0.1}}} for step in (1, 2)]
    modes: tuple[Literal["offline", "online"], ...] = ("offline", "online")
    for mode in modes:
        run = Wandb(replace(tiny_config(tmp_path).track, wandb=mode), "tiny", tmp_path, {})
        for record in records:
            run.record(record)
        run.close()
    router = {"router/bias_most_mean": 0.1, "router/bias_most_max": 0.1}
    expected = [({"loss/loss": 1.5 / step, **router}, step) for step in (1, 2)]
    assert logged == {"offline": expected, "online": expected}
