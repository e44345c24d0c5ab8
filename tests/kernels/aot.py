"""Compiles Triton kernels for a Hopper GPU on a machine without one, and reads what came out."""

import io
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor

ARCHITECTURE = 90
TYPES = {
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """A kernel compiled for sm_90.

    Attributes:
        spill_bytes: stored to and loaded from local memory per thread, because registers ran out.
        shared_bytes: shared memory of a program, the compiled-in part and the one given at the launch.
        num_warps: of a program, with those that the compiler adds to load ahead.
    """

    ptx: str
    cubin: bytes
    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int

    def assert_sound(self) -> None:
        """Asserts that machine code exists, no register spills, and no offset is computed in 32 bits."""
        assert len(self.cubin) > 1000
        assert self.spill_bytes == 0
        assert self.instructions(r"(mul|mad)\.lo\.[su]32") == []

    def instructions(self, pattern: str) -> list[str]:
        r"""Returns the PTX instructions that match a regular expression from their start, as `cvt\.rn\..*e4m3x2`."""
        names = re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)", self.ptx, flags=re.MULTILINE)
        return [name for name in names if re.match(pattern, name)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Specialization:
    """Compiler's view of a launch: launches with equal specializations run the same machine code.

    Attributes:
        signature: type of every parameter that is not a constant, in Triton's words (`*bf16`, `i32`, `fp32`).
        constants: values of the `tl.constexpr` parameters, and of others known to be 1.
        aligned: parameters known to be multiples of 16.
    """

    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: list[str]
    options: dict[str, Any]


def compile_launch(module: ModuleType, kernel_name: str, launcher: Callable[[], Any]) -> Compiled:
    """Compiles for sm_90 exactly what a launcher would run, from tensors on the CPU.

    Args:
        launcher: called without arguments, launches that kernel once; the launch is recorded instead of run.
    """
    found = specialization_of(module, kernel_name, launcher)
    kernel = getattr(module, kernel_name)
    return compile_for_hopper(kernel, found.signature, found.constants, found.aligned, found.options)


def specialization_of(module: ModuleType, kernel_name: str, launcher: Callable[[], Any]) -> Specialization:
    """Returns what a launch gives the compiler; arguments as in `compile_launch`."""
    kernel = getattr(module, kernel_name)
    arguments, keywords = recorded_launch(module, kernel_name, launcher)
    signature: dict[str, str] = {}
    constants = {name: value for name, value in keywords.items() if name in kernel.arg_names}
    aligned: list[str] = []
    for parameter, argument in zip(kernel.params, arguments, strict=False):
        specialized = not parameter.do_not_specialize
        if argument is None or (specialized and isinstance(argument, int) and argument == 1):
            constants[parameter.name] = argument
        else:
            signature[parameter.name] = _type_of(argument)
            address = argument.data_ptr() if isinstance(argument, Tensor) else argument
            if specialized and isinstance(address, int) and address % 16 == 0:
                aligned.append(parameter.name)
    options = {name: value for name, value in keywords.items() if name not in kernel.arg_names}
    return Specialization(
        kernel=kernel_name, signature=signature, constants=constants, aligned=aligned, options=options
    )


def recorded_launch(
    module: ModuleType, kernel_name: str, launcher: Callable[[], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keywords of the one launch of a kernel, which is not run; as in `compile_launch`."""
    launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    recorder = MagicMock(arg_names=getattr(module, kernel_name).arg_names)
    recorder.__getitem__.return_value = lambda *arguments, **keywords: launches.append((arguments, keywords))
    with patch.object(module, kernel_name, recorder):
        launcher()
    assert len(launches) == 1, f"{kernel_name}: one launch expected, got {len(launches)}"
    return launches[0]


def compile_for_hopper(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compiles one specialization of a `triton.jit` function for sm_90.

    Args:
        kernel: what the decorator made; not interpreted.
        signature: type of every parameter that is not a constant, in Triton's words (`*bf16`, `i32`, `fp32`).
        constants: values of the `tl.constexpr` parameters, and of others known to be 1.
        aligned: parameters known to be multiples of 16, as a launch finds out from the arguments.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", ARCHITECTURE, 32)
    # A cache of its own: a cubin must come from today's compiler and leave nothing behind.
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory(prefix="triton") as folder,
        triton.knobs.cache.scope(),
        triton.knobs.nvidia.scope(),
    ):
        triton.knobs.cache.dir, triton.knobs.nvidia.dump_ptxas_log = folder, True
        with redirect_stdout(log):
            compiled = triton.compile(source, target=target, options=dict(options or {}))
        ptx, cubin, report = compiled.asm["ptx"], compiled.asm["cubin"], log.getvalue()
    return Compiled(
        ptx=ptx,
        cubin=cubin,
        registers=_sum_of(r"Used (\d+) registers", report),
        spill_bytes=_sum_of(r"(\d+) bytes spill (?:stores|loads)", report),
        shared_bytes=compiled.metadata.shared + sum(map(int, re.findall(r"(\d+) bytes smem", report))),
        num_warps=_sum_of(r"\.reqntid (\d+)", ptx) // 32,
    )


def _type_of(argument: Any) -> str:
    """Returns Triton's name for the type of a launch's argument."""
    if isinstance(argument, Tensor):
        return "*" + TYPES[argument.dtype]
    if isinstance(argument, float):
        return "fp32"
    return "i32" if -(2**31) <= argument < 2**31 else "i64"


def _sum_of(pattern: str, report: str) -> int:
    found = re.findall(pattern, report)
    assert found, f"ptxas did not report '{pattern}': {report}"
    return sum(map(int, found))
