"""An operation runs the implementation that suits its operands, and all refuse ill-fitting ones in the same words."""

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from inspect import signature
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.rms_norm as norm
from kernels import launch, operation
from kernels.gemm import gemm_fp8, gemm_fp8_columns, grouped_rows_fp8, grouped_weight_fp8
from kernels.launch import Tiling, without_launches
from kernels.operation import ChosenFunction, has_deep_gemm
from kernels.permute import permute, unpermute
from kernels.quantize import (
    dequantize_1x128,
    pack_e5m6,
    quantize_1x128,
    quantize_128x128,
    quantize_columns,
    requantize_columns,
    transpose_blocks,
    unpack_e5m6,
)
from kernels.quantize.layout import GRADIENTS_MIN_AMAX, PackedE5M6, Quantized, QuantizedBlocks, QuantizedColumns
from kernels.quantize.reference import dequantize_128x128
from kernels.quantize.triton import dequantize_128x128 as triton_dequantize_128x128
from kernels.rms_norm import normalize_backward, rms_norm, rms_norm_backward_from_codes, rms_norm_quantize
from kernels.swiglu import swiglu, swiglu_backward, swiglu_backward_from_codes, swiglu_quantize
from tests import ROOT
from tests.kernels.deep_gemm_emulation import Calls, emulated
from tests.kernels.plain import randn

DEVICES = {"cpu": "reference", "meta": "reference", "cuda:1": "triton"}
OPERATIONS = {
    name: function
    for folder in ("adamw", "cross_entropy", "gemm", "permute", "quantize", "rms_norm", "swiglu")
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
            operands[0] = (operands[0], operands[0])  # type: ignore[call-overload]  # codes and scales
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
    # Added to a sum, in its memory.
    total_TK = torch.ones_like(made_TK)
    assert gemm_fp8_columns.by("deep_gemm")(grad, columns, total=total_TK) is total_TK
    torch.testing.assert_close(total_TK, made_TK + 1, rtol=1e-4, atol=1e-3)
    assert (calls.num_blocks, calls.num_rows) == (1, 2)


@pytest.mark.slow
def test_the_reference_loads_neither_triton_nor_deep_gemm_and_attention_no_torch() -> None:
    code = (
        "import sys\n"
        "import kernels.attention, kernels.operation\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\n"
        "from kernels.gemm import gemm_fp8\n"
        "from kernels.permute import permute\n"
        "from kernels.quantize import quantize_1x128, quantize_128x128\n"
        "permute(torch.ones(2, 3), torch.zeros(1, dtype=torch.int64))\n"
        "rows, weight = torch.ones(2, 3), torch.ones(2, 3)\n"
        "left, right = quantize_1x128(rows, power_of_two=True), quantize_128x128(weight, power_of_two=True)\n"
        "gemm_fp8(left, right, torch.float32)\n"
        "assert 'triton' not in sys.modules and 'deep_gemm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


Case = tuple[ChosenFunction[..., Any], tuple[Any, ...], str]
EPS = 1e-6
F32, BF16 = torch.float32, torch.bfloat16
OTHER = torch.float8_e5m2
BY_TWO = {"power_of_two": True}


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


def turned(pair: Any) -> Any:
    """Codes and scales of the transpose, neither contiguous."""
    return type(pair)(pair[0].t(), pair[1].t())


VALUES = ones(3, 200)
ROWS = quantize_1x128(VALUES, power_of_two=True)
BLOCKS = quantize_128x128(ones(2, 130, 200), power_of_two=True)
WEIGHT = QuantizedBlocks(BLOCKS.codes[0], BLOCKS.scales[0])
COLUMNS = quantize_columns(VALUES, [3], power_of_two=True)
PACKED = pack_e5m6(VALUES)
NORMAL, INVERSE = rms_norm_quantize(VALUES, ones(200), EPS, power_of_two=True)
_, HIDDEN = swiglu_quantize(ones(3, 400), None, power_of_two=True)
INDEX = torch.tensor([2, 0])
FEW = ROWS.scales[:, :1]


def rows_of(codes: Tensor = ROWS.codes, scales: Tensor = ROWS.scales) -> Quantized:
    return Quantized(codes, scales)


def weight_of(codes: Tensor = WEIGHT.codes, scales: Tensor = WEIGHT.scales) -> QuantizedBlocks:
    return QuantizedBlocks(codes, scales)


def blocks_of(codes: Tensor = BLOCKS.codes, scales: Tensor = BLOCKS.scales) -> QuantizedBlocks:
    return QuantizedBlocks(codes, scales)


EVERYWHERE: list[Case] = [
    (quantize_1x128, (VALUES.int(),), "rows_ND must be floating point, got torch.int32"),
    (quantize_1x128, (VALUES[0],), "rows_ND must have 2 dimensions, got 1"),
    (dequantize_1x128, (rows_of(ROWS.codes.to(OTHER)), F32), "codes must be torch.float8_e4m3fn, got"),
    (dequantize_1x128, (rows_of(scales=FEW), F32), "scales must be [3, 2], got [3, 1]"),
    (dequantize_1x128, (rows_of(scales=ROWS.scales.bfloat16()), F32), "scales must be torch.float32, got"),
    (dequantize_1x128, (rows_of(scales=ROWS.scales.to("meta")), F32), "scales must be on cpu, where the codes"),
    (quantize_columns, (VALUES.int(), [3]), "rows_ND must be floating point, got torch.int32"),
    (quantize_columns, (VALUES, [2]), "counts must add up to the number of rows, 3, got 2"),
    (requantize_columns, (rows_of(scales=FEW), [3]), "scales must be [3, 2], got [3, 1]"),
    (quantize_128x128, (VALUES[0],), "values must have at least 2 dimensions, got 1"),
    (transpose_blocks, (blocks_of(scales=BLOCKS.scales[:, :1]),), "scales must be [2, 2, 2], got [2, 1"),
    (pack_e5m6, (VALUES.int(),), "rows_ND must be floating point, got torch.int32"),
    (unpack_e5m6, (PackedE5M6(PACKED.codes.view(torch.int8), PACKED.scales), 200, F32), "codes must be torch.uint8"),
    (unpack_e5m6, (PackedE5M6(PACKED.codes, PACKED.scales[:1]), 200, F32), "scales must be [3, 2], got [1, 2]"),
    (gemm_fp8, (rows_of(ROWS.codes.to(OTHER)), WEIGHT, F32), "left.codes must be torch.float8_e4m3fn"),
    (gemm_fp8, (ROWS, QuantizedBlocks(*(part.to("meta") for part in WEIGHT)), F32), "right.codes must be on cpu"),
    (gemm_fp8, (ROWS, weight_of(scales=WEIGHT.scales[:1]), F32), "right.scales must be [2, 2], got [1, 2]"),
    (gemm_fp8, (ROWS, weight_of(WEIGHT.codes[:, :-1]), F32), "right.codes must have as many columns"),
    (gemm_fp8, (rows_of(scales=FEW), WEIGHT, F32), "left.scales must be [3, 2], got [3, 1]"),
    (gemm_fp8, (ROWS, weight_of(BLOCKS.codes), F32), "right.codes must be a matrix, got 3 dim"),
    (gemm_fp8_columns, (QuantizedColumns(COLUMNS.codes[:, :9], COLUMNS.scales),) * 2, "left.codes must have a"),
    (grouped_rows_fp8, (rows_of(ROWS.codes.to(OTHER)), BLOCKS, [1, 2], F32), "the matrices must be torch.float8_e5m2"),
    (grouped_rows_fp8, (ROWS, blocks_of(scales=BLOCKS.scales[:1]), [1, 2], F32), "weights.scales must be [2, 2, 2]"),
    (
        grouped_rows_fp8,
        (rows_of(ROWS.codes.to(OTHER)), blocks_of(BLOCKS.codes.to(OTHER)), [1, 2], F32),
        "rows.codes must",
    ),
    (grouped_rows_fp8, (ROWS, WEIGHT, [1, 2], F32), "the matrices must have 3 dimensions, got 2"),
    (grouped_rows_fp8, (ROWS, BLOCKS, [3], F32), "counts must be as many as matrices, 2, got 1"),
    (grouped_rows_fp8, (rows_of(scales=ROWS.scales[1:]), BLOCKS, [1, 2], F32), "rows.scales must be [3, 2]"),
    (grouped_weight_fp8, (COLUMNS, COLUMNS, [3, 4]), "codes must have 256 columns, as counts fill up to, got"),
    (grouped_weight_fp8, (COLUMNS, COLUMNS, [256, -1]), "a count of rows must not be negative"),
    (swiglu, (ones(3, 8), ones(1, 8)), "up must be [3, 8], got [1, 8]"),
    (swiglu, (ones(3, 8), ones(3, 8).bfloat16()), "up must be torch.float32, as the other operands are, got torch.bfl"),
    (swiglu, (ones(3, 8), ones(3, 8).to("meta")), "up must be on cpu, where the other operands are, got meta"),
    (swiglu_backward, (ones(1, 8), ones(3, 16)), "hidden_AH must be [1, 16], got [3, 16]"),
    (swiglu_backward, (ones(4, 4), ones(4, 4)), "hidden_AH must have twice the gradient's 4 columns, got 4"),
    (swiglu_quantize, (ones(3, 400), ones(1)), "weights_A must be [3], got [1]"),
    (swiglu_quantize, (ones(4, 3), None), "hidden_AH must have an even number of columns, got 3; nearest: 2"),
    (swiglu_backward_from_codes, (ones(3, 200), HIDDEN, ones(1)), "weights_A must be [3], got [1]"),
    (swiglu_backward_from_codes, (ones(4, 200), HIDDEN, None), "codes must be [4, 400], got [3, 400]"),
    (swiglu_backward_from_codes, (ones(3, 4), HIDDEN, None), "hidden must have twice the gradient's 4 columns"),
    (rms_norm, (ones(3, 8), ones(1), EPS), "weight_D must be [8], got [1]"),
    (normalize_backward, (ones(2, 8), ones(3, 8), ones(3, 1), ones(8)), "grad must be [3, 8], got [2, 8]"),
    (normalize_backward, (ones(3, 8), ones(3, 8), ones(1, 1), ones(8)), "scale must be [3, 1], got [1, 1]"),
    (rms_norm_quantize, (VALUES, ones(1), EPS), "weight_D must be [200], got [1]"),
    (rms_norm_backward_from_codes, (ones(4, 200), NORMAL, INVERSE, ones(200)), "codes must be [4, 200], got [3, 200]"),
    (rms_norm_backward_from_codes, (VALUES, NORMAL, INVERSE[:1], ones(200)), "inverse_A1 must be [3, 1], got [1, 1]"),
    (permute, (ones(3, 8), INDEX, ones(3, 8)), "out_AD must be [2, 8], got [3, 8]"),
    (permute, (ones(3, 8), INDEX, ones(2, 8).bfloat16()), "out_AD must be torch.float32, as the other operands are"),
    (permute, (ones(3, 8), INDEX.float()), "source_A must be int32 or int64 of 1 dimensions"),
    (unpermute, (ones(3, 8), INDEX), "places_TK must be int32 or int64 of 2 dimensions"),
    (unpermute, (ones(3, 8).int(), INDEX[None]), "rows_AD must be floating point, got torch.int32"),
]

SQUARE, ALONG = ones(4, 4), "must be contiguous along its columns, got strides"
BY_COLUMN = Quantized(SQUARE.to(torch.float8_e4m3fn).t(), ones(4, 1))
ONE_BLOCK = quantize_128x128(ones(256, 3), power_of_two=True)

UNDER_TRITON: list[Case] = [
    (permute, (ones(3, 4).t(), INDEX), f"rows_ND {ALONG} (1, 4)"),
    (permute, (ones(4, 3), INDEX, ones(2, 6)[:, ::2]), f"out_AD {ALONG} (6, 2)"),
    (unpermute, (ones(3, 4).t(), INDEX[None]), f"rows_AD {ALONG} (1, 4)"),
    (quantize_1x128, (SQUARE.t(),), f"rows_ND {ALONG} (1, 4)"),
    (dequantize_1x128, (BY_COLUMN, F32), f"codes {ALONG} (1, 4)"),
    (quantize_columns, (ones(256, 3).t(), [3]), f"rows_ND {ALONG} (1, 3)"),
    (requantize_columns, (BY_COLUMN, [4]), f"codes {ALONG} (1, 4)"),
    (quantize_128x128, (ones(256, 3).t(),), f"values {ALONG} (1, 3)"),
    (transpose_blocks, (turned(ONE_BLOCK),), f"codes {ALONG} (1, 3)"),
    (pack_e5m6, (SQUARE.t(),), f"rows_ND {ALONG} (1, 4)"),
    (unpack_e5m6, (PackedE5M6(PACKED.codes.t().contiguous().t(), PACKED.scales), 200, F32), f"codes {ALONG} (1, 3)"),
    (swiglu, (SQUARE.t(), SQUARE), f"gate {ALONG} (1, 4)"),
    (swiglu_quantize, (SQUARE.t(), None), f"hidden_AH {ALONG} (1, 4)"),
    (rms_norm, (SQUARE.t(), SQUARE[0], EPS), f"x {ALONG} (1, 4)"),
    (rms_norm, (ones(1, 8193), ones(8193), EPS), "x must have at most 8192 columns, got 8193; nearest: 8192"),
    (normalize_backward, (SQUARE, SQUARE.t(), SQUARE[:, :1], SQUARE[0]), f"x {ALONG} (1, 4)"),
    (rms_norm_quantize, (SQUARE.t(), SQUARE[0], EPS), f"x_AD {ALONG} (1, 4)"),
    (rms_norm_backward_from_codes, (SQUARE, BY_COLUMN, SQUARE[:, :1], SQUARE[0]), f"codes {ALONG} (1, 4)"),
]


@pytest.mark.parametrize("kind", ["reference", "triton"])
def test_operands_that_do_not_fit_are_named(kind: str) -> None:
    for function, operands, rule in EVERYWHERE + (UNDER_TRITON if kind == "triton" else []):
        name = function.__name__  # type: ignore[attr-defined]
        options = BY_TWO if "quantize" in name and "dequantize" not in name else {}
        with pytest.raises(ValueError, match=r".") as raised:
            function.by(kind)(*operands, **options)
        assert str(raised.value).startswith(f"{name}: {rule}")


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", ["reference", "triton"])
@pytest.mark.parametrize(
    ("function", "operands"),
    [
        (quantize_1x128, (VALUES,)),
        (quantize_columns, (VALUES, [3])),
        (requantize_columns, (ROWS, [3])),
        (quantize_128x128, (VALUES,)),
    ],
)
def test_a_bound_from_which_scales_underflow_is_rejected(
    function: ChosenFunction[..., Any], operands: tuple[Any, ...], kind: str
) -> None:
    with pytest.raises(ValueError, match=r"min_amax must be in \[2\*\*-117, 2\*\*127\], got 1e-40"):
        function.by(kind)(*operands, power_of_two=True, min_amax=1e-40)


def test_blocks_and_tilings_that_do_not_fit_are_named() -> None:
    for function in (dequantize_128x128, triton_dequantize_128x128):
        with pytest.raises(ValueError, match=r"dequantize_128x128: scales must be \[2, 2, 2\], got \[2, 1, 2\]"):
            function(QuantizedBlocks(BLOCKS.codes, BLOCKS.scales[:, :1]), F32)
    with pytest.raises(ValueError, match=rf"dequantize_128x128: codes {ALONG}"):
        triton_dequantize_128x128(turned(ONE_BLOCK), F32)
    with pytest.raises(ValueError, match=r"Tiling: rows must be a power of two in \[16, 128\], got 100; nearest: 128"):
        Tiling(rows=100)
    with pytest.raises(ValueError, match=r"Tiling: outputs must be a power of two .*, got 256; nearest: 128"):
        Tiling(outputs=256)


def test_products_leave_reserved_multiprocessors_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number reaches persistent grids, torch's products and DeepGEMM, and is checked against the device."""
    device = torch.device("cuda", 1)
    deep_gemm: list[int] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(launch, "has_deep_gemm", lambda device: True)
    monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace(set_num_sms=deep_gemm.append))
    assert launch.count_programs(1000, 2, device) == 264
    launch.reserve_sms(device, 20)
    assert launch.count_programs(1000, 2, device) == 224
    assert launch.count_programs(1000, 2, torch.device("cuda", 0)) == 264
    assert launch.count_programs(7, 2, device) == 7
    assert torch._C._get_sm_carveout_experimental() == 20
    with pytest.raises(ValueError, match=r"^cluster.communication_sms: .* 132 SMs, .*is 132; nearest valid: 131"):
        launch.reserve_sms(device, 132)
    launch.reserve_sms(device, 0)
    assert launch.count_programs(1000, 2, device) == 264
    assert torch._C._get_sm_carveout_experimental() is None
    assert deep_gemm == [112, 132]
    launch.reserve_sms(torch.device("cpu"), 20)
