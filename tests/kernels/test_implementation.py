"""The implementation of an operation is chosen by argument; neither Triton nor DeepGEMM is loaded for another one."""

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels.implementation as implementation
from kernels.gemm_fp8 import gemm_fp8, gemm_fp8_columns
from kernels.implementation import Implementation, choose_implementation, choose_product_implementation, has_deep_gemm
from kernels.quantize import quantize_1x128, quantize_128x128, quantize_columns, requantize_columns
from kernels.quantize.layout import GRADIENTS_MIN_AMAX
from tests.kernels.deep_gemm_emulation import Calls, emulated
from tests.kernels.fp8_functions import FP8_FUNCTIONS
from tests.kernels.plain import randn

ROOT = Path(__file__).resolve().parents[2]
PLAIN_FUNCTIONS = {
    "permute": ("kernels.permute.reference", "kernels.permute.triton"),
    "unpermute": ("kernels.permute.reference", "kernels.permute.triton"),
    "dequantize_1x128": ("kernels.quantize.reference", "kernels.quantize.triton"),
    "rms_norm": ("kernels.rms_norm.reference", "kernels.rms_norm.triton"),
    "normalize_backward": ("kernels.rms_norm.reference", "kernels.rms_norm.triton"),
    "swiglu": ("kernels.swiglu.reference", "kernels.swiglu.triton"),
    "swiglu_backward": ("kernels.swiglu.reference", "kernels.swiglu.triton"),
    "linear_cross_entropy": ("kernels.cross_entropy.reference", "kernels.cross_entropy.triton"),
    "grouped_rows": ("kernels.grouped_gemm.reference", "kernels.grouped_gemm.triton"),
    "grouped_weight": ("kernels.grouped_gemm.reference", "kernels.grouped_gemm.triton"),
    "adamw_bf16_moments": ("kernels.adamw.reference", "kernels.adamw.triton"),
}
FUNCTIONS = PLAIN_FUNCTIONS | {
    name: modules for name, modules in FP8_FUNCTIONS.items() if not modules[1].endswith("tuned")
}


@pytest.fixture(autouse=True)
def _probed_again() -> Iterator[None]:
    """Clears the cached properties of devices before and after a test."""
    has_deep_gemm.cache_clear()
    yield
    has_deep_gemm.cache_clear()


class Operand:
    """Stands for a tensor, or for codes and scales, on a device."""

    def __init__(self, device: str) -> None:
        self.device, self.shape, self.codes = torch.device(device), (4, 4), self

    def stride(self, dim: int) -> int:
        return 1


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("device", "wanted", "is_reference"),
    [
        ("cpu", None, True),
        ("cuda:1", None, False),
        ("meta", None, True),
        ("cuda", "reference", True),
        ("cpu", "triton", False),
        ("cpu", "deep_gemm", False),
    ],
)
def test_a_function_runs_in_the_implementation_asked_for_or_in_that_of_the_device(
    name: str, device: str, wanted: Implementation | None, is_reference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, compiled = (import_module(path) for path in FUNCTIONS[name])
    public = getattr(import_module(FUNCTIONS[name][0].rpartition(".")[0]), name)
    given: list[tuple[str, tuple[object, ...]]] = []
    monkeypatch.setattr(reference, name, lambda *args, **options: given.append(("reference", args)))
    monkeypatch.setattr(compiled, name, lambda *args, **options: given.append(("triton", args)))
    parameters = [each for each in signature(public).parameters.values() if each.name != "implementation"]
    operands = [Operand(device) for each in parameters if each.kind == each.POSITIONAL_OR_KEYWORD]
    options = {each.name: False for each in parameters if each.kind == each.KEYWORD_ONLY}
    public(*operands, **options, implementation=wanted)
    assert given == [("reference" if is_reference else "triton", tuple(operands))]


@pytest.mark.parametrize(("device", "expected"), [("cuda:3", "triton"), ("cpu", "reference"), ("meta", "reference")])
def test_triton_is_for_cuda_alone(device: str, expected: str) -> None:
    assert choose_implementation(torch.device(device)) == expected


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
def test_products_are_those_that_suit_a_device(
    device: str, is_installed: bool, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implementation, "find_spec", lambda name: name if is_installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_product_implementation(torch.device(device)) == expected


@pytest.mark.parametrize("name", ["gemm_fp8", "grouped_gemm"])
def test_products_keep_what_was_found_out_by_a_tuner(name: str) -> None:
    package = import_module(f"kernels.{name}")
    assert package._products("triton") is package._products("triton")
    assert package._products("reference").__name__.startswith(f"kernels.{name}.reference")


def test_products_of_an_emulated_deep_gemm_are_the_reference_s(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setitem(sys.modules, "deep_gemm", emulated(calls))
    rows_AK, grad_AN = randn(130, 256, seed=0).float(), randn(130, 192, seed=1).float()
    weight = quantize_128x128(randn(192, 256, seed=2).float(), power_of_two=False)
    rows = quantize_1x128(rows_AK, power_of_two=False)
    made_AN = gemm_fp8(rows, weight, torch.bfloat16, implementation="deep_gemm")
    torch.testing.assert_close(made_AN, gemm_fp8(rows, weight, torch.bfloat16), rtol=2.0**-7, atol=2.0**-7)
    grad = quantize_columns(grad_AN, [130], power_of_two=False, min_amax=GRADIENTS_MIN_AMAX)
    columns = requantize_columns(rows, [130], power_of_two=False)
    made_TK: Tensor = gemm_fp8_columns(grad, columns, implementation="deep_gemm")
    torch.testing.assert_close(made_TK, gemm_fp8_columns(grad, columns), rtol=1e-4, atol=1e-3)
    assert (calls.num_blocks, calls.num_rows) == (1, 1)


def test_the_reference_loads_neither_triton_nor_deep_gemm() -> None:
    code = (
        "import sys, torch\n"
        "from kernels.gemm_fp8 import gemm_fp8\n"
        "from kernels.permute import permute\n"
        "from kernels.quantize import quantize_1x128, quantize_128x128\n"
        "permute(torch.ones(2, 3), torch.zeros(1, dtype=torch.int64))\n"
        "rows, weight = torch.ones(2, 3), torch.ones(2, 3)\n"
        "left, right = quantize_1x128(rows, power_of_two=True), quantize_128x128(weight, power_of_two=True)\n"
        "gemm_fp8(left, right, torch.float32)\n"
        "assert 'triton' not in sys.modules and 'deep_gemm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_choosing_loads_no_torch() -> None:
    operations = [path.parent.name for path in (ROOT / "kernels").glob("*/reference.py")]
    code = f"import sys, {', '.join(f'kernels.{name}' for name in operations)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
