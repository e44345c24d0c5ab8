"""Makes folders of runs with what they measured, without running them."""

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from dualpipe.builder import build_schedule
from dualpipe.ir import Schedule
from launch.config.folder import write_run_folder
from train.config import TrainConfig
from train.predict.cut import run_cut
from train.predict.layer_times import LayerTimes, PartTimes
from train.predict.measured import MeasuredRun, MeasuredTimes, StepTimes, TimesScope, layer_parameters, try_to_write


def part(unit: float) -> PartTimes:
    return PartTimes(forward=unit, backward_input=1.5 * unit, backward_weight=0.5 * unit)


TIMES = LayerTimes(
    dense=part(0.010),
    moe=replace(part(0.012), forward_exchange=0.004, backward_exchange=0.005),
    embedding=part(0.001),
    head=part(0.006),
    mtp=part(0.02),
    latency_seconds=0.001,
)


def scope_of(config: TrainConfig) -> TimesScope:
    return TimesScope(
        precision=config.precision.kind,
        layer_parameters=layer_parameters(config.model),
        expert=config.parallelism.expert,
        tokens=config.batch.micro_sequences * config.batch.sequence_length_tokens,
        mtp_depth=config.model.mtp_depth,
        recomputed=config.computing.recomputed_names,
    )


def layers_of(config: TrainConfig, schedule: Schedule) -> tuple[int, ...]:
    return tuple(map(len, run_cut(config, schedule.placement)))


def write_times(
    folder: Path, config: TrainConfig, *, is_probe: bool, device: Literal["cpu", "cuda"] = "cpu", alone: float = 1.0
) -> None:
    """Writes `probe.json` or `measured.json`."""
    schedule = build_schedule(config.schedule.kind, config.parallelism.pipeline, config.num_micro_batches)
    record = MeasuredTimes(
        step=0 if is_probe else 7,
        device=device,
        cut=layers_of(config, schedule),
        scope=scope_of(config),
        measured=StepTimes(times=TIMES, alone=1.0 if is_probe else alone),
    )
    try_to_write(folder, MeasuredRun(measured=record, schedule=schedule))


def write_run(
    folder: Path, config: TrainConfig, seconds: list[float], device: Literal["cpu", "cuda"] = "cpu"
) -> TrainConfig:
    """Writes the folder of a run with these step times, of which half is computation and a fifth bubble."""
    config = write_run_folder(replace(config, out_dir=str(folder)), datetime.now())
    write_times(folder, config, is_probe=False, device=device)
    write_steps(folder, config, seconds)
    return config


def write_steps(folder: Path, config: TrainConfig, seconds: list[float]) -> None:
    lines = [
        {
            "step": number,
            "global_batch_sequences": config.batch.global_sequences,
            "step_seconds": step,
            "peak_memory_bytes": 10**9 + number,
            "step_time": {
                "compute_seconds": 0.5 * step,
                "exposed_exchange_seconds": 0.1 * step,
                "bubble_seconds": 0.2 * step,
                "optimizer_seconds": 0.2 * step,
            },
        }
        for number, step in enumerate(seconds, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
