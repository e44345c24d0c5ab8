"""An operation runs the implementation that suits its operands; Triton and DeepGEMM are not loaded for another one."""

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from inspect import signature
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels.rms_norm as norm
from kernels import operation
from kernels.gemm_fp8 import gemm_fp8, gemm_fp8_columns
from kernels.launch import without_launches
from kernels.operation import ChosenFunction, has_deep_gemm
from kernels.quantize import quantize_1x128, quantize_128x128, quantize_columns, requantize_columns
from kernels.quantize.layout import GRADIENTS_MIN_AMAX
from tests.kernels.deep_gemm_emulation import Calls, emulated
from tests.kernels.plain import randn

DEVICES = {"cpu": "reference", "meta": "reference", "cuda:1": "triton"}
ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = {
    name: function
    for folder in ("adamw", "cross_entropy", "gemm_fp8", "grouped_gemm", "permute", "quantize", "rms_norm", "swiglu")
    for name, function in vars(import_module(f"kernels.{folder}")).items()
    if isinstance(function, ChosenFunction)
}


@pytest.fixture(autouse=True)
def _probed_again() -> Iterator[None]:
    """Clears the cached properties of devices before and after a test."""
    has_deep_gemm.cache_clear()
    yield
    has_deep_gemm.cache_clear()


class Operand:
    """Stands for a tensor on a device."""

    def __init__(self, device: str, shape: tuple[int, ...] = (4, 4), stride: int = 1) -> None:
        self.device, self.shape = torch.device(device), shape
        self._stride = stride

    def stride(self, dim: int) -> int:
        return self._stride


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_runs_its_reference_except_on_cuda_with_equal_arguments(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, received = OPERATIONS[name], list[object]()
    for kind, path in function.modules.items():
        module = import_module(path)
        assert callable(getattr(module, name)), f"{name}: {path}"
        monkeypatch.setattr(
            module, name, lambda *args, kind=kind, **options: received.append((kind, args, options)), raising=True
        )
    parameters = signature(function).parameters.values()
    options = {each.name: False for each in parameters if each.kind == each.KEYWORD_ONLY}
    num_operands = sum(each.kind == each.POSITIONAL_OR_KEYWORD for each in parameters)
    for (device, kind), is_tuple in product(DEVICES.items(), (0, 1)):
        operands = [Operand(device) for _ in range(num_operands)]
        if is_tuple:
            operands[0] = (operands[0], operands[0])  # codes and scales
            if name in vars(norm):
                continue
        function(*operands, **options)
        assert received.pop() == (kind, tuple(operands), options)
        function.by("triton")(*operands, **options)
        assert received.pop() == ("triton", tuple(operands), options)


@pytest.mark.parametrize("name", OPERATIONS)
def test_implementations_take_the_arguments_of_the_reference(name: str) -> None:
    function = OPERATIONS[name]
    wanted = signature(function).parameters
    assert function.__doc__
    for path in function.modules.values():
        found = signature(getattr(import_module(path), name), follow_wrapped=True).parameters
        is_tuned = path.endswith(".tuned")
        assert is_tuned or [*found][: len(wanted)] == [*wanted] or set(wanted) <= set(found), path


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
    monkeypatch.setattr(operation, "find_spec", lambda name: name if is_installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert gemm_fp8.choose((Operand(device), Operand(device))) == expected
    assert quantize_1x128.choose(Operand(device)) == ("reference" if expected == "reference" else "triton")


def test_operations_without_memory_run_as_on_cuda_inside_a_context() -> None:
    rows = torch.empty(130, 256, dtype=torch.bfloat16, device="meta")
    assert quantize_1x128.choose(rows) == "reference"
    with without_launches():
        assert quantize_1x128.choose(rows) == "triton"
        codes = quantize_1x128(rows, power_of_two=False)
    assert codes.codes.is_meta
    assert codes.codes.shape == rows.shape
    assert quantize_1x128.choose(rows) == "reference"


@pytest.mark.parametrize(
    ("shape", "stride", "expected"),
    [((3, 8192), 1, "triton"), ((3, 8200), 1, "reference"), ((3, 64), 0, "reference"), ((3, 1), 0, "triton")],
)
def test_norms_whose_rows_do_not_fit_a_program_run_the_reference(
    shape: tuple[int, ...], stride: int, expected: str
) -> None:
    rows, usual = Operand("cuda", shape, stride), Operand("cuda")
    for function, operands in (
        (norm.rms_norm, (rows, usual, 1e-6)),
        (norm.normalize_backward, (rows, usual, usual, usual)),
        (norm.normalize_backward, (usual, rows, usual, usual)),
        (norm.rms_norm_quantize, (rows, usual, 1e-6)),
        (norm.rms_norm_backward_from_codes, (rows, usual, usual, usual)),
    ):
        assert function.choose(*operands) == expected


def test_products_of_an_emulated_deep_gemm_are_the_reference_s(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setitem(sys.modules, "deep_gemm", emulated(calls))
    rows_AK, grad_AN = randn(130, 256, seed=0).float(), randn(130, 192, seed=1).float()
    weight = quantize_128x128(randn(192, 256, seed=2).float(), power_of_two=False)
    rows = quantize_1x128(rows_AK, power_of_two=False)
    made_AN = gemm_fp8.by("deep_gemm")(rows, weight, torch.bfloat16)
    torch.testing.assert_close(made_AN, gemm_fp8(rows, weight, torch.bfloat16), rtol=2.0**-7, atol=2.0**-7)
    grad = quantize_columns(grad_AN, [130], power_of_two=False, min_amax=GRADIENTS_MIN_AMAX)
    columns = requantize_columns(rows, [130], power_of_two=False)
    made_TK: Tensor = gemm_fp8_columns.by("deep_gemm")(grad, columns)
    torch.testing.assert_close(made_TK, gemm_fp8_columns(grad, columns), rtol=1e-4, atol=1e-3)
    assert (calls.num_blocks, calls.num_rows) == (1, 1)


def test_the_reference_loads_neither_triton_nor_deep_gemm_and_attention_no_torch() -> None:
    code = (
        "import sys\n"
        "import kernels.attention.blocks, kernels.operation, kernels.tiles\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\n"
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
