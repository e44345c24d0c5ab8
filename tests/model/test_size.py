"""Counts of weights against released checkpoints and built models; slices of equal work."""

from dataclasses import astuple, replace
from functools import cache
from itertools import accumulate, pairwise

import pytest
import torch

from comm.dispatch.local import LocalDispatcher
from launch.config.run import compose_run
from model.config import MlaConfig
from model.size import count_parameters, count_work, slice_lengths, training_flops_per_token
from model.transformer import BIAS, Transformer, named_tensors
from tests.tiny import MODEL


@cache
def preset(name: str) -> MlaConfig:
    config = compose_run([f"model={name}"]).model
    assert isinstance(config, MlaConfig)
    return config


TINY = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_layers": 6,
    "num_dense_layers": 1,
    "expert_intermediate_size": 128,
    "dense_intermediate_size": 512,
}
RELEASED = {
    "v3_671b": (671_026_404_352, 37_552_282_624, 36_625_603_584, 187_107_328, 44_040_192, 11_610_067_968),
    "v2_lite_16b": (15_706_484_224, 2_661_150_208, 2_451_435_008, 13_763_072, 8_650_752),
    "moonlight_16b": (15_960_108_544, 2_914_774_528, 2_579_230_208, 13_763_072, 8_650_752),
    "glm_flash_30b": (29_943_390_976, 3_896_763_136, 3_579_568_896, 21_759_232, 9_437_184, 643_706_112),
    "qwen3_30b": (30_532_122_624, 3_353_032_704, 3_041_867_776, 18_874_624, 4_718_592),
    "quickstart": (11_546_816, 5_648_576, 4_600_000, 112_800, 98_304, 1_920_416),
}
"""Weights in the order of `ParameterAccount`'s fields: of checkpoints, and of a tiny model with `TINY`."""


@pytest.mark.parametrize("name", RELEASED)
def test_counts_equal_released_ones(name: str) -> None:
    config, expected = compose_run([f"model={name}"]).model, RELEASED[name]
    counts = count_parameters(replace(config, **TINY) if name == "quickstart" else config)  # type: ignore[arg-type]
    assert astuple(counts)[: len(expected)] == expected


def test_flops_of_v3_match_the_reported_rate() -> None:
    # 250 GFLOP a token at 4K, which with the reported speed gives 386 TFLOP/s on a GPU.
    assert training_flops_per_token(preset("v3_671b"), 4096) == pytest.approx(250e9, rel=0.005)


@pytest.mark.parametrize(
    "config",
    [
        MODEL,
        replace(MODEL, q_lora_rank=None, num_shared_experts=2),
        replace(MODEL, mtp_depth=3, num_dense_layers=0),
        replace(MODEL, mtp_depth=0, num_shared_experts=0),
    ],
)
def test_counts_equal_built_model(config: MlaConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.float32)
    named = {name: tensor.numel() for name, tensor in named_tensors(model).items() if not name.endswith(BIAS)}
    mtp_prefixes = tuple(f"model.layers.{config.num_layers + depth}." for depth in range(config.mtp_depth))
    mtp = sum(count for name, count in named.items() if mtp_prefixes and name.startswith(mtp_prefixes))
    account = count_parameters(config)
    assert account.mtp == mtp
    assert account.total == sum(named.values()) - mtp


@pytest.mark.covering(2)
@pytest.mark.parametrize("name", ["v3_671b", "quickstart"])
@pytest.mark.parametrize("length", [4096, 131072])
@pytest.mark.parametrize("slices", [1, 2, 4, 16])
def test_slices_have_equal_work(name: str, length: int, slices: int) -> None:
    model = preset(name)
    lengths = slice_lengths(model, length, slices, is_fp8=False)
    assert sum(lengths) == length
    # Work of the first x tokens: they cost x times the mean cost of a token in a sequence of x tokens.
    first = [x and x * count_work(model, x, is_fp8=False).total(model) for x in accumulate(lengths, initial=0)]
    works = [after - before for before, after in pairwise(first)]
    # A border is off by at most half a unit of 128 tokens, or of 1 if slices are short.
    last_token = works[-1] / lengths[-1]
    unit = 128 if length >= slices * 1024 else 1
    assert max(works) - min(works) <= 2 * unit * last_token + 1e-9 * first[-1]
    assert all(tokens % unit == 0 for tokens in lengths)
    # Later tokens attend to more, so later slices are not longer than earlier ones by more than the rounding.
    assert all(later <= earlier + unit for earlier, later in pairwise(lengths))


def test_every_slice_has_a_token() -> None:
    assert slice_lengths(preset("quickstart"), 5, 5, is_fp8=False) == (1, 1, 1, 1, 1)
    assert slice_lengths(preset("quickstart"), 16, 4, is_fp8=False, context=2) == (4, 4, 4, 4)
    assert slice_lengths(preset("quickstart"), 4096, 4, is_fp8=False, equal="length") == (1024,) * 4
    with pytest.raises(ValueError, match="must be in 1 to 5, the tokens of a sequence, is 6; nearest valid: 5"):
        slice_lengths(preset("quickstart"), 5, 6, is_fp8=False)
