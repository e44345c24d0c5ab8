"""Checks that every Triton kernel, compiled for an H100, is in the table, obeys the rules and equals its record."""

import ast
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from kernels.launch import Tiling
from kernels.quantize.layout import padded_rows
from tests.kernels.aot import compile_launch, recorded_launch
from tests.kernels.catalogue import LAUNCHES
from tests.kernels.compiled_table import (
    FOLDER,
    MOST_SHARED_BYTES,
    file_of,
    problems,
    recorded_launches,
    row_of,
    rows,
    table,
)
from tests.kernels.launches import Tensors
from tests.kernels.triton_versions import VERSIONS

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
PASSES = {"rotate_kernel": 2, "slopes_kernel": 2, "adamw_kernel": 20 / 12}

"""Bytes moved per byte of the arguments, for kernels that overwrite their inputs."""


def kernels_in(source: str) -> set[str]:
    """Returns the kernels that are launched: functions with `triton.jit` that no other kernel calls."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    jitted = [each for each in functions if any("triton.jit" in ast.unparse(mark) for mark in each.decorator_list)]
    calls = [node for each in jitted for node in ast.walk(each) if isinstance(node, ast.Call)]
    return {each.name for each in jitted} - {ast.unparse(call.func) for call in calls}


def kernels_of_all_modules() -> set[tuple[str, str]]:
    """Returns module and name of every kernel; a function that other modules call inside their kernels is not one."""
    sources = {path: path.read_text() for path in sorted(KERNELS.rglob("*.py"))}
    found = {path: kernels_in(source) for path, source in sources.items() if "triton.jit" in source}
    imported = {
        alias.name
        for path in found
        for node in ast.walk(ast.parse(sources[path]))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return {
        (".".join(path.relative_to(KERNELS.parent).with_suffix("").parts), name)
        for path, names in found.items()
        for name in names - imported
    }


def test_every_kernel_is_compiled_for_the_table() -> None:
    assert kernels_of_all_modules() == {(launch.module, launch.kernel) for launch in recorded_launches()}


@pytest.mark.slow
def test_sample_of_compiled_kernels_keeps_the_rules_and_is_as_recorded() -> None:
    """Every tenth launch; `make triton-table` compiles all."""
    found = [row_of(launch) for launch in recorded_launches()[::10]]
    assert [rule for row in found for rule in row.broken_rules()] == []
    if triton.__version__ in VERSIONS:
        recorded = set(file_of(triton.__version__).read_text().splitlines())
        lines = [line for line in table(found).splitlines() if line.startswith("| ")]
        assert [line for line in lines if line not in recorded] == [], "make triton-table ARGS=--write"


@pytest.mark.exhaustive
def test_compiled_kernels_keep_the_rules_and_are_as_recorded() -> None:
    found = rows()
    assert [rule for row in found for rule in row.broken_rules()] == []
    if triton.__version__ not in VERSIONS:
        pytest.skip(f"rules hold; numbers are recorded for Triton {', '.join(VERSIONS)}, this is {triton.__version__}")
    assert problems(found) == [], "make triton-table ARGS=--write"


def test_a_table_is_recorded_for_every_supported_triton_and_no_other() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {file_of(version).name for version in VERSIONS}
    for version in VERSIONS:
        assert f"by Triton {version};" in file_of(version).read_text()


def test_recorded_tables_have_no_spills_and_no_failures() -> None:
    for version in VERSIONS:
        cells = [line.split(" | ") for line in file_of(version).read_text().splitlines()[4:]]
        assert len(cells) > 50
        assert {row[3] for row in cells} == {"0"}, version
        assert max(int(row[4]) for row in cells) <= MOST_SHARED_BYTES, version


def test_bytes_of_a_launch_are_those_of_the_tensors_that_its_kernel_is_given() -> None:
    for launch in LAUNCHES:
        arguments, _ = recorded_launch(import_module(launch.module), launch.kernel, launch.call(torch.device("cpu")))
        sizes = {each.data_ptr(): each.nbytes for each in arguments if isinstance(each, Tensor)}
        counted = sum(sizes.values()) * PASSES.get(launch.kernel, 1)
        # Partial sums and tile positions are arguments too; a few scales, which torch transposes, are not.
        assert 0.94 * counted <= launch.bytes_moved <= 1.001 * counted, f"{launch.name}, {launch.shape}"


MADE = Tensors(torch.device("cpu"))
COUNTS = (3,)


def call_of(module: Any, kernel: str, num_outputs: int, depth: int) -> Callable[[], Any]:
    """Returns a launch of the kernel with matrices of so many rows and columns."""
    num_rows, num_padded = sum(COUNTS), padded_rows(COUNTS)
    match kernel:
        case "quantize_blocks_kernel":
            return partial(module.quantize_128x128, MADE.normal(num_outputs, depth), power_of_two=False)
        case "dequantize_blocks_kernel":
            return partial(module.dequantize_128x128, MADE.blocks(num_outputs, depth), torch.bfloat16)
        case "transpose_blocks_kernel":
            return partial(module.transpose_blocks, MADE.blocks(num_outputs, depth))
        case "gemm_kernel":
            operands = MADE.rows(num_rows, depth), MADE.blocks(num_outputs, depth)
            return partial(module.gemm_fp8, *operands, torch.bfloat16)
        case "grouped_rows_fp8_kernel":
            operands = MADE.rows(num_rows, depth), MADE.blocks(1, num_outputs, depth)
            return partial(module.grouped_rows_fp8, *operands, COUNTS, torch.bfloat16)
        case _:
            columns = MADE.columns(num_outputs, num_padded), MADE.columns(depth, num_padded)
            return partial(module.grouped_weight_fp8, *columns, COUNTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kernel"),
    [("gemm.triton_fp8", "gemm_kernel"), ("gemm.triton_fp8", "grouped_rows_fp8_kernel")],
)
def test_kernel_with_specialized_warps_compiles_if_the_depth_is_one(name: str, kernel: str) -> None:
    """The tuner tries that tiling, and the compiler's pass for it fails on a loop that is known to run once."""
    module = import_module(f"kernels.{name}")
    launch = partial(call_of(module, kernel, 256, 1), tiling=Tiling(specialize=True, warps=4))  # type: ignore[call-arg]
    assert compile_launch(module, kernel, launch).spill_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("quantize.triton", "quantize_blocks_kernel"),
        ("quantize.triton", "dequantize_blocks_kernel"),
        ("quantize.triton", "transpose_blocks_kernel"),
        ("gemm.triton_fp8", "gemm_kernel"),
        ("gemm.triton_fp8", "grouped_rows_fp8_kernel"),
        ("gemm.triton_fp8", "grouped_weight_fp8_kernel"),
    ],
)
def test_kernel_compiles_if_sizes_are_one(name: str, kernel: str) -> None:
    module = import_module(f"kernels.{name}")
    compiled = compile_launch(module, kernel, call_of(module, kernel, 1, 1))
    assert len(compiled.cubin) > 1000
    assert compiled.spill_bytes == 0
