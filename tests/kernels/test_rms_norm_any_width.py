"""Norms on a GPU, interpreted: rows that Triton's kernels refuse go to the reference, others do not."""

from concurrent.futures import ProcessPoolExecutor

import torch

import kernels.rms_norm.reference as plain
from kernels.rms_norm.tiling import LARGEST_COLUMNS


def _differences(num_columns: int, is_expanded: bool) -> list[float]:
    from unittest.mock import patch

    import kernels.rms_norm.any_width as chosen

    generator = torch.Generator().manual_seed(num_columns)
    x, weight = torch.randn(3, num_columns, generator=generator), torch.rand(num_columns, generator=generator)
    grad = torch.ones(()).expand(3, num_columns) if is_expanded else torch.randn(x.shape, generator=generator)
    calls: list[str] = []
    compiled = chosen.compiled.normalise_backward
    with patch.object(chosen.compiled, "normalise_backward", lambda *given: calls.append("") or compiled(*given)):
        normal, scale = chosen.rms_norm(x, weight, 1e-6)
        made = chosen.normalise_backward(grad, x, scale, weight)
    fits = num_columns <= LARGEST_COLUMNS and not is_expanded
    assert len(calls) == fits
    codes, inverse = chosen.rms_norm_quantize(x, weight, 1e-6, True)
    chosen.rms_norm_backward_from_codes(grad, codes, inverse, weight)
    expected = (plain.rms_norm(x, weight, 1e-6)[0], *plain.normalise_backward(grad, x, scale, weight))
    return [float((ours - theirs).abs().max()) for ours, theirs in zip((normal, *made), expected, strict=True)]


def test_norms_of_any_width_equal_the_reference(interpreter: ProcessPoolExecutor) -> None:
    for num_columns, is_expanded in ((64, False), (64, True), (LARGEST_COLUMNS + 8, False)):
        assert max(interpreter.submit(_differences, num_columns, is_expanded).result()) < 1e-4
