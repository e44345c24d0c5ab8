"""Checks of the SwiGLU, RMSNorm and cross-entropy kernels on any device: as close as float32 allows.

Exponents and the order of sums differ between libraries in its last places. Shape legend: A rows, D columns,
M intermediate size, H = 2 M, N rows, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

import kernels.rms_norm.reference as rms_norm_reference
import kernels.swiglu.reference as swiglu_reference
from kernels.cross_entropy.reference import IGNORE, RowScores
from kernels.quantize.layout import Quantized
from tests.kernels.agreement import assert_same_bits
from tests.kernels.plain import cross_entropies, near, randn

EPS = 1e-6


def padded(x: Tensor, columns: int = 16) -> Tensor:
    """Returns the same numbers as a part of wider rows, whose other columns are NaN."""
    wide = x.new_full((x.shape[0], x.shape[1] + columns), torch.nan)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def assert_codes_near(actual: Quantized, expected: Quantized, share: float = 1e-3) -> None:
    """Scales near to the last places of float32, codes equal but for a neighbor in a tiny share of places."""
    scales = actual.scales.cpu()
    assert scales.dtype == torch.float32
    torch.testing.assert_close(scales, expected.scales, rtol=2.0**-18, atol=0, equal_nan=True)
    assert actual.codes.dtype == torch.float8_e4m3fn
    steps = (_ordinals(actual.codes.cpu()) - _ordinals(expected.codes)).abs()
    assert int(steps.max() if steps.numel() else 0) <= 1
    assert int(steps.sum()) <= 1 + share * steps.numel()


def _ordinals(codes: Tensor) -> Tensor:
    """Places of codes in the order of their values; zeros of both signs have one."""
    bits = codes.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


def hidden_and_grad(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns hidden_AH, whose magnitudes change along and across rows, and grad_AM."""
    num_rows, width = shape
    hidden_AH = randn(num_rows, 2 * width, seed=0) * 3 * torch.logspace(-2, 0.5, 2 * width)
    hidden_AH *= torch.logspace(-3, 0, num_rows)[:, None]
    return hidden_AH.to(dtype), randn(num_rows, width, seed=1, dtype=dtype)


def check_swiglu(module: ModuleType, device: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Checks `swiglu` and `swiglu_backward`, contiguous and strided, against the reference in float64."""
    hidden_AH, grad_AM = hidden_and_grad(shape, dtype)
    expected_AM = swiglu_reference.swiglu(*hidden_AH.double().chunk(2, 1))
    expected_AH = swiglu_reference.swiglu_backward(grad_AM.double(), hidden_AH.double())
    for hidden, grad in ((hidden_AH, grad_AM), (padded(hidden_AH), padded(grad_AM, 3))):
        there, grad_there = hidden.to(device), grad.to(device)
        made_AM = module.swiglu(*there.split(shape[1], 1))
        made_AH = module.swiglu_backward(grad_there, there)
        assert made_AM.dtype == made_AH.dtype == dtype
        near(made_AM.cpu(), expected_AM, 1)
        near(made_AH.cpu(), expected_AH, 1)


def check_swiglu_fp8(
    module: ModuleType, device: str, shape: tuple[int, int], dtype: torch.dtype, weights_dtype: torch.dtype | None
) -> None:
    """Checks `swiglu_quantize` and `swiglu_backward_from_codes` against the reference.

    The codes of hidden values must be bit-equal.
    """
    hidden_AH, grad_AM = hidden_and_grad(shape, dtype)
    weights_A = None if weights_dtype is None else randn(shape[0], seed=2).abs().to(weights_dtype)
    weights_there = None if weights_A is None else weights_A.to(device)
    for power_of_two in (False, True):
        gated, cached = swiglu_reference.swiglu_quantize(hidden_AH, weights_A, power_of_two=power_of_two)
        made_gated, made_cached = module.swiglu_quantize(
            padded(hidden_AH).to(device), weights_there, power_of_two=power_of_two
        )
        assert_same_bits(made_cached.codes, cached.codes)
        assert_same_bits(made_cached.scales, cached.scales)
        assert_codes_near(made_gated, gated)
    there = Quantized(cached.codes.to(device), cached.scales.to(device))
    expected = swiglu_reference.swiglu_backward_from_codes(grad_AM.double(), cached, weights_A)
    grad_hidden_AH, gated_AM, grad_weights_A = module.swiglu_backward_from_codes(
        padded(grad_AM, 8).to(device), there, weights_there
    )
    assert grad_hidden_AH.dtype == gated_AM.dtype == dtype
    near(grad_hidden_AH.cpu(), expected[0], 1)
    near(gated_AM.cpu(), expected[1], 1)
    assert (grad_weights_A is None) == (expected[2] is None) == (weights_A is None)
    if grad_weights_A is not None and expected[2] is not None:
        assert grad_weights_A.dtype == torch.float32
        near(grad_weights_A.cpu(), expected[2].double(), 2)


def norm_inputs(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x_AD with a row of zeros, weight_D with a zero and a negative number, and grad_AD."""
    x_AD, weight_D = randn(*shape, seed=0) * torch.logspace(-3, 2, shape[0])[:, None], randn(shape[1], seed=1) + 2
    x_AD[1:2] = 0
    weight_D[1:2], weight_D[2:3] = 0, -1.5
    return x_AD.to(dtype), weight_D.to(dtype), randn(*shape, seed=2, dtype=dtype)


def check_rms_norm(module: ModuleType, device: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Checks `rms_norm` and `normalize_backward`, contiguous and strided, against the reference."""
    x_AD, weight_D, grad_AD = norm_inputs(shape, dtype)
    scale_A1 = rms_norm_reference.inverse_rms(x_AD, EPS)
    normal_AD = rms_norm_reference.normalize(x_AD, scale_A1, weight_D)
    wide = grad_AD.double(), x_AD.double(), scale_A1.double(), weight_D.double()
    expected_x, expected_weight = rms_norm_reference.normalize_backward(*wide)
    slopes = float((wide[0] * wide[3] * wide[2]).abs().max())
    for x, grad in ((x_AD, grad_AD), (padded(x_AD), padded(grad_AD, 3))):
        made, inverse = module.rms_norm(x.to(device), weight_D.to(device), EPS)
        assert (made.dtype, inverse.dtype, inverse.shape) == (dtype, scale_A1.dtype, scale_A1.shape)
        near(inverse.cpu(), scale_A1.double(), 4)
        near(made.cpu(), normal_AD.double(), 4)
        assert float((made.cpu() != normal_AD).double().mean()) < 0.02 or dtype != torch.bfloat16
        inputs = (grad.to(device), x.to(device), scale_A1.to(device), weight_D.to(device))
        made_x, made_weight = module.normalize_backward(*inputs)
        assert (made_x.dtype, made_weight.dtype) == (dtype, dtype)
        near(made_x.cpu(), expected_x, 2, largest=slopes)
        near(made_weight.cpu(), expected_weight, 2)


def check_rms_norm_fp8(module: ModuleType, device: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Checks `rms_norm_quantize` and `rms_norm_backward_from_codes` against the reference."""
    x_AD, weight_D, grad_AD = norm_inputs(shape, dtype)
    for power_of_two in (True, False):
        normal, inverse_A1 = rms_norm_reference.rms_norm_quantize(x_AD, weight_D, EPS, power_of_two=power_of_two)
        made, inverse = module.rms_norm_quantize(
            padded(x_AD).to(device), weight_D.to(device), EPS, power_of_two=power_of_two
        )
        near(inverse.cpu(), inverse_A1.double(), 4)
        assert_codes_near(made, normal)
    there = Quantized(normal.codes.to(device), normal.scales.to(device))
    expected = rms_norm_reference.rms_norm_backward_from_codes(grad_AD.double(), normal, inverse_A1, weight_D)
    made_x, made_weight = module.rms_norm_backward_from_codes(
        padded(grad_AD, 8).to(device), there, inverse_A1.to(device), weight_D.to(device)
    )
    assert (made_x.dtype, made_weight.dtype) == (dtype, torch.float32)
    near(made_x.cpu(), expected[0], 1, largest=float((grad_AD * weight_D * inverse_A1).abs().max()))
    near(made_weight.cpu(), expected[1].double(), 4)


def some_targets(num_rows: int, vocab_size: int) -> Tensor:
    """Returns targets: a third is ignored, and the first and the last token occur among the others."""
    targets_N = torch.randint(0, vocab_size, (num_rows,), generator=torch.Generator().manual_seed(9))
    targets_N[1::3] = IGNORE
    targets_N[:1], targets_N[3:4] = vocab_size - 1, 0
    return targets_N


def expected_of(
    rows_ND: Tensor, head_VD: Tensor, targets_N: Tensor, slopes_N: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log-probabilities and gradients in rows and head, by the formula over whole logits in float64."""
    rows_ND, head_VD = rows_ND.detach().double().requires_grad_(), head_VD.detach().double().requires_grad_()
    nats_N = cross_entropies(rows_ND @ head_VD.t(), targets_N)
    total = nats_N.sum() if slopes_N is None else (nats_N * slopes_N.double()).sum()
    grad_rows, grad_head = torch.autograd.grad(total, (rows_ND, head_VD))
    return -nats_N.detach(), grad_rows, grad_head


def some_slopes(num_rows: int, dtype: torch.dtype) -> Tensor:
    """Returns slopes of both signs, every fourth one zero, in the type that `linear_cross_entropy` requires."""
    slopes_N = randn(num_rows, seed=7).to(torch.promote_types(dtype, torch.float32))
    slopes_N[::4] = 0
    return slopes_N


def check_cross_entropy(
    module: ModuleType,
    device: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    chunk_logits: int,
    has_slopes: bool = False,
) -> None:
    """Checks `linear_cross_entropy` of N rows of D columns over a vocabulary against the formula in float64."""
    num_rows, num_columns, vocab_size = shape
    rows_ND, head_VD = randn(num_rows, num_columns, seed=0), randn(vocab_size, num_columns, seed=1)
    rows_ND, head_VD = (rows_ND * 2).to(dtype), head_VD.to(dtype)
    targets_N = some_targets(num_rows, vocab_size)
    rows_ND[1::3] = torch.nan
    slopes_N = some_slopes(num_rows, dtype) if has_slopes else None
    expected = expected_of(rows_ND.nan_to_num(), head_VD, targets_N, slopes_N)
    found = module.linear_cross_entropy(
        rows_ND.to(device),
        head_VD.to(device),
        targets_N.to(device),
        None if slopes_N is None else slopes_N.to(device),
        wants_rows=True,
        wants_head=True,
        chunk_logits=chunk_logits,
    )
    assert (found.rows_ND.dtype, found.head_VD.dtype) == (dtype, torch.promote_types(dtype, torch.float32))
    assert not found.rows_ND[1::3].any()
    if dtype == torch.bfloat16:
        # A logit's rounding, at most 2^-8 of about 16, moves its chance by 6 %.
        tolerance = 0.04
        assert float((found.log_probs_N.double().cpu() - expected[0]).abs().max()) <= 16 * 2.0**-8
    else:
        tolerance = 1e-11 if dtype == torch.float64 else 1e-5
        made_N = found.log_probs_N.double().cpu()
        torch.testing.assert_close(made_N, expected[0], rtol=tolerance, atol=tolerance)
    for made, wanted in ((found.rows_ND, expected[1]), (found.head_VD, expected[2])):
        assert float((made.double().cpu() - wanted).norm()) <= tolerance * float(wanted.norm())


def assert_same_scores(found: RowScores, expected: RowScores) -> None:
    """Asserts log-probabilities and gradients of the same bits."""
    for name in ("log_probs_N", "rows_ND", "head_VD"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def check_wants(linear_cross_entropy: Callable[..., RowScores], num_rows: int, vocab_size: int) -> None:
    """Checks that gradients wanted alone are those wanted together, and that nothing wanted gives nothing."""
    rows, head = randn(num_rows, 3, seed=0), randn(vocab_size, 3, seed=1)
    targets = some_targets(num_rows, vocab_size)
    both = linear_cross_entropy(rows, head, targets, wants_rows=True, wants_head=True)
    assert num_rows or not (both.log_probs_N.any() or both.head_VD.any())  # type: ignore[union-attr]
    for wants_rows, wants_head in ((False, False), (True, False), (False, True)):
        found = linear_cross_entropy(rows, head, targets, wants_rows=wants_rows, wants_head=wants_head)
        assert (found.rows_ND is not None, found.head_VD is not None) == (wants_rows, wants_head)
        present = {name: part for name in ("rows_ND", "head_VD") if (part := getattr(found, name)) is not None}
        assert_same_scores(replace(both, **present), both)
        assert torch.equal(found.log_probs_N, both.log_probs_N)


def some_kept_ids(targets_N: Tensor, vocab_size: int, num_kept: int) -> Tensor:
    """Returns kept tokens, each row's target among them, of different numbers; every fifth row keeps all."""
    generator = torch.Generator().manual_seed(11)
    kept_NK = torch.rand(len(targets_N), vocab_size, generator=generator).argsort(1)[:, :num_kept]
    kept_NK[:, num_kept // 2 :][torch.arange(len(targets_N)) % 2 == 0] = -1
    kept_NK[:, 0] = torch.where(targets_N == IGNORE, kept_NK[:, 0], targets_N)
    kept_NK[4::5] = -1
    return kept_NK


def check_kept(module: ModuleType, device: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Checks `linear_cross_entropy` among kept tokens against the formula over whole logits in float64."""
    num_rows, num_columns, vocab_size = shape
    rows_ND, head_VD = randn(num_rows, num_columns, seed=0, dtype=dtype), randn(vocab_size, num_columns, seed=1)
    head_VD, targets_N = head_VD.to(dtype), some_targets(num_rows, vocab_size)
    kept_NK, slopes_N = some_kept_ids(targets_N, vocab_size, 6), some_slopes(num_rows, dtype)
    is_kept_NV = (kept_NK[:, :, None] == torch.arange(vocab_size)).any(1) | (kept_NK < 0).all(1)[:, None]
    wide = [each.detach().double().requires_grad_() for each in (rows_ND, head_VD)]
    logits_NV = (wide[0] @ wide[1].t()).masked_fill(~is_kept_NV, -torch.inf)
    counted = targets_N != IGNORE
    nats_N = cross_entropies(logits_NV[counted], targets_N[counted])
    expected = torch.autograd.grad((nats_N * slopes_N[counted].double()).sum(), wide)
    given = [each.to(device) for each in (rows_ND, head_VD, targets_N, slopes_N)]
    found = module.linear_cross_entropy(*given, wants_rows=True, wants_head=True, kept_ids_NK=kept_NK.to(device))
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.04}[dtype]
    log_probs_N = found.log_probs_N.double().cpu()
    assert not log_probs_N[~counted].any()
    torch.testing.assert_close(log_probs_N[counted], -nats_N.detach(), rtol=tolerance, atol=tolerance)
    for made, wanted in ((found.rows_ND, expected[0]), (found.head_VD, expected[1])):
        assert float((made.double().cpu() - wanted).norm()) <= tolerance * float(wanted.norm())


def check_slopes(module: ModuleType, device: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Checks `nats_and_slopes_` of strided logits far from 0 against the formula in float64."""
    logits_NV = (randn(*shape, seed=0) * 5 + torch.linspace(-1000, 1000, shape[0])[:, None]).to(dtype)
    logits_NV[2:3, 2::2] = -torch.inf
    targets_N = some_targets(*shape)
    targets_N[2:3] = 0
    expected_N = cross_entropies(logits_NV.double(), targets_N)
    counted_N1 = (targets_N != IGNORE)[:, None]
    chances_NV = logits_NV.double().softmax(1)
    expected_NV = chances_NV.scatter_add(1, targets_N.clamp(min=0)[:, None], -torch.ones(shape[0], 1).double())
    nats_N = torch.empty(shape[0], dtype=torch.promote_types(dtype, torch.float32), device=device)
    made_NV = padded(logits_NV).to(device)
    before_NV = made_NV.clone()
    module.nats_and_slopes_(made_NV, targets_N.to(device), nats_N, False)
    assert torch.equal(made_NV, before_NV)
    first_N = nats_N.clone()
    module.nats_and_slopes_(made_NV, targets_N.to(device), nats_N, True)
    assert torch.equal(first_N, nats_N)
    near(nats_N.cpu(), expected_N, 4, largest=16)
    near(made_NV.cpu(), expected_NV * counted_N1, 1, largest=1)
