"""The implementation of the FP8 kernels is chosen by argument; neither Triton nor DeepGEMM is loaded for others."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import kernels.gemm_fp8.deep_gemm as adapter
import kernels.select_fp8 as select
from kernels.quantize.layout import GRADIENTS_MIN_AMAX
from kernels.select_fp8 import Fp8Implementation, Fp8Kernels, fp8_implementation_for, fp8_kernels
from tests.kernels.deep_gemm_emulation import Calls, emulated
from tests.kernels.plain import randn

ROOT = Path(__file__).resolve().parents[2]
IMPLEMENTATIONS: tuple[Fp8Implementation, ...] = ("reference", "triton", "deep_gemm")


@pytest.fixture(autouse=True)
def _probed_again() -> Iterator[None]:
    """What devices were found to have is found out anew, before a test and after it."""
    select._has_deep_gemm.cache_clear()
    yield
    select._has_deep_gemm.cache_clear()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_select_gives_the_functions_of_their_names(implementation: Fp8Implementation) -> None:
    found = fp8_kernels(implementation)
    for field in fields(Fp8Kernels):
        function = getattr(found, field.name)
        assert function.__name__ == field.name
        is_reference = ".reference" in function.__module__
        assert is_reference == (implementation == "reference"), field.name


def test_select_keeps_what_was_found_out_by_a_tuner() -> None:
    assert fp8_kernels("triton") is fp8_kernels("triton")
    assert fp8_kernels("deep_gemm").quantize_1x128 is fp8_kernels("triton").quantize_1x128


@pytest.mark.parametrize(
    ("device", "is_installed", "capability", "expected"),
    [
        ("cpu", True, (9, 0), "reference"),
        ("meta", True, (9, 0), "reference"),
        ("cuda:1", True, (9, 0), "deep_gemm"),
        ("cuda:1", False, (9, 0), "triton"),
        ("cuda", True, (10, 0), "triton"),
    ],
)
def test_select_names_what_suits_a_device(
    device: str, is_installed: bool, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "find_spec", lambda name: name if is_installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fp8_implementation_for(torch.device(device)) == expected


def test_products_of_an_emulated_deep_gemm_are_the_reference_s(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setitem(sys.modules, "deep_gemm", emulated(calls))
    run, reference = fp8_kernels("deep_gemm"), fp8_kernels("reference")
    rows_AK, grad_AN = randn(130, 256, seed=0).float(), randn(130, 192, seed=1).float()
    weight = reference.quantize_128x128(randn(192, 256, seed=2).float(), False)
    rows = reference.quantize_1x128(rows_AK, False)
    made_AN = run.gemm_fp8(rows, weight, torch.bfloat16)
    torch.testing.assert_close(made_AN, reference.gemm_fp8(rows, weight, torch.bfloat16), rtol=2.0**-7, atol=2.0**-7)
    grad = reference.quantize_columns(grad_AN, [130], False, GRADIENTS_MIN_AMAX)
    columns = reference.requantize_columns(rows, [130], False)
    made_NK = run.gemm_fp8_columns(grad, columns)
    torch.testing.assert_close(made_NK, reference.gemm_fp8_columns(grad, columns), rtol=1e-4, atol=1e-3)
    assert (calls.num_blocks, calls.num_rows) == (1, 1)


def test_select_loads_nothing_for_the_reference() -> None:
    code = (
        "import sys, torch, kernels.select_fp8 as select\n"
        "select.fp8_kernels(select.fp8_implementation_for(torch.device('cpu')))\n"
        "assert 'triton' not in sys.modules and 'deep_gemm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
