"""Tests of evaluation on a pipeline: every layout gives the scores of one process."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comm.config import ParallelismConfig
from comm.dispatch.local import LocalDispatcher
from dualpipe.config import ScheduleConfig
from infer.evaluate.local import LocalModel
from infer.evaluate.protocol import TargetScores, TargetSequence
from model.config import ModelConfig
from model.transformer import Transformer, initialize_weights, named_tensors
from tests.ranks import run_ranks
from tests.tiny import MODEL, tiny_config
from tests.train.job import configured_schedule, make_world
from train.config import TrainConfig
from train.evaluation.pipelined import PipelinedModel
from train.network import ReplicaConfig
from train.replica import open_replica
from train.schedule.cut import run_cut


def sequences() -> list[TargetSequence]:
    """Returns sequences of many lengths, more than one pass holds."""
    chance = random.Random(7)
    found = []
    for _ in range(41):
        tokens = tuple(chance.randrange(MODEL.vocab_size) for _ in range(chance.randint(2, 40)))
        found.append(TargetSequence(tokens=tokens, num_targets=chance.randint(1, len(tokens) - 1)))
    return found


def fill(model: Transformer) -> None:
    """Sets weights that depend only on their names."""
    initialize_weights(model, 11)
    for name, tensor in named_tensors(model).items():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.linspace(0, 0.2, tensor.numel()))


def score(rank: int, world_size: int, folder: Path, layouts: list[ParallelismConfig]) -> list[list[TargetScores]]:
    """Returns the scores under each layout, with two sizes of batches."""
    found = []
    for layout in layouts:
        base, kind = tiny_config(folder), "dualpipe" if layout.pipeline > 1 else "1f1b"
        config: TrainConfig = replace(
            base,
            parallelism=layout,
            schedule=ScheduleConfig(kind=kind, chunks=None, pairing="sequential"),
        )
        schedule = configured_schedule(config)
        world = make_world(config, schedule)
        replica = open_replica(world, ReplicaConfig.of_run(config), schedule, run_cut(config, schedule.placement))
        fill(replica.network)
        for batch_size in (1, 3):
            model = PipelinedModel(replica, batch_size, lambda: pytest.fail("nothing is generated"))
            found.append(model.score(sequences()))
        replica.close()
        world.close()
    return found


def local_scores(model: ModelConfig) -> list[TargetScores]:
    """Returns the scores of one process."""
    whole = Transformer(replace(model, mtp_depth=0), LocalDispatcher(model.num_routed_experts), torch.float64)
    fill(whole)
    return LocalModel(whole, 5).score(sequences())


def layout(pipeline: int, data: int, expert: int, context: int = 1) -> ParallelismConfig:
    """Returns a mesh."""
    base = tiny_config(Path()).parallelism
    return replace(base, pipeline=pipeline, data=data, expert=expert, context=context)


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        pytest.param(4, [layout(2, 2, 2)], id="4", marks=pytest.mark.slow),
        pytest.param(4, [layout(2, 1, 1, 2), layout(1, 4, 2)], id="4 more", marks=pytest.mark.long),
    ],
)
def test_scores_are_those_of_one_process(world_size: int, layouts: list[ParallelismConfig], tmp_path: Path) -> None:
    expected = local_scores(tiny_config(tmp_path).model)
    for rank, results in enumerate(run_ranks(world_size, score, tmp_path, layouts)):
        for number, found in enumerate(results):
            for at, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
                assert mine.log_probs == pytest.approx(theirs.log_probs, abs=1e-9), (rank, number, at)
                assert mine.are_greedy == theirs.are_greedy, (rank, number, at)
