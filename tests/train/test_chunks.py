"""The number of chunks that is not configured is the fastest in simulation."""

from dataclasses import replace
from pathlib import Path

from comm.config import ParallelismConfig
from dualpipe.build import build
from dualpipe.simulate.simulate import simulate
from tests.tiny import tiny_config
from train.config import TrainConfig
from train.schedule.chunks import with_chunks
from train.schedule.nominal import nominal_costs


def make_config(folder: Path, kind: str, num_layers: int, chunks: int | None = None) -> TrainConfig:
    mesh = replace(tiny_config(folder).parallelism, pipeline=4, data=2, expert=2)
    assert isinstance(mesh, ParallelismConfig)
    config = tiny_config(folder, parallelism=mesh)
    batch = replace(config.batch, global_sequences=2 * 8 * config.batch.micro_sequences)
    model = replace(config.model, num_layers=num_layers)
    schedule = replace(config.schedule, kind=kind, chunks=chunks, pairing="overlapped")
    return replace(config, model=model, batch=batch, schedule=schedule)


def test_chunks_are_those_of_the_fastest_schedule(tmp_path: Path) -> None:
    config = make_config(tmp_path, "dualpipe_interleaved", 16)
    chosen = with_chunks(config).schedule.chunks
    makespans = {}
    for chunks in (1, 2, 3, 4):
        costs = nominal_costs(replace(config, schedule=replace(config.schedule, chunks=chunks)), config.schedule.kind)
        makespans[chunks] = simulate(build(config.schedule.kind, 4, config.num_micro_batches, costs), costs).makespan
    assert chosen is not None
    assert makespans[chosen] <= min(makespans.values()) * 1.04
    assert makespans[chosen] < makespans[1]


def test_chunks_that_are_configured_or_determined_stay(tmp_path: Path) -> None:
    for kind, layers, chunks in (("dualpipe_interleaved", 16, 3), ("auto", 16, None), ("zb_v", 16, None)):
        config = make_config(tmp_path, kind, layers, chunks)
        assert with_chunks(config) == config
    few = make_config(tmp_path, "dualpipe_interleaved", 7)
    assert with_chunks(few) == few, "4 ranks with 7 layers have no second chunk"
