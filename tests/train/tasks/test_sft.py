"""Tests supervised fine-tuning: its targets, and that no layout of ranks changes its loss and gradients."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from comm.dispatch.local import LocalDispatcher
from data.loader import IGNORE, Batch
from dualpipe.config import ScheduleConfig
from model.objective import LossSums, MicroBatch
from model.transformer import Transformer, initialize_weights
from tests.marked_samples import SFT, sft_config
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL
from tests.train.job import Job, open_loader, run_jobs, run_plain
from tests.train.test_equality import assert_equal
from train.config import TrainConfig
from train.config.errors import ConfigError
from train.tasks.registry import TASKS, StepRates, open_task

RATES = StepRates(learning_rate=1.0, mtp_loss_weight=0.1, bias_update=0.0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sft")


def read(batch: Batch, depth: int) -> MicroBatch:
    return open_task(SFT, replace(MODEL, mtp_depth=depth), replace(BATCH, document_mask=True)).read(batch, CPU)


def test_targets_are_the_marked_tokens_at_every_depth() -> None:
    """Two samples and padding. The weight at position i is that of token i + 1."""
    batch = Batch(
        tokens_BT=torch.tensor([[10, 11, 12, 13, 14, 20, 21, 22, 2]]),
        positions_BT=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, -1]]),
        pad_id=2,
        extras={"weights": torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]])},
    )
    made = read(batch, 2)
    none = IGNORE
    assert [depth.tolist() for depth in made.targets_BT] == [
        [[none, 12, none, 14, none, none, 22, none, none]],
        [[12, none, 14, none, none, 22, none, none, none]],
        [[none, 14, none, none, none, none, none, none, none]],
    ]
    # No token of another sample is embedded by an MTP depth.
    assert made.inputs_BT[1].tolist() == [[11, 12, 13, 14, 2, 21, 22, 2, 2]]
    assert made.inputs_BT[2].tolist() == [[12, 13, 14, 2, 2, 22, 2, 2, 2]]
    rows = [made.rows(depth) for depth in range(3)]
    assert [None if each is None else each.tolist() for each in rows] == [[1, 3, 6], [0, 2, 5], [1]]
    task = open_task(SFT, replace(MODEL, mtp_depth=2), replace(BATCH, document_mask=True))
    assert task.count(made).tolist() == [3, 3, 1, 2]
    assert task.objective(torch.zeros(4, dtype=torch.float64) + torch.tensor([0, 0, 0, 1.0]), RATES).balance == 0.01


def layouts(folder: Path) -> Iterator[tuple[int, list[TrainConfig]]]:
    """Runs of one global batch of 16 sequences, by the number of ranks."""
    by_size: dict[int, list[TrainConfig]] = {}
    for pipeline, data, experts in ((1, 1, (1,)), (1, 2, (1, 2)), (2, 1, (1,)), (2, 2, (1, 2)), (4, 1, (1,))):
        for expert in experts:
            for micro in (1, 2, 4):
                for kind in ("1f1b", "dualpipe", "dualpipe_split", "zb_h1", "zb_v"):
                    config = sized(folder, pipeline, data, expert, micro, kind)  # type: ignore[arg-type]
                    limit = 2 * pipeline if kind.startswith("dualpipe") else pipeline
                    if config.num_micro_batches >= limit and (pipeline > 1 or kind == "1f1b"):
                        by_size.setdefault(pipeline * data, []).append(config)
    yield from by_size.items()


Kind = Literal["1f1b", "dualpipe", "dualpipe_split", "zb_h1", "zb_v"]


def sized(folder: Path, pipeline: int, data: int, expert: int, micro: int, kind: Kind) -> TrainConfig:
    config = sft_config(folder, pipeline=pipeline, data=data, expert=expert, has_fractions=True)
    layers = 8 if kind == "zb_v" and pipeline == 4 else 4
    return replace(
        config,
        batch=replace(config.batch, global_sequences=16, micro_sequences=micro),
        schedule=ScheduleConfig(kind=kind, chunks=None, pairing="overlapped"),
        model=replace(config.model, num_layers=layers, hidden_size=16),
    )


def assert_equal_to_one_rank(folder: Path, chosen: list[tuple[int, list[TrainConfig]]]) -> set[float]:
    """Compares losses and gradients of a step. Returns the shares of targets that sequences hold."""
    plains, shares = {}, set()
    for world_size, configs in chosen:
        results = run_ranks(world_size, run_jobs, [Job(config=config) for config in configs], 1)
        for index, config in enumerate(configs):
            layers = config.model.num_layers
            if layers not in plains:
                plains[layers] = run_plain(config, 0, 1)[0]
                whole = open_loader(config).batch(0, 0, config.batch.global_sequences)
                targets_BT = read(whole, 1).targets_BT[0]
                shares |= set((targets_BT >= 0).double().mean(1).tolist())
            assert_equal([rank[index][0] for rank in results], plains[layers], 1e-10)
    return shares


@pytest.mark.long
def test_sft_on_40_layouts_equals_one_rank_although_ranks_hold_different_shares_of_targets(folder: Path) -> None:
    chosen = list(layouts(folder))
    assert sum(len(configs) for _, configs in chosen) >= 40
    shares = assert_equal_to_one_rank(folder, chosen)
    assert 0.0 in shares
    assert max(shares) > 0.6


@pytest.mark.slow
def test_sft_on_two_ranks_equals_one_rank_although_ranks_hold_different_shares_of_targets(folder: Path) -> None:
    chosen = [(size, configs[:3] + configs[-2:]) for size, configs in layouts(folder) if size == 2]
    assert 0.0 in assert_equal_to_one_rank(folder, chosen)


@pytest.mark.long
def test_sft_on_ranks_that_share_sequences_equals_one_rank(folder: Path) -> None:
    """Fractional weights of MTP's targets are those of tokens that other ranks may hold."""
    config = sized(folder, 2, 1, 1, 1, "dualpipe")
    mesh = replace(config.parallelism, context=2, expert=2)
    assert_equal_to_one_rank(folder, [(4, [replace(config, parallelism=mesh)])])


def test_batch_without_any_target_has_loss_and_gradient_zero() -> None:
    tokens = torch.arange(24).view(2, 12)
    batch = Batch(tokens_BT=tokens, positions_BT=tokens % 6, pad_id=2, extras={"weights": torch.zeros(2, 12)})
    task, made = (
        open_task(replace(SFT, balance_loss_weight=0.0), MODEL, replace(BATCH, document_mask=True)),
        read(batch, 1),
    )
    model, sums = Transformer(MODEL, LocalDispatcher(MODEL.num_routed_experts), torch.float64), LossSums(task.names)
    initialize_weights(model, 3)
    loss = model.loss(made, task.objective(task.count(made), RATES), sums)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert sums.settle()[:2].tolist() == [0.0, 0.0]
    assert not any(bool(weight.grad.any()) for weight in model.parameters() if weight.grad is not None)


@pytest.mark.parametrize("is_masked", [True, False])
def test_sft_needs_samples_that_do_not_see_each_other(folder: Path, *, is_masked: bool) -> None:
    config = sft_config(folder)
    check = TASKS.get("sft").check
    check(config)
    if is_masked:
        refused = {"files": r"with samples for task\.kind=sft, is files", "problems": "with answers .* is problems"}
        for kind, rule in refused.items():
            data = replace(config.data, source=replace(config.data.source, kind=kind))
            with pytest.raises(ConfigError, match=rf"data\.kind: must be a source {rule}"):
                check(replace(config, data=data))
    else:
        config = replace(config, batch=replace(config.batch, document_mask=False))
        with pytest.raises(ConfigError, match=r"batch\.document_mask: must be true for task\.kind=sft"):
            check(config)
