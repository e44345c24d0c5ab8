"""Triton's CPU interpreter, made to round as the hardware does and to assert what a debug build would.

The interpreter of Triton 3.9 rounds wrongly (triton-lang/triton#8322): a float32 loses its carry on the way to e4m3
(-127.99 becomes -64) and a bfloat16 is truncated. Here torch's own casts take their place.
"""

import inspect
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import wraps
from importlib import import_module
from typing import Any

import numpy as np
import torch


def start_interpreter() -> None:
    """Makes this process interpret Triton's kernels. To be called before Triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    import triton.runtime.interpreter as interpreter

    interpreter._convert_float = _with_casts_of_torch(interpreter._convert_float)
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, debug=True)


def _with_casts_of_torch(original: Any) -> Any:
    """Wraps `original`, the interpreter's conversion between float types, with torch's rounding to nearest even."""
    import triton.language as tl
    from triton.runtime.interpreter import _ir

    floats = {
        tl.float64: torch.float64,
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
    }
    carriers = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}

    def convert(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source not in floats or target not in floats or rounding_mode not in (None, _ir.ROUNDING_MODE.RTNE):
            return original(values, source, target, rounding_mode)
        bits = np.frombuffer(values.tobytes(), dtype=f"int{source.primitive_bitwidth}").copy()
        numbers = torch.from_numpy(bits).view(floats[source])
        if source.primitive_bitwidth == 8:
            numbers = numbers.float()
        elif target.primitive_bitwidth == 8:
            largest = torch.finfo(floats[target]).max
            numbers = numbers.double().clamp(-largest, largest)  # a NaN stays; the hardware's cast saturates
        converted = numbers.to(floats[target]).view(carriers[target.primitive_bitwidth]).numpy()
        return converted.view(f"uint{target.primitive_bitwidth}").reshape(values.shape)

    return convert


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Lets a test run in the process in which Triton interprets its kernels; see the fixture `interpreter`."""

    @wraps(test)
    def run(interpreter: ProcessPoolExecutor, **arguments: Any) -> None:
        interpreter.submit(_call, test.__module__, test.__name__, arguments).result()

    fixture = inspect.Parameter("interpreter", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(test).parameters.values()
    run.__signature__ = inspect.Signature([fixture, *parameters])  # type: ignore[attr-defined]
    return run


def _call(module: str, name: str, arguments: dict[str, Any]) -> None:
    getattr(import_module(module), name).__wrapped__(**arguments)
