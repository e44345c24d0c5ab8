"""The task of docs/extend.md, a file outside the checkout: weighted cross-entropy, on many ranks and by autograd."""

import re
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from comm.config import ParallelismConfig
from comm.dispatch.local import LocalDispatcher
from dualpipe.config import ScheduleConfig
from kernels.registry import load_plugins
from model.transformer import Transformer, initialise
from tests.ranks import run_ranks
from tests.tiny import tiny_config, write_text
from tests.train.job import Job, Seen, by_released_name, open_loader, run_jobs, run_plain, start_biases
from tests.train.test_equality import assert_equal, relative_error
from train.config import TrainConfig
from train.config.decode import decode

ROOT = Path(__file__).resolve().parents[3]
STEPS = 2
WEIGHT = 3.5
MTP_WEIGHT = 0.3


def blocks(language: str, holds: str) -> str:
    """The block of docs/extend.md in a language that holds some text."""
    page = (ROOT / "docs" / "extend.md").read_text("utf-8")
    return next(block for block in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL) if holds in block)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the page shows, and its YAML next to it."""
    folder = tmp_path_factory.mktemp("weighted")
    (folder / "conf/task").mkdir(parents=True)
    (folder / "conf/task/weighted.yaml").write_text(blocks("yaml", "kind: weighted"), "utf-8")
    (folder / "weighted.py").write_text(blocks("python", "WeightedConfig"), "utf-8")
    return folder / "weighted.py"


def with_task(config: TrainConfig, plugin: Path) -> TrainConfig:
    """The run under the plugin's task, decoded as a command decodes it."""
    load_plugins([plugin])
    values = {
        "kind": "weighted",
        "steps": 2,
        "mtp_loss_weight": MTP_WEIGHT,
        "balance_loss_weight": 0.0,
        "bias_update_rate": 0.05,
        "even_token_weight": WEIGHT,
    }
    return replace(config, task=decode(get_type_hints(TrainConfig, include_extras=True)["task"], values, "task"))


def run_weighted(rank: int, world_size: int, config: TrainConfig, plugin: Path) -> list[Seen]:
    """What this rank saw of each step. The plugin's dataclass is made here, as a rank of a run makes it."""
    return run_jobs(rank, world_size, [Job(config=with_task(config, plugin))], STEPS)[0]


def plain_autograd(config: TrainConfig) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of every depth of the first step and gradients of their sum, by formula from whole logits."""
    model = Transformer(config.model, LocalDispatcher(config.model.num_routed_experts), torch.float64)
    initialise(model, config.seed)
    start_biases(model, 0)
    batch = open_loader(config).batch(0, 0, config.batch.global_sequences)
    losses = []
    for depth, logits_BTV in enumerate((model(batch.tokens_BT), *model.mtp_logits(batch.tokens_BT))):
        targets_BT = batch.targets(depth + 1)[:, : logits_BTV.shape[1]]
        nats_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none", ignore_index=-100)
        weights_BT = torch.where(targets_BT % 2 == 0, WEIGHT, 1.0) * (targets_BT >= 0)
        losses.append((weights_BT * nats_BT).sum() / weights_BT.sum())
    (losses[0] + MTP_WEIGHT * torch.stack(losses[1:]).mean()).backward()
    return [float(loss.detach()) for loss in losses], by_released_name(model, lambda parameter: parameter.grad)


@pytest.mark.slow
def test_weighted_cross_entropy_on_many_ranks_equals_one_rank_and_autograd(tmp_path: Path, plugin: Path) -> None:
    write_text(tmp_path)
    config = tiny_config(
        tmp_path,
        parallelism=ParallelismConfig(pipeline=2, data=2, expert=2),
        schedule=ScheduleConfig(kind="dualpipe", pairing="overlapped"),
    )
    results = run_ranks(4, run_weighted, config, plugin)
    weighted = with_task(config, plugin)
    plain = run_plain(weighted, 0, STEPS)
    for step in range(STEPS):
        assert_equal([rank[step] for rank in results], plain[step], 1e-10)
    losses, gradients = plain_autograd(weighted)
    assert plain[0].losses[: len(losses)] == pytest.approx(losses, rel=1e-10)
    assert set(gradients) == set(plain[0].gradients)
    for name, expected in gradients.items():
        total = sum(rank[0].gradients[name] for rank in results if name in rank[0].gradients)
        assert isinstance(total, Tensor)
        assert relative_error(total, expected) <= 1e-10, f"gradient of {name}"
    unweighted = run_plain(config, 0, 1)[0]
    assert abs(unweighted.losses[0] - losses[0]) > 1e-3
