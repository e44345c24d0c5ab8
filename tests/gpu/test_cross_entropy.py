"""Triton's cross-entropy on a CUDA device, near the formula on the CPU."""

import pytest
import torch

import kernels.cross_entropy.triton as module
from tests.kernels.agreement import assert_same_bits
from tests.kernels.agreement_fused import check_cross_entropy, check_kept, check_slopes, some_targets
from tests.kernels.plain import randn

DTYPES = [torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 1), (7, 11), (6, 128), (200, 20_011), (150, 129_280)])
def test_slopes_on_the_gpu_are_near_the_formula(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_slopes(module, "cuda", shape, dtype)


@pytest.mark.parametrize("has_slopes", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_logits", [1, 2**20, 2**27])
@pytest.mark.parametrize("shape", [(7, 8, 16), (33, 16, 304), (150, 8, 20_016)])
def test_cross_entropy_on_the_gpu_is_near_the_formula(
    shape: tuple[int, int, int], chunk_logits: int, dtype: torch.dtype, has_slopes: bool
) -> None:
    check_cross_entropy(module, "cuda", shape, dtype, chunk_logits, has_slopes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_among_kept_tokens_on_the_gpu_is_near_the_formula(dtype: torch.dtype) -> None:
    check_kept(module, "cuda", (150, 8, 20_016), dtype)


def test_cross_entropy_on_the_gpu_repeats_itself_bit_by_bit() -> None:
    rows_ND, head_VD = (randn(*size, seed=0, dtype=torch.bfloat16).cuda() for size in ((500, 256), (20_016, 256)))
    targets_N = some_targets(500, 20_016).cuda()

    def made() -> list[torch.Tensor]:
        found = module.linear_cross_entropy(rows_ND, head_VD, targets_N, wants_rows=True, wants_head=True)
        return [each for each in (found.log_probs_N, found.rows_ND, found.head_VD) if each is not None]

    first = [each.cpu() for each in made()]
    for _ in range(5):
        for again, expected in zip(made(), first, strict=True):
            assert_same_bits(again, expected)
