"""Operands of the fused kernels and of permutations that do not fit each other, refused in words by both
implementations: torch would spread some over others, and a kernel read or write beyond them."""

from types import ModuleType

import pytest
import torch

import kernels.permute.reference as permute
import kernels.permute.triton as compiled_permute
import kernels.rms_norm.reference as norm
import kernels.rms_norm.reference_fp8 as norm_fp8
import kernels.rms_norm.triton as compiled_norm
import kernels.rms_norm.triton_fp8 as compiled_norm_fp8
import kernels.swiglu.reference as gate
import kernels.swiglu.reference_fp8 as gate_fp8
import kernels.swiglu.triton as compiled_gate
import kernels.swiglu.triton_fp8 as compiled_gate_fp8

EPS = 1e-6


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape)


@pytest.mark.parametrize("module", [gate, compiled_gate])
def test_operands_of_a_gate_that_do_not_fit_are_named(module: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"^swiglu: up must be \[3, 8\], got \[1, 8\]$"):
        module.swiglu(ones(3, 8), ones(1, 8))
    with pytest.raises(ValueError, match=r"^swiglu: up must be torch.float32, .*, got torch.bfloat16$"):
        module.swiglu(ones(3, 8), ones(3, 8).bfloat16())
    with pytest.raises(ValueError, match=r"^swiglu: up must be on cpu, .*, got meta$"):
        module.swiglu(ones(3, 8), ones(3, 8).to("meta"))
    with pytest.raises(ValueError, match=r"^swiglu_backward: hidden_AH must be \[1, 16\], got \[3, 16\]$"):
        module.swiglu_backward(ones(1, 8), ones(3, 16))


@pytest.mark.parametrize("module", [gate_fp8, compiled_gate_fp8])
def test_operands_of_a_gate_in_fp8_that_do_not_fit_are_named(module: ModuleType) -> None:
    _, hidden = gate_fp8.swiglu_quantize(ones(3, 400), None, power_of_two=True)
    with pytest.raises(ValueError, match=r"^swiglu_quantize: weights_A must be \[3\], got \[1\]$"):
        module.swiglu_quantize(ones(3, 400), ones(1), power_of_two=True)
    place = "^swiglu_backward_from_codes"
    with pytest.raises(ValueError, match=rf"{place}: weights_A must be \[3\], got \[1\]$"):
        module.swiglu_backward_from_codes(ones(3, 200), hidden, ones(1))
    with pytest.raises(ValueError, match=rf"{place}: codes must be \[4, 400\], got \[3, 400\]$"):
        module.swiglu_backward_from_codes(ones(4, 200), hidden, None)
    with pytest.raises(ValueError, match=rf"{place}: scales must be \[3, 4\], got \[3, 1\]$"):
        module.swiglu_backward_from_codes(ones(3, 200), hidden._replace(scales=hidden.scales[:, :1]), None)


@pytest.mark.parametrize("module", [norm, compiled_norm])
def test_operands_of_a_norm_that_do_not_fit_are_named(module: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"^rms_norm: weight_D must be \[8\], got \[1\]$"):
        module.rms_norm(ones(3, 8), ones(1), EPS)
    for grad, scale, weight_D, rule in (
        (ones(2, 8), ones(3, 1), ones(8), r"grad must be \[3, 8\], got \[2, 8\]"),
        (ones(3, 8), ones(1, 1), ones(8), r"scale must be \[3, 1\], got \[1, 1\]"),
        (ones(3, 8), ones(3, 1), ones(1), r"weight_D must be \[8\], got \[1\]"),
    ):
        with pytest.raises(ValueError, match=f"^normalize_backward: {rule}$"):
            module.normalize_backward(grad, ones(3, 8), scale, weight_D)


@pytest.mark.parametrize("module", [norm_fp8, compiled_norm_fp8])
def test_operands_of_a_norm_in_fp8_that_do_not_fit_are_named(module: ModuleType) -> None:
    normal, inverse_A1 = norm_fp8.rms_norm_quantize(ones(3, 200), ones(200), EPS, power_of_two=True)
    with pytest.raises(ValueError, match=r"^rms_norm_quantize: weight_D must be \[200\], got \[1\]$"):
        module.rms_norm_quantize(ones(3, 200), ones(1), EPS, power_of_two=True)
    for given, rule in (
        ((ones(4, 200), normal, inverse_A1), r"codes must be \[4, 200\], got \[3, 200\]"),
        ((ones(3, 200), normal._replace(scales=normal.scales[:, :1]), inverse_A1), r"scales must be \[3, 2\], got"),
        ((ones(3, 200), normal, inverse_A1[:1]), r"inverse_A1 must be \[3, 1\], got \[1, 1\]"),
    ):
        with pytest.raises(ValueError, match=f"^rms_norm_backward_from_codes: {rule}"):
            module.rms_norm_backward_from_codes(*given, ones(200))


@pytest.mark.parametrize("module", [permute, compiled_permute])
def test_operands_of_a_permutation_that_do_not_fit_are_named(module: ModuleType) -> None:
    rows_ND, source_A = ones(3, 8), torch.tensor([2, 0])
    for out_AD, rule in (
        (ones(3, 8), r"out_AD must be \[2, 8\], got \[3, 8\]"),
        (ones(2, 8).bfloat16(), "out_AD must be torch.float32, .*, got torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=f"^permute: {rule}$"):
            module.permute(rows_ND, source_A, out_AD)
    with pytest.raises(ValueError, match=r"^permute: source_A must be int32 or int64 of 1 dimensions"):
        module.permute(rows_ND, source_A.float())
    with pytest.raises(ValueError, match=r"^unpermute: places_TK must be int32 or int64 of 2 dimensions"):
        module.unpermute(rows_ND, source_A)
    with pytest.raises(ValueError, match=r"^unpermute: rows_AD must be floating point, got torch.int32"):
        module.unpermute(rows_ND.int(), source_A[None])
