"""Anchors of rotary embedding and YaRN from the released configuration."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from model.attention.rope import inverse_frequencies, rotate, rotation_table, softmax_scale
from model.config import RopeScaling, YarnRope
from model.hf.config import write_config
from tests.tiny import MODEL

YARN = YarnRope(
    kind="yarn",
    factor=40.0,
    original_max_position_tokens=4096,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
)
V3 = replace(MODEL, qk_rope_head_dim=64, qk_nope_head_dim=128, rope_scaling=YARN)


def test_yarn_frequencies_equal_anchors() -> None:
    frequencies = inverse_frequencies(V3)
    anchors = {0: 1.0, 10: 0.0562341, 15: 0.00833451, 20: 7.90569e-4, 23: 3.3338e-5, 31: 3.3338e-6}
    for pair, value in anchors.items():
        assert float(frequencies[pair]) == pytest.approx(value, rel=1e-5)


def test_yarn_softmax_scale_equals_anchor() -> None:
    assert softmax_scale(V3) == pytest.approx(0.1352338, rel=1e-6)
    assert softmax_scale(replace(V3, rope_scaling=MODEL.rope_scaling)) == pytest.approx(192**-0.5, rel=1e-12)


def test_yarn_leaves_cos_unscaled() -> None:
    cos, _ = rotation_table(V3, 1, torch.float64)
    assert torch.equal(cos, torch.ones_like(cos))


def test_rotation_scores_depend_on_distance_alone() -> None:
    cos, sin = rotation_table(MODEL, 32, torch.float64)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 4, generator=generator, dtype=torch.float64)
    turned_query = rotate(query.expand(1, 32, 1, 4), cos, sin)[0, :, 0]
    turned_key = rotate(key.expand(1, 32, 1, 4), cos, sin)[0, :, 0]
    scores = turned_query @ turned_key.T
    for distance in range(31):
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-12, atol=1e-13)


def test_rotation_is_the_complex_product_of_interleaved_pairs() -> None:
    cos, sin = rotation_table(MODEL, 3, torch.float64)
    x = torch.arange(12.0, dtype=torch.float64).view(1, 3, 1, 4)
    turned = rotate(x, cos, sin)
    for position in range(3):
        for pair in range(2):
            angle = position * 10000.0 ** (-pair / 2)
            value = complex(x[0, position, 0, 2 * pair], x[0, position, 0, 2 * pair + 1])
            expected = value * complex(math.cos(angle), math.sin(angle))
            assert complex(turned[0, position, 0, 2 * pair], turned[0, position, 0, 2 * pair + 1]) == pytest.approx(
                expected, rel=1e-12
            )


@pytest.mark.parametrize("first", [0, 1, 2, 3])
@pytest.mark.parametrize("width", [8, 9])
def test_rotation_takes_a_part_of_a_single_row_from_any_place(first: int, width: int) -> None:
    cos, sin = rotation_table(MODEL, 3, torch.float32)
    row = torch.randn(1, 1, 1, width, generator=torch.Generator().manual_seed(0))
    part = row[..., first : first + 4]
    assert torch.equal(rotate(part, cos[2:], sin[2:]), rotate(part.clone(), cos[2:], sin[2:]))


@pytest.mark.parametrize("scaling", [MODEL.rope_scaling, YARN, replace(YARN, factor=8.0, mscale=0.0)])
def test_tables_in_float32_are_those_of_transformers_to_the_bit(scaling: RopeScaling) -> None:
    """A last bit of a frequency is 1e-3 radians after 20,000 positions."""
    model = replace(V3, rope_scaling=scaling, max_position_tokens=32768)
    keys = write_config(model, dtype="F32", fp8=False)
    reference = DeepseekV3RotaryEmbedding(DeepseekV3Config(**keys))
    expected = reference(torch.empty(1, dtype=torch.float32), torch.arange(20_000)[None])
    for table, both_halves in zip(rotation_table(model, 20_000, torch.float32), expected, strict=True):
        assert torch.equal(table, both_halves[0, :, :32])
