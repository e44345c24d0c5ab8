"""Cuts into stages, the ladder of small models, and documents packed into one sequence."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from base.decode import decode, encode
from base.refusal import ConfigError
from comm.dispatch.local import LocalDispatcher
from data.loader import Batch
from kernels.attention.documents import Documents
from launch.config.run import compose_run, read_config, write_config
from model.config import CutError, MlaConfig, ModelConfig, cut_layers, ladder
from model.objective import CrossEntropy, LossSums, MicroBatch, loss_names
from model.size import count_parameters
from model.transformer import Transformer, initialize_weights, named_tensors
from tests.tiny import MODEL
from train.tasks.next_token import to_micro_batch


def test_cut_covers_every_layer_once_in_order() -> None:
    for layers in range(1, 16):
        for stages in range(1, layers + 1):
            for depth in range(3):
                cut = cut_layers(layers, stages, depth)
                assert [layer for stage in cut for layer in stage] == list(range(layers))
                assert all(cut)
                sizes = [len(stage) for stage in cut]
                assert stages == 1 or max(sizes[:-1]) - min(sizes[:-1]) <= 1


def test_cut_refuses_fewer_layers_than_stages() -> None:
    with pytest.raises(CutError, match=r"model\.num_layers.*3 layers.*4 pipeline stages"):
        cut_layers(3, 4)


def test_cut_names_the_nearest_pipeline_of_two_stages_a_rank() -> None:
    with pytest.raises(CutError, match=r"7 layers.*8 pipeline stages.*num_layers=8 or parallelism\.pipeline=3$"):
        cut_layers(7, 8, stages_per_rank=2)
    with pytest.raises(CutError, match=r"nearest valid: model\.num_layers=2$"):
        cut_layers(1, 2, stages_per_rank=2)


SIZES = range(1, 25)


def chosen(*overrides: str) -> MlaConfig:
    config = compose_run(overrides).model
    assert isinstance(config, MlaConfig)
    return config


@pytest.mark.parametrize(
    ("name", "size", "total", "active_without_embedding", "mtp"),
    [
        ("ladder_20m", 4, 22_425_408, 6_565_696, 3_630_432),
        ("ladder_100m", 7, 93_885_736, 22_779_176, 10_958_696),
        ("ladder_300m", 11, 340_561_320, 79_236_520, 27_020_488),
        ("ladder_1b", 16, 1_013_362_432, 231_124_736, 57_120_128),
    ],
)
def test_ladder_named_steps_have_these_counts(
    name: str, size: int, total: int, active_without_embedding: int, mtp: int
) -> None:
    config = ladder(size)
    assert chosen(f"model={name}") == config
    account = count_parameters(config)
    assert account.total == total
    assert account.active_without_embedding == active_without_embedding
    assert account.mtp == mtp


def test_ladder_grows_from_under_a_million_to_above_a_billion() -> None:
    totals = [count_parameters(ladder(size)).total for size in SIZES]
    assert totals == sorted(set(totals))
    assert totals[0] < 1_000_000
    assert totals[-1] > 1_000_000_000
    # From 140M on fine enough that a wished size is met within a fifth.
    assert all(after / before < 1.4 for before, after in pairwise(totals[7:]))


@pytest.mark.parametrize("size", [*SIZES[:6], 11, 16, 24])
def test_ladder_every_step_keeps_the_proportions(size: int) -> None:
    config = ladder(size)
    assert config.qk_nope_head_dim == 2 * config.qk_rope_head_dim == config.v_head_dim
    assert config.num_heads * config.v_head_dim == 2 * config.hidden_size
    assert config.q_lora_rank is not None
    assert config.q_lora_rank < config.hidden_size
    assert config.kv_lora_rank < config.hidden_size
    together = config.num_experts_per_token + config.num_shared_experts
    assert config.dense_intermediate_size == together * config.expert_intermediate_size
    assert config.num_routed_experts % config.num_expert_groups == 0
    assert config.num_expert_groups == 2 * config.num_limited_groups
    assert config.num_experts_per_token <= config.num_limited_groups * (
        config.num_routed_experts // config.num_expert_groups
    )
    assert (config.num_shared_experts, config.mtp_depth) == (1, 1)
    assert 1 <= config.num_dense_layers < config.num_layers
    assert config.hidden_size % 32 == 0


def test_ladder_single_values_are_changed_on_top() -> None:
    config = chosen("model=ladder", "model.size=2", "+model.mtp_depth=0", "+model.q_lora_rank=null")
    assert config.mtp_depth == 0
    assert config.q_lora_rank is None
    assert config.hidden_size == ladder(2).hidden_size


def test_ladder_a_run_records_the_whole_model() -> None:
    written = write_config(compose_run(["model=ladder_100m"]))
    assert written["model"]["hidden_size"] == ladder(7).hidden_size
    assert "kind" not in written["model"]
    assert read_config(written).model == ladder(7)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model=ladder", "model.size=0"], ["model.size", "at least 1", "is 0", "nearest valid: 1"]),
        (["model=ladder", "model.size=1.5"], ["model.size", "whole number", "1.5"]),
        (["model=ladder", "~model.size"], ["model.size", "None"]),
        (["model=ladder", "model.kind=laddr"], ["model.kind", "did you mean ladder"]),
        (["model=ladder", "+model.mtp_dpth=0"], ["model.mtp_dpth: unknown key", "did you mean model.mtp_depth"]),
        (["model=ladder", "model.mtp_depth=0"], ["model.mtp_depth", "+model.mtp_depth=0"]),
        (["model=ladder", "+model.hidden_size=x"], ["model.hidden_size", "whole number", "'x'"]),
        (["model.size=3"], ["model.size", "model=ladder"]),
        (["model=of_checkpoint"], ["model: of_checkpoint", "init_from=FOLDER"]),
    ],
)
def test_ladder_sizes_that_name_no_model_are_rejected(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        chosen(*overrides)
    for part in parts:
        assert part in str(refused.value)


LENGTHS = [[6, 1, 9], [4, 12], [16]]
CPU = torch.device("cpu")


def make_model(config: MlaConfig, dtype: torch.dtype = torch.float64) -> Transformer:
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), dtype)
    initialize_weights(model, 5)
    return model


def packed(lengths: list[list[int]], size: int) -> Batch:
    """Sequences of documents of these lengths, then padding."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.full((len(lengths), size), 1)
    positions = torch.full((len(lengths), size), -1)
    for row, sequence in enumerate(lengths):
        first = 0
        for length in sequence:
            drawn = torch.randint(2, MODEL.vocab_size, (length,), generator=generator)
            tokens[row, first : first + length], positions[row, first : first + length] = drawn, torch.arange(length)
            first += length
    return Batch(tokens_BT=tokens, positions_BT=positions, pad_id=1)


def alone(batch: Batch) -> list[Batch]:
    found = []
    for tokens, positions in zip(batch.tokens_BT, batch.positions_BT, strict=True):
        starts = (positions == 0).nonzero().flatten().tolist()
        end = int((positions >= 0).sum())
        for first, last in zip(starts, [*starts[1:], end], strict=True):
            part = slice(first, last)
            found.append(Batch(tokens_BT=tokens[None, part], positions_BT=positions[None, part], pad_id=batch.pad_id))
    return found


def losses_and_gradients(config: MlaConfig, batches: list[MicroBatch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the sums of all losses, the balance loss included, and gradients."""
    model, depths = make_model(config), config.mtp_depth + 1
    sums = LossSums(loss_names(depths - 1))
    objective = CrossEntropy(factors=tuple(0.1 / (depth + 1) for depth in range(depths)), balance=0.02)
    for batch in batches:
        model.loss(batch, objective, sums).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return sums.settle(), gradients


@pytest.mark.parametrize("depth", [0, 2])
def test_packed_documents_with_the_mask_equal_each_alone(depth: int) -> None:
    config = replace(MODEL, mtp_depth=depth)
    batch = packed(LENGTHS, 19)
    together, gradients = losses_and_gradients(config, [to_micro_batch(batch, depth, CPU, masks_documents=True)])
    single = [to_micro_batch(each, depth, CPU) for each in alone(batch)]
    assert len(single) == 6
    expected, expected_gradients = losses_and_gradients(config, single)
    torch.testing.assert_close(together, expected, rtol=1e-12, atol=0)
    assert set(gradients) == set(expected_gradients)
    for name, gradient in expected_gradients.items():
        error = (gradients[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-30)
        assert error <= 1e-12, f"{name}: {error}"
    without, unlike = losses_and_gradients(config, [to_micro_batch(batch, depth, CPU)])
    assert (without - expected).abs().min() > 1e-2
    assert max(float((unlike[name] - expected_gradients[name]).abs().max()) for name in unlike) > 1e-2


@torch.no_grad()
def test_logits_of_packed_documents_with_the_mask_are_those_of_each_alone() -> None:
    model, batch = make_model(MODEL), packed(LENGTHS, 19)
    logits = model(batch.tokens_BT, Documents.from_positions(batch.positions_BT))
    rows = [model(each.tokens_BT)[0] for each in alone(batch)]
    torch.testing.assert_close(logits[batch.positions_BT >= 0], torch.cat(rows), rtol=1e-12, atol=1e-13)
    without = model(batch.tokens_BT)[batch.positions_BT >= 0]
    assert (without - torch.cat(rows)).abs().max() > 1e-2


def test_initial_weights_are_the_same_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    for num_threads in (1, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda num_threads=num_threads: num_threads)
        models.append(named_tensors(make_model(MODEL, torch.bfloat16)))
    assert all(torch.equal(models[1][name], weight) for name, weight in models[0].items())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.attention=mpa", r"^model\.attention: must be one of mla\b.*, is 'mpa'; did you mean mla\?$"),
        ("+model.num_kv_heads=2", r"^model\.num_kv_heads: unknown key"),
    ],
)
def test_keys_are_those_of_the_form_of_attention(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run(["experiment=quickstart", override])


def test_a_model_without_a_form_has_latents() -> None:
    values = encode(MODEL)
    assert decode(ModelConfig, values) == MODEL
    del values["attention"]
    assert decode(ModelConfig, values) == MODEL
    with pytest.raises(ConfigError, match=r"^kv_lora_rank: missing"):
        decode(ModelConfig, {key: value for key, value in values.items() if key != "kv_lora_rank"})
