"""Many ranks equal one rank: losses, every gradient, norm, router bias and weights, step by step."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from comm.config import ParallelismConfig
from dualpipe.config import ScheduleConfig
from tests.ranks import run_ranks
from tests.tiny import OPTIM, tiny_config, write_text
from tests.train.job import Seen, run_job, run_plain
from train.config import PrecisionConfig, TrainConfig

STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("equality")
    write_text(folder)
    return folder


def layout_config(folder: Path, pipeline: int, data: int, expert: int) -> TrainConfig:
    return tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=pipeline, data=data, expert=expert),
        schedule=ScheduleConfig(kind="1f1b" if pipeline == 1 else "dualpipe", pairing="overlapped"),
    )


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((ours.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))


def assert_equal(ranks: list[Seen], plain: Seen, tolerance: float) -> None:
    for seen in ranks:
        assert seen.losses == pytest.approx(plain.losses, rel=tolerance)
        assert seen.norm == pytest.approx(plain.norm, rel=tolerance)
    names = set().union(*(seen.weights for seen in ranks))
    assert names == set(plain.weights)
    for name, expected in plain.gradients.items():
        total = sum(seen.gradients[name] for seen in ranks if name in seen.gradients)
        assert isinstance(total, torch.Tensor)
        assert relative_error(total, expected) <= tolerance, f"gradient of {name}"
    for seen in ranks:
        for name, weight in seen.weights.items():
            assert relative_error(weight, plain.weights[name]) <= tolerance, f"weight {name}"


@pytest.mark.parametrize(
    ("pipeline", "data", "expert"),
    [
        (1, 2, 2),
        (2, 2, 2),
        pytest.param(2, 1, 1, marks=pytest.mark.slow),
        pytest.param(4, 1, 1, marks=pytest.mark.slow),
        pytest.param(2, 4, 2, marks=pytest.mark.slow),
        pytest.param(4, 2, 2, marks=pytest.mark.slow),
        pytest.param(2, 4, 4, marks=pytest.mark.slow),
    ],
)
def test_many_ranks_equal_one_rank(folder: Path, pipeline: int, data: int, expert: int) -> None:
    config = layout_config(folder, pipeline, data, expert)
    sequential = replace(config, schedule=replace(config.schedule, pairing="sequential"))
    # Without tokens: no expert; one expert; every expert of the first rank of an expert group.
    starved = [0, 1, min(4, config.model.num_routed_experts // expert)]
    jobs = [(config, number) for number in starved] + [(sequential, starved[-1])]
    results = run_ranks(pipeline * data, run_job, jobs, STEPS)
    for index, number in enumerate(starved):
        plain = run_plain(config, number, STEPS)
        for step in range(STEPS):
            assert_equal([rank[index][step] for rank in results], plain[step], 1e-10)
    for rank in results:
        for overlapped, plain_order in zip(rank[len(starved) - 1], rank[-1], strict=True):
            assert overlapped.losses == plain_order.losses
            assert overlapped.norm == plain_order.norm
            for name, weight in overlapped.weights.items():
                assert torch.equal(weight, plain_order.weights[name]), name
            for name, gradient in overlapped.gradients.items():
                assert torch.equal(gradient, plain_order.gradients[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "pipeline", "depth"), [("1f1b", 2, 0), ("1f1b", 4, 0), ("dualpipe", 2, 0), ("dualpipe", 2, 2)]
)
def test_other_depths_and_single_direction_equal_one_rank(
    folder: Path, kind: Literal["1f1b", "dualpipe"], pipeline: int, depth: int
) -> None:
    config = layout_config(folder, pipeline, 1, 1)
    model = replace(config.model, mtp_depth=depth, mtp_hidden="pre_norm", q_lora_rank=None, num_shared_experts=0)
    config = replace(config, schedule=replace(config.schedule, kind=kind), model=model)
    results = run_ranks(pipeline, run_job, [(config, 0)], STEPS)
    plain = run_plain(config, 0, STEPS)
    for step in range(STEPS):
        assert_equal([rank[0][step] for rank in results], plain[step], 1e-10)


@pytest.mark.parametrize(
    ("pipeline", "data", "expert"),
    [
        (1, 1, 1),
        pytest.param(2, 2, 2, marks=pytest.mark.slow),
        pytest.param(2, 4, 2, marks=pytest.mark.slow),
    ],
)
def test_zero1_in_float32_equals_one_rank(folder: Path, pipeline: int, data: int, expert: int) -> None:
    config = replace(
        layout_config(folder, pipeline, data, expert),
        precision=PrecisionConfig(kind="float32"),
        optim=replace(OPTIM, sharding="zero1", eps=1e-3),
    )
    # The second bucket holds less than the largest weight, so that it is filled again and again.
    small = replace(config, optim=replace(config.optim, bucket_elements=3000))
    results = run_ranks(pipeline * data, run_job, [(config, 1), (small, 1)], STEPS)
    plain = run_plain(replace(config, optim=replace(config.optim, sharding="replicated")), 1, STEPS)
    for index in range(2):
        for step in range(STEPS):
            assert_equal([rank[index][step] for rank in results], plain[step], 1e-5)
