"""Next-token prediction, fine-tuning and longer contexts: targets, weights, and equality under every layout."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from base.refusal import ConfigError
from comm.dispatch.local import LocalDispatcher
from data.loader import IGNORE, Batch
from dualpipe.registry import ScheduleConfig
from launch.config.run import check
from model.config import PlainRope, YarnRope
from model.objective import LossSums, MicroBatch, weights_of_depths
from model.pretrained import load_hf, save_hf
from model.transformer import Transformer, initialize_weights, named_tensors
from tests.launch.checkpoints import write_stand_in
from tests.launch.test_config import build
from tests.marked_samples import SFT, sft_config
from tests.model.hf_checkpoints import random_tokens, reference_logits, reference_model
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL, TASK
from tests.train.job import Job, open_loader, run_jobs, run_plain
from tests.train.test_equality import assert_equal
from train.config import TrainConfig
from train.tasks.next_token import NextToken, to_micro_batch
from train.tasks.pretrain import LongContextConfig, check_long_context
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
                for kind in ("1f1b", "dualpipe", "dualpipe_split", "zb_v"):
                    config = sized(folder, pipeline, data, expert, micro, kind)
                    limit = 2 * pipeline if kind.startswith("dualpipe") else pipeline
                    if config.num_micro_batches >= limit and (pipeline > 1 or kind == "1f1b"):
                        by_size.setdefault(pipeline * data, []).append(config)
    yield from by_size.items()


Kind = Literal["1f1b", "dualpipe", "dualpipe_split", "zb_v"]


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


@pytest.mark.parametrize(
    ("world_sizes", "every"),
    [
        pytest.param((2,), 5, marks=pytest.mark.slow),
        pytest.param((4,), 9, marks=pytest.mark.long),
        pytest.param((1, 2, 4), 1, marks=pytest.mark.exhaustive),
    ],
)
def test_many_ranks_equal_one_rank_although_they_hold_different_shares_of_targets(
    folder: Path, world_sizes: tuple[int, ...], every: int
) -> None:
    chosen = [(size, configs[::every]) for size, configs in layouts(folder) if size in world_sizes]
    assert sum(len(configs) for _, configs in chosen) >= (40 if every == 1 else 4)
    shares = assert_equal_to_one_rank(folder, chosen)
    assert 0.0 in shares
    assert max(shares) > 0.6


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


HAND_RATES = StepRates(learning_rate=1.0, mtp_loss_weight=0.3, bias_update=0.0)


def test_micro_batch_shifts_inputs_by_depth_and_targets_by_one_more() -> None:
    tokens = torch.tensor([[10, 11, 12, 13, 20, 21, 22]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    made = to_micro_batch(Batch(tokens_BT=tokens, positions_BT=positions, pad_id=2), 2, torch.device("cpu"))
    assert [depth.tolist() for depth in made.inputs_BT] == [
        [[10, 11, 12, 13, 20, 21, 22]],
        [[11, 12, 13, 20, 21, 22, 2]],
        [[12, 13, 20, 21, 22, 2, 2]],
    ]
    none = -100
    assert [depth.tolist() for depth in made.targets_BT] == [
        [[11, 12, 13, none, 21, 22, none]],
        [[12, 13, none, none, 22, none, none]],
        [[13, none, none, none, none, none, none]],
    ]


def test_micro_batch_has_its_documents_if_they_are_masked() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, -1]])
    batch = Batch(tokens_BT=torch.zeros_like(positions), positions_BT=positions, pad_id=2)
    masked, plain = (
        to_micro_batch(batch, 0, torch.device("cpu"), masks_documents=masks_documents)
        for masks_documents in (True, False)
    )
    assert masked.documents is not None
    assert masked.documents.ids_BT.tolist() == [[1, 1, 1, 1, 2, 2, 3]]
    assert plain.documents is None


def weighted_batch() -> MicroBatch:
    """Seven tokens in two documents; the last main target of the first document is ignored."""
    tokens = torch.tensor([[10, 11, 12, 13, 20, 21, 22]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    weights = torch.tensor([[0.5, 1.0, 2.0, 64.0, 4.0, 8.0, 64.0]])
    batch = Batch(tokens_BT=tokens, positions_BT=positions, pad_id=2, extras={"weights": weights})
    return to_micro_batch(batch, 2, torch.device("cpu"))


def test_counts_are_targets_of_each_depth_and_sequences() -> None:
    task = NextToken(TASK, 2)
    assert task.names == ("main", "mtp_1", "mtp_2", "balance")
    assert task.count(weighted_batch()).tolist() == [5, 3, 1, 1]


def test_weights_of_a_depth_are_those_of_the_tokens_that_it_predicts() -> None:
    task = NextToken(TASK, 2, weights="weights")
    batch = weighted_batch()
    batch = replace(batch, extras={"weights": weights_of_depths(batch.extras["weights"], 3)})
    assert task.count(batch).tolist() == [0.5 + 1 + 2 + 4 + 8, 1 + 2 + 8, 2, 1]


def test_objective_divides_by_global_counts() -> None:
    objective = NextToken(TASK, 2).objective(torch.tensor([50.0, 40.0, 20.0, 16.0]), HAND_RATES)
    assert objective.factors == pytest.approx((1 / 50, 0.3 / 2 / 40, 0.3 / 2 / 20))
    assert objective.balance == pytest.approx(0.01 / 16)


def test_objective_without_a_target_divides_by_one() -> None:
    objective = NextToken(TASK, 1).objective(torch.tensor([0.25, 0.0, 16.0]), HAND_RATES)
    assert objective.factors == (4.0, 0.3)


def test_total_weighs_means() -> None:
    total = NextToken(TASK, 2).total({"main": 4.0, "mtp_1": 5.0, "mtp_2": 7.0, "balance": 2.0}, HAND_RATES)
    assert total == pytest.approx(4.0 + 0.3 * 6.0 + 0.01 * 2.0)


def test_extras_stay_with_their_sequences() -> None:
    tokens = torch.arange(12).view(4, 3)
    batch = Batch(tokens_BT=tokens, positions_BT=tokens % 3, pad_id=0, extras={"rewards": tokens[..., None] * 0.5})
    part = batch.sequences(1, 2)
    assert part.tokens_BT.tolist() == [[3, 4, 5], [6, 7, 8]]
    made = to_micro_batch(part, 0, torch.device("cpu"))
    assert made.extras["rewards"][..., 0].tolist() == [[1.5, 2.0, 2.5], [3.0, 3.5, 4.0]]


def extend(weights: str | Path, *overrides: str, model: str = "of_checkpoint") -> TrainConfig:
    return build("task=long_context", f"model={model}", f"init_from={weights}", *overrides)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_stand_in(folder, build().model)
    return folder


def test_defaults_are_the_published_values(base: Path) -> None:
    """They are those of arXiv:2412.19437, section 4.3, as in the released config.json."""
    released = build("model=v3_671b").model
    config = extend(base, model="v3_671b_4k")
    assert config.model == released
    assert isinstance(config.task, LongContextConfig)
    assert (config.task.steps, config.task.mtp_loss_weight.at(0), config.task.bias_update_rate.at(0)) == (1000, 0.1, 0)


def test_phases_follow_each_other_with_the_same_values(base: Path, tmp_path: Path) -> None:
    """The second phase starts from weights that have YaRN already."""
    values = ("task.rope.factor=8", "task.rope.original_max_position_tokens=128", "batch.global_sequences=16")
    first = extend(base, *values, "batch.sequence_length_tokens=512")
    write_stand_in(tmp_path, first.model)
    second = extend(tmp_path, *values, "batch.sequence_length_tokens=1024")
    assert first.model == second.model
    assert (second.model.max_position_tokens, second.model.rope_scaling.kind) == (1024, "yarn")
    assert replace(
        second.model, rope_scaling=PlainRope(kind="plain"), max_position_tokens=4096
    ) == build().model  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task.rope.factor=0.5"], "task.rope.factor: must be at least 1, is 0.5"),
        (["task.rope.kind=linear"], "task.rope.kind: must be one of plain, yarn, is 'linear'"),
        (["task.rope.beta_fast=x"], "task.rope.beta_fast"),
        (
            ["task.rope.factor=2", "batch.sequence_length_tokens=10000"],
            "batch.sequence_length_tokens: must be at most model.max_position_tokens=8192, is 10000; nearest valid: 81",
        ),
        (
            ["task.rope.factor=2", "batch.sequence_length_tokens=10000", "task.max_position_tokens=16384"],
            "task.rope.factor: must be at least batch.sequence_length_tokens / task.rope.original_max_position_tokens "
            "= 10000 / 4096, is 2; nearest valid: 3, or batch.sequence_length_tokens=8192",
        ),
        (
            ["task.rope.factor=2", "task.max_position_tokens=16384"],
            "task.rope.factor: must be at least task.max_position_tokens / task.rope.original_max_position_tokens",
        ),
        (["init_from=null", "data.tokenizer=null"], "init_from: must name trained weights with task=long_context"),
    ],
)
def test_extension_that_cannot_work_is_one_error(base: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(extend(base, *overrides, model="quickstart"))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_model_has_the_rotary_embedding_of_the_task(base: Path) -> None:
    config = extend(base, "task/rope=plain", "task.max_position_tokens=8192")
    assert (config.model.rope_scaling, config.model.max_position_tokens) == (PlainRope(kind="plain"), 8192)
    check_long_context(config)
    yarn = YarnRope(**{**asdict(build("model=v3_671b").model.rope_scaling), "kind": "yarn"})
    with pytest.raises(ConfigError, match=r"model\.rope_scaling: must be task\.rope"):
        check_long_context(replace(config, model=replace(config.model, rope_scaling=yarn)))


@torch.no_grad()
def test_exported_model_is_that_of_transformers_at_four_times_the_base_length(tmp_path: Path) -> None:
    """The exported config.json has the keys of the released one."""
    base = 64
    reference_model(max_position_embeddings=base).save_pretrained(tmp_path / "base")
    values = ("task.rope.factor=4", f"task.rope.original_max_position_tokens={base}", "data.tokenizer=null")
    config = extend(tmp_path / "base", *values, f"batch.sequence_length_tokens={4 * base}").model
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.float32)
    before = load_hf(tmp_path / "base", torch.float32)
    for name, tensor in named_tensors(model).items():
        tensor.copy_(named_tensors(before)[name])
    save_hf(model, tmp_path / "export")
    exported = json.loads((tmp_path / "export" / "config.json").read_text(encoding="utf-8"))
    assert exported["max_position_embeddings"] == 4 * base
    assert exported["rope_theta"] == 10000
    assert exported["rope_scaling"] == {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": base,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    tokens_BT = random_tokens(2, 4 * base)
    ours_BTV = model(tokens_BT)
    theirs_BTV = reference_logits(DeepseekV3ForCausalLM.from_pretrained(tmp_path / "export"), tokens_BT)
    torch.testing.assert_close(ours_BTV, theirs_BTV, rtol=0, atol=1e-4)
    assert (before(tokens_BT) - ours_BTV).abs().amax() > 0.01
