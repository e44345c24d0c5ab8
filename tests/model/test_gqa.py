"""Grouped-query attention against transformers' Qwen3, and decoding from its cache against whole passes."""

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

from base.refusal import ConfigError
from comm.dispatch.local import LocalDispatcher
from infer.decoder import Decoder
from kernels.attention.documents import Documents
from launch.config.rules import check_model, check_rules
from model.attention.gqa import GroupedAttention
from model.config import Computing, GqaConfig
from model.norm import RmsNorm
from model.size import attention_parameters, count_parameters
from model.transformer import Transformer, build_linears, initialize_weights, named_tensors
from tests.tiny import GQA, tiny_config

WIDE = replace(GQA, num_heads=4, num_kv_heads=2)


@pytest.mark.parametrize("config", [GQA, WIDE])
def test_a_layer_equals_that_of_transformers(config: GqaConfig) -> None:
    torch.manual_seed(0)
    layer = GroupedAttention(config, torch.float64, "auto", build_linears(Computing()))
    theirs_config = Qwen3Config(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attn_implementation="eager",
    )
    theirs = Qwen3Attention(theirs_config, 0).double()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_()
    theirs.load_state_dict(layer.state_dict())
    norm = RmsNorm(config.hidden_size, config.norm_eps, torch.float64)
    x_BTD = torch.randn(2, 9, config.hidden_size, dtype=torch.float64)
    positions = torch.arange(9)[None]
    turns = tuple(each.double() for each in Qwen3RotaryEmbedding(theirs_config)(x_BTD, positions))
    future = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    expected = x_BTD + theirs(norm(x_BTD), turns, future)[0]
    # Their cos and sin are of float32.
    torch.testing.assert_close(layer(x_BTD, norm, None), expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("config", [GQA, replace(WIDE, qk_norm=False)])
def test_cached_decoding_equals_whole_passes(config: GqaConfig) -> None:
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.float64)
    initialize_weights(model, 3)
    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randint(config.vocab_size, (size,), generator=generator).tolist() for size in (7, 9)]
    expected = [model(torch.tensor([each]))[0] for each in tokens]
    decoder = Decoder(model, 2, 12, with_mtp=False)
    rows, lengths = [decoder.main.add() for _ in tokens], [3, 5]
    decoder.read(rows, [each[:size] for each, size in zip(tokens, lengths, strict=True)])
    for width in (2, 1, 1):
        for row, size in enumerate(lengths):
            decoder.main.resize(row, size)
        new = torch.tensor([each[size : size + width] for each, size in zip(tokens, lengths, strict=True)])
        _, logits_BSV = decoder.step(new)
        for row, size in enumerate(lengths):
            torch.testing.assert_close(logits_BSV[row], expected[row][size : size + width], rtol=0, atol=1e-10)
        lengths = [size + width for size in lengths]


@torch.no_grad()
def test_documents_do_not_see_each_other() -> None:
    model = Transformer(GQA, LocalDispatcher(GQA.num_routed_experts), torch.float64)
    initialize_weights(model, 3)
    tokens = torch.arange(10)[None]
    documents = Documents.from_positions(torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]))
    packed = model(tokens, documents)
    torch.testing.assert_close(packed[:, :4], model(tokens[:, :4], None), rtol=0, atol=1e-12)
    torch.testing.assert_close(packed[:, 4:], model(tokens[:, 4:], None), rtol=0, atol=1e-12)


def test_counts_are_those_of_the_weights() -> None:
    model = Transformer(GQA, LocalDispatcher(GQA.num_routed_experts), torch.float64)
    account = count_parameters(replace(GQA, mtp_depth=0))
    names = [name for name in dict(model.named_parameters()) if ".layers.4." not in name]
    assert sum(dict(model.named_parameters())[name].numel() for name in names) == account.total
    layer = {name: weight for name, weight in named_tensors(model).items() if "layers.0.self_attn" in name}
    assert sum(weight.numel() for weight in layer.values()) == attention_parameters(GQA)
    shapes = {f"model.layers.0.self_attn.{name}.weight": shape for name, shape in GQA.attention_weights}
    assert {name: tuple(weight.shape) for name, weight in layer.items()} == shapes


def test_what_it_does_not_support_is_refused(tmp_path: object) -> None:
    config = tiny_config(tmp_path, model=GQA)  # type: ignore[arg-type]
    check_rules(config)
    with pytest.raises(ConfigError, match=r"^schedule\.slices: must be 1 with model\.attention=gqa"):
        check_rules(replace(config, schedule=replace(config.schedule, slices=2)))
    with pytest.raises(ConfigError, match=r"^model\.num_kv_heads: must divide model\.num_heads=2"):
        check_model(replace(GQA, num_kv_heads=3))
