"""The implementation of a kernel is chosen by argument, and Triton is loaded for nobody else."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

import kernels.permute.reference as permute_reference
import kernels.quantize.reference as quantize_reference
from kernels.select import (
    FusedKernels,
    GroupedKernels,
    Implementation,
    fused_kernels,
    grouped_kernels,
    implementation_for,
    permute_kernels,
    quantize_kernels,
)

ROOT = Path(__file__).resolve().parents[2]


def test_select_gives_the_implementation_asked_for() -> None:
    import kernels.permute.triton as permute_triton
    import kernels.quantize.triton as quantize_triton

    chosen: list[tuple[Implementation, ModuleType, ModuleType]] = [
        ("reference", permute_reference, quantize_reference),
        ("triton", permute_triton, quantize_triton),
    ]
    for implementation, permute, quantize in chosen:
        permuting, quantizing = permute_kernels(implementation), quantize_kernels(implementation)
        assert (permuting.permute, permuting.unpermute) == (permute.permute, permute.unpermute)
        assert quantizing.quantize_1x128 is quantize.quantize_1x128
        assert quantizing.dequantize_1x128 is quantize.dequantize_1x128


def test_select_gives_grouped_and_fused_kernels_of_the_implementation_asked_for() -> None:
    for name in ("reference", "native", "triton"):
        module = import_module(f"kernels.grouped_gemm.{name}")
        assert grouped_kernels(name) == GroupedKernels(rows=module.grouped_rows, weight=module.grouped_weight)
    for name in ("reference", "triton"):
        norm = import_module(f"kernels.rms_norm.{'any_width' if name == 'triton' else name}")
        gate, loss = (import_module(f"kernels.{folder}.{name}") for folder in ("swiglu", "cross_entropy"))
        assert fused_kernels(name) == FusedKernels(
            rms_norm=norm.rms_norm,
            normalise_backward=norm.normalise_backward,
            swiglu=gate.swiglu,
            swiglu_backward=gate.swiglu_backward,
            linear_cross_entropy=loss.linear_cross_entropy,
        )


@pytest.mark.parametrize(("device", "expected"), [("cuda:3", "triton"), ("cpu", "reference"), ("meta", "reference")])
def test_select_names_triton_for_cuda_alone(device: str, expected: str) -> None:
    assert implementation_for(torch.device(device)) == expected


def test_select_does_not_load_triton_for_the_reference() -> None:
    code = (
        "import sys, kernels.select as select\n"
        "select.permute_kernels('reference'); select.quantize_kernels('reference')\n"
        "assert 'triton' not in sys.modules\n"
        "select.permute_kernels('triton')\n"
        "assert 'triton' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
