"""The benchmark's arithmetic, tables and choices, which need no GPU: times are made up, products small."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.gpu.bench.__main__ as command
from bench.gpu.bench import report
from bench.gpu.bench.__main__ import MET, NO_DEVICE, SECTIONS, Findings, main, measure
from bench.gpu.bench.contenders import (
    BF16,
    OURS,
    Recipe,
    bf16_product,
    deep_gemm,
    scaled_product,
    scales_for,
)
from bench.gpu.bench.measure import Roofs
from kernels.quantize.layout import Quantized, QuantizedBlocks
from kernels.quantize.reference import quantize_1x128, quantize_128x128
from tests.kernels.catalogue import LAUNCHES
from tests.kernels.launches import Call, Launch, Product, Tensors
from tests.kernels.plain import randn

CPU = torch.device("cpu")
ROOFS = Roofs(copy_bytes_per_second=1e12, bf16_per_second=1e14, fp8_per_second=2e14)
PRODUCT = Product(num_rows=48, num_columns=160, depth=256)


def launch_of(product: Product | None, bytes_moved: int = 10**6, kernel: str = "gemm_kernel") -> Launch:
    """Returns a launch that records and does nothing."""
    return Launch(
        module="kernels.gemm.reference",
        kernel=kernel,
        shape="4096 x 7168 x 2048, any",
        bytes_moved=bytes_moved,
        prepare=lambda functions, tensors: lambda: None,
        product=product,
    )


def row_of(seconds: dict[str, float], product: Product | None = PRODUCT, kernel: str = "gemm_kernel") -> report.Row:
    """Returns a row for the launch above."""
    return report.row_of(launch_of(product, 10**6, kernel), seconds, ROOFS)


def test_without_a_device_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == NO_DEVICE == 2
    assert capsys.readouterr().out.splitlines() == ["needs a CUDA device: torch.cuda.is_available() is false"]


def test_floor_is_the_longer_of_moving_and_multiplying() -> None:
    large = Product(num_rows=10**4, num_columns=10**4, depth=10**4)
    assert ROOFS.floor_seconds(launch_of(None, 10**9)) == pytest.approx(1e-3)
    assert ROOFS.floor_seconds(launch_of(large, 10**9)) == pytest.approx(1e-2)
    assert ROOFS.floor_seconds(launch_of(replace(large, is_fp8=False), 10**9)) == pytest.approx(2e-2)
    assert ROOFS.floor_seconds(launch_of(large, 10**11)) == pytest.approx(0.1)


def test_targets_pass_fail_or_were_not_measured() -> None:
    good, bad = row_of({OURS: 1e-6, BF16: 1.5e-6}), row_of({OURS: 1e-6, BF16: 1.3e-6})
    lines, is_met = report.target_lines([good])
    assert is_met
    assert lines[0] == ("pass: product in FP8, 4096 x 7168 x 2048, against torch's in bf16: at least 1.4, got 1.50")
    assert all(line.startswith("not measured: ") for line in lines[1:])
    lines, is_met = report.target_lines([good, bad])
    assert not is_met
    assert lines[0].startswith("FAIL: ")
    assert lines[0].endswith("got 1.30")


def test_targets_are_about_launches_that_are_timed() -> None:
    for target in report.TARGETS:
        found = [each for each in LAUNCHES if each.name == target.kernel and each.shape.startswith(target.shape)]
        assert any(each.is_timed for each in found), target
    assert set(SECTIONS) >= {target.kernel.split(".")[0] for target in report.TARGETS}


def test_a_kernel_that_fails_keeps_no_other_from_being_measured() -> None:
    def seconds_of_all(calls: Mapping[str, Call]) -> dict[str, float]:
        return dict.fromkeys(calls, 1e-06)

    def failing(functions: object, tensors: object) -> Call:
        raise RuntimeError("out of registers")

    good = launch_of(None)
    findings = Findings()
    for launch in (replace(good, prepare=failing), good):
        measure(launch, CPU, seconds_of_all, ROOFS, findings)
    assert findings.failures == ["FAIL: gemm.gemm, 4096 x 7168 x 2048, any: RuntimeError: out of registers"]
    assert [row.seconds for row in findings.rows] == [{OURS: 1e-6}]


class Clock:
    """A stopwatch by which everything takes a microsecond, whether or not there is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, call: Call) -> float:
        call()
        return 1e-6


def test_all_of_the_benchmark_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Runs on the CPU with a small kernel in place of Triton."""
    launch = Launch(
        module="kernels.quantize.reference",
        kernel="quantize_kernel",
        shape="4096 x 7168, in name only",
        bytes_moved=10**6,
        prepare=lambda functions, tensors: partial(
            functions.quantize_1x128, tensors.normal(3, 200), power_of_two=False
        ),
        reference="kernels.quantize.reference",
    )
    monkeypatch.setattr(command, "LAUNCHES", (launch, replace(launch, is_timed=False)))
    monkeypatch.setattr(command, "Stopwatch", Clock)
    monkeypatch.setattr(command, "DEVICE", CPU)
    monkeypatch.setattr(command, "measure_roofs", lambda stopwatch, device, num_rounds: ROOFS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    figures = tmp_path / "figures.json"
    assert main(["--sections", "quantize", "--rounds", "2", "--json", str(figures)]) == MET
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("device a GPU, torch ")
    assert lines[1] == report.roofs_text(ROOFS)
    assert "| quantize.quantize | 4096 x 7168, in name only | 1.0 | 1000 GB/s | 100% | 1.00 |" in lines
    assert lines[-1] == "pass: quantizing against a copy's bandwidth: at least 0.8, got 1.00"
    assert len(json.loads(figures.read_text())["rows"]) == 1


def test_deep_gemm_is_asked_for_the_products_of_a_launch() -> None:
    for launch in LAUNCHES:
        if launch.product is not None and launch.product.is_fp8 and launch.is_timed:
            call = launch.prepare(deep_gemm(launch.product), Tensors(CPU))
            assert isinstance(call, partial)
            assert call.func.__module__.endswith(".deep_gemm")


def operands() -> tuple[Quantized, QuantizedBlocks]:
    """Returns quantized operands of `PRODUCT`."""
    left_MK, right_NK = (
        randn(PRODUCT.num_rows, PRODUCT.depth, seed=0),
        randn(PRODUCT.num_columns, PRODUCT.depth, seed=1),
    )
    return quantize_1x128(left_MK.float(), power_of_two=False), quantize_128x128(right_NK.float(), power_of_two=False)


@pytest.mark.parametrize("recipe", ["row-wise", "tensor-wise"])
def test_torch_multiplies_codes_with_the_scales_that_it_is_given(recipe: Recipe) -> None:
    left, right = operands()
    left_scale, right_scale = scales_for(recipe, left, right)
    made_MN = scaled_product(recipe, left.codes, right.codes, left_scale, right_scale)()
    expected_MN = (left.codes.float() @ right.codes.float().t()) * left_scale * right_scale
    torch.testing.assert_close(made_MN.float(), expected_MN, rtol=2.0**-7, atol=1e-3)


def test_scales_by_blocks_lie_as_torch_wants_them() -> None:
    left, right = operands()
    left_scale, right_scale = scales_for("block-wise", left, right)
    assert left_scale.stride() == (1, PRODUCT.num_rows)
    assert torch.equal(left_scale, left.scales)
    assert (right_scale.shape, right_scale.stride()) == ((4, 2), (1, 4))
    assert torch.equal(right_scale[:2], right.scales.t())


@pytest.mark.parametrize("counts", [(), (16, 32)])
@pytest.mark.parametrize("is_gradient", [False, True])
def test_products_in_bf16_have_the_shape_of_ours(is_gradient: bool, counts: tuple[int, ...]) -> None:
    sizes: dict[str, Any] = {"depth": 48, "num_rows": 64} if is_gradient else {"depth": 64, "num_rows": 48}
    product = Product(num_columns=32, counts=counts, is_gradient=is_gradient, **sizes)
    made = bf16_product(product, CPU)()
    leading = (len(counts),) if counts and is_gradient else ()
    assert made.shape == (*leading, product.num_rows, product.num_columns)
    assert made.dtype == torch.bfloat16
