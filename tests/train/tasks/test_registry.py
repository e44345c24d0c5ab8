"""Registered tasks on many ranks, and that of docs/extend.md, a file outside the checkout, held against autograd."""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from base.decode import decode
from base.registry import load_plugins
from comm.config import ParallelismConfig
from comm.dispatch.local import LocalDispatcher
from dualpipe.registry import ScheduleConfig
from model.transformer import Transformer, initialize_weights
from tests import ROOT
from tests.launch.checkpoints import write_checkpoint
from tests.marked_samples import MarkedSource
from tests.model.mtp_logits import mtp_logits
from tests.pairs import on_pairs
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL, tiny_config, write_text
from tests.train.job import Job, open_loader, run_jobs, run_plain
from tests.train.test_equality import assert_equal_one_rank
from train.config import TrainConfig
from train.tasks.registry import TASKS
from verify.steps import StepValues, by_released_name, relative_error, start_biases

STEPS = 2
WEIGHT = 3.5
MTP_WEIGHT = 0.3


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file that the page shows; its task is forgotten after these tests."""
    folder = tmp_path_factory.mktemp("weighted")
    page = (ROOT / "docs" / "extend.md").read_text("utf-8")
    text = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "WeightedConfig" in block)
    (folder / "weighted.py").write_text(text, "utf-8")
    yield folder / "weighted.py"
    for module in load_plugins([folder / "weighted.py"]):
        TASKS.remove(["weighted"])
        del sys.modules[module.__name__]


def with_task(config: TrainConfig, kind: str, plugins: list[str], balance: float = 0.0) -> TrainConfig:
    """The run under a task with its example's values, decoded as a command decodes it."""
    load_plugins(plugins)
    values = {
        "kind": kind,
        "steps": STEPS,
        "mtp_loss_weight": MTP_WEIGHT,
        "balance_loss_weight": balance,
        "bias_update_rate": 0.05,
        **TASKS.get(kind).example,
    }
    if set(TASKS.get(kind).values) & {"pair", "score"}:
        config = on_pairs(config, kind)
    elif TASKS.get(kind).values:
        marked, masked = MarkedSource(kind="marked", num_samples=160), replace(config.batch, document_mask=True)
        config = replace(config, data=replace(config.data, source=marked), batch=masked)
    if kind == "distill":
        values["teacher"] = write_teacher(Path(config.out_dir).parent / "teacher")
    return replace(config, task=decode(get_type_hints(TrainConfig, include_extras=True)["task"], values, "task"))


def write_teacher(folder: Path) -> str:
    """Writes the weights of a teacher once, and returns their folder."""
    if not folder.exists():
        teacher = Transformer(replace(MODEL, mtp_depth=0), LocalDispatcher(MODEL.num_routed_experts), torch.float64)
        initialize_weights(teacher, 5)
        write_checkpoint(folder, teacher)
    return str(folder)


def run_task(
    rank: int, world_size: int, config: TrainConfig, kind: str, plugins: list[str], balance: float
) -> list[StepValues]:
    """Returns the results of each step on this rank. It builds the plugin's dataclass like a rank of a run does."""
    return run_jobs(rank, world_size, [Job(config=with_task(config, kind, plugins, balance))], STEPS)[0]


def two_ranks(folder: Path, pipeline: int, data: int) -> TrainConfig:
    return tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=pipeline, data=data, expert=data),
        batch=replace(BATCH, global_sequences=8),
        schedule=ScheduleConfig(kind="1f1b" if data > 1 else "dualpipe", chunks=None, pairing="overlapped"),
    )


HAS_OWN_TEST = ("pretrain", "sft", "distill", "dpo", "reward_model")
"""Tasks that other tests compare with one rank under the same and more layouts."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(name, marks=pytest.mark.exhaustive if name in HAS_OWN_TEST else ())
        for name, spec in TASKS.items()
        if not spec.has_rollouts
    ],
)
def test_registered_task_on_two_ranks_equals_one_rank(tmp_path: Path, kind: str) -> None:
    """Tasks of `pytest --plugins FILE` included."""
    write_text(tmp_path)
    config = two_ranks(tmp_path, pipeline=2, data=1)
    plugins = [str(module.__file__) for module in list(sys.modules.values()) if "__plugin__" in vars(module)]
    # Writes the weights of a teacher before ranks read them.
    alone = with_task(config, kind, plugins, 0.01)
    results = run_ranks(2, run_task, config, kind, plugins, 0.01)
    assert_equal_one_rank(results, alone)


def plain_autograd(config: TrainConfig) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of every depth of the first step and gradients of their sum, by formula from whole logits."""
    model = Transformer(config.model, LocalDispatcher(config.model.num_routed_experts), torch.float64)
    initialize_weights(model, config.seed)
    start_biases(model, 0)
    batch = open_loader(config).batch(0, 0, config.batch.global_sequences)
    losses = []
    for depth, logits_BTV in enumerate((model(batch.tokens_BT), *mtp_logits(model, batch.tokens_BT))):
        targets_BT = batch.targets(depth + 1)[:, : logits_BTV.shape[1]]
        nats_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none", ignore_index=-100)
        weights_BT = torch.where(targets_BT % 2 == 0, WEIGHT, 1.0) * (targets_BT >= 0)
        losses.append((weights_BT * nats_BT).sum() / weights_BT.sum())
    (losses[0] + MTP_WEIGHT * torch.stack(losses[1:]).mean()).backward()
    return [float(loss.detach()) for loss in losses], by_released_name(model, lambda parameter: parameter.grad)


@pytest.mark.slow
def test_weighted_cross_entropy_on_many_ranks_equals_one_rank_and_autograd(tmp_path: Path, plugin: Path) -> None:
    write_text(tmp_path)
    config = two_ranks(tmp_path, pipeline=1, data=2)
    results = run_ranks(2, run_task, config, "weighted", [str(plugin)], 0.0)
    weighted = with_task(config, "weighted", [str(plugin)])
    plain = assert_equal_one_rank(results, weighted)
    losses, gradients = plain_autograd(weighted)
    assert plain[0].losses[: len(losses)] == pytest.approx(losses, rel=1e-10)
    assert set(gradients) == set(plain[0].gradients)
    for name, expected in gradients.items():
        total = sum(rank[0].gradients[name] for rank in results if name in rank[0].gradients)
        assert isinstance(total, Tensor)
        assert relative_error(total, expected) <= 1e-10, f"gradient of {name}"
    unweighted = run_plain(config, 0, 1)[0]
    assert abs(unweighted.losses[0] - losses[0]) > 1e-3
