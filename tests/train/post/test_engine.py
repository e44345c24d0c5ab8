"""Sampler and trainer agree on log-probabilities in every precision, with both engines, under several layouts."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import distributed as dist

from comm.config import ParallelismConfig
from dualpipe.registry import ScheduleConfig
from infer.config import Sampling
from infer.protocol import NumberedPrompt, Request, TargetSequence
from tests.model.fp8_models import CONFIDENT, scale_like_trained
from tests.ranks import run_ranks
from tests.tiny import BATCH, tiny_config
from tests.train.job import opened_replica
from train.config import Fp8PrecisionConfig, Precision, PrecisionConfig, TrainConfig
from train.core.replica import Replica
from train.listeners.evaluation import PipelinedModel
from train.post.pipeline import GatheredEngine, ReplicaEngine, ReplicaPipeline

pytestmark = pytest.mark.long

Payload = Literal["full", "fp8"]
PRECISIONS: dict[str, tuple[Precision, Payload, float]] = {
    "float32": (PrecisionConfig(kind="float32"), "full", 1e-5),
    "bf16": (PrecisionConfig(kind="bf16"), "full", 2e-2),
    "fp8": (Fp8PrecisionConfig(kind="fp8", scales="float32"), "full", 5e-3),
    "fp8, powers of two": (Fp8PrecisionConfig(kind="fp8", scales="power_of_two"), "fp8", 5e-3),
}
"""Precisions of the recipes, payload of the exchange, and the largest mean difference: the law is 2e-2 nats."""
LAYOUTS = {"pipeline": (2, 1, 1), "data and experts": (1, 2, 2)}
PROMPTS = [
    NumberedPrompt(number=number, tokens=tuple((7 * number + 3 * at * at + 1) % 64 for at in range(2 + number)))
    for number in range(12)
]
REQUEST = Request(samples=4, max_new_tokens=22, sampling=Sampling(temperature=1.0, seed=3))
FAR = 0.1
"""Mean difference of an answer from which V3.2's loss drops it (`conf/task/loss/v3_2.yaml`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Of one engine: tokens, mean difference of log-probabilities, mean entropy, and share of answers beyond `FAR`."""

    num_tokens: int
    difference: float
    entropy: float
    far_share: float


def measure(rank: int, world_size: int, config: TrainConfig) -> list[Agreement]:
    with opened_replica(config) as replica:
        return compare_engines(replica)


def compare_engines(replica: Replica) -> list[Agreement]:
    scale_like_trained(replica.model)
    pipeline = ReplicaPipeline(replica)
    trainer, engines, found = PipelinedModel(replica, 16, lambda: pipeline), [], []
    for engine in (ReplicaEngine(replica), GatheredEngine(replica)):
        engines.append(engine)
        rollouts = engine.generate(PROMPTS, REQUEST).rollouts
        prompts = {prompt.number: prompt.tokens for prompt in PROMPTS}
        scores = trainer.score(
            [
                TargetSequence(tokens=(*prompts[each.prompt], *each.tokens), num_targets=len(each.tokens))
                for each in rollouts
            ]
        )
        sampled = [torch.tensor(each.log_probs, dtype=torch.float64) for each in rollouts]
        apart = [ours - torch.tensor(each.log_probs) for ours, each in zip(sampled, scores, strict=True)]
        found.append(
            Agreement(
                num_tokens=len(torch.cat(apart)),
                difference=float(torch.cat(apart).abs().mean()),
                entropy=-float(torch.cat(sampled).mean()),
                far_share=sum(float(each.mean()) > FAR for each in apart) / len(apart),
            )
        )
    dist.barrier()
    for engine in engines:
        engine.close()
    pipeline.close()
    return found


@pytest.mark.parametrize(
    ("precision", "layout"),
    [
        # Every precision once, with each layout twice.
        pytest.param(precision, layout, marks=() if (row + column) % 2 else pytest.mark.exhaustive)
        for row, precision in enumerate(PRECISIONS)
        for column, layout in enumerate(LAYOUTS)
    ],
)
def test_log_probs_of_sampler_and_trainer_agree(precision: str, layout: str, tmp_path: Path) -> None:
    """V3.2's mask, which drops bad answers that are too far off the policy, would drop no fresh ones."""
    kind, payload, largest = PRECISIONS[precision]
    pipeline, data, expert = LAYOUTS[layout]
    config = tiny_config(
        tmp_path,
        parallelism=ParallelismConfig(pipeline=pipeline, data=data, expert=expert),
        schedule=ScheduleConfig(kind="1f1b" if pipeline == 1 else "dualpipe", chunks=None, pairing="overlapped"),
        precision=kind,
        model=replace(CONFIDENT, num_layers=4, max_position_tokens=48),
        batch=replace(BATCH, sequence_length_tokens=48, global_sequences=8),
    )
    config = replace(config, dispatch=replace(config.dispatch, payload=payload))
    for rank, found in enumerate(run_ranks(2, measure, config, timeout_seconds=600)):
        for engine, seen in zip(("pipelined", "local"), found, strict=True):
            assert seen.num_tokens >= 1000, (engine, rank, seen)
            assert 1.0 < seen.entropy < 4.0, (engine, rank, seen)
            assert seen.difference <= largest, (engine, rank, seen)
            assert seen.far_share <= 0.01, (engine, rank, seen)
