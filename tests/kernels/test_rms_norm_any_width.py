"""Norms under Triton, interpreted: rows that its kernels refuse go to the reference, others do not."""

from concurrent.futures import ProcessPoolExecutor

import torch

import kernels.rms_norm as norm
import kernels.rms_norm.reference as plain


def _differences(num_columns: int, is_expanded: bool) -> list[float]:
    from unittest.mock import patch

    import kernels.rms_norm.triton as compiled

    generator = torch.Generator().manual_seed(num_columns)
    x, weight = torch.randn(3, num_columns, generator=generator), torch.rand(num_columns, generator=generator)
    grad = torch.ones(()).expand(3, num_columns) if is_expanded else torch.randn(x.shape, generator=generator)
    calls: list[str] = []
    backward = compiled.normalize_backward
    with patch.object(compiled, "normalize_backward", lambda *given: calls.append("") or backward(*given)):
        normal, scale = norm.rms_norm(x, weight, 1e-6, implementation="triton")
        made = norm.normalize_backward(grad, x, scale, weight, implementation="triton")
    fits = num_columns <= norm.LARGEST_COLUMNS and not is_expanded
    assert len(calls) == fits
    codes, inverse = norm.rms_norm_quantize(x, weight, 1e-6, power_of_two=True, implementation="triton")
    norm.rms_norm_backward_from_codes(grad, codes, inverse, weight, implementation="triton")
    expected = (plain.rms_norm(x, weight, 1e-6)[0], *plain.normalize_backward(grad, x, scale, weight))
    return [float((ours - theirs).abs().max()) for ours, theirs in zip((normal, *made), expected, strict=True)]


def test_norms_of_any_width_equal_the_reference(interpreter: ProcessPoolExecutor) -> None:
    for num_columns, is_expanded in ((64, False), (64, True), (norm.LARGEST_COLUMNS + 8, False)):
        assert max(interpreter.submit(_differences, num_columns, is_expanded).result()) < 1e-4
