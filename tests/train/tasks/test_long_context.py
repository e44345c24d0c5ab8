"""Tests the task that extends the context: the model follows its rotary embedding, and phases follow each other."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from comm.dispatch.local import LocalDispatcher
from launch.config.run_config import check
from model.config import PlainRope, YarnRope
from model.hf.convert import load_hf, save_hf
from model.transformer import Transformer, named_tensors
from tests.launch.test_config import build
from tests.model.hf_checkpoints import random_tokens, reference_logits, reference_model
from train.checkpoint.manifest import write_weights_manifest
from train.config import TrainConfig
from train.config.errors import ConfigError
from train.tasks.long_context import LongContextConfig, check_long_context


def extend(weights: str | Path, *overrides: str, model: str = "of_checkpoint") -> TrainConfig:
    return build("task=long_context", f"model={model}", f"init_from={weights}", *overrides)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_weights_manifest(folder, build().model, {})
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
    write_weights_manifest(tmp_path, first.model, {})
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
        (
            ["init_from=null", "data.tokenizer=null"],
            "init_from: must name trained weights with task=long_context",
        ),
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
