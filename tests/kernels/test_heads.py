"""The heads' kernels: interpreted, near the reference; numbers that are only moved, to the bit."""

import pytest
import torch

import kernels.heads.reference as reference
import kernels.heads.triton as kernels
from tests.kernels.agreement import assert_same_bits
from tests.kernels.interpreter_casts import interpreted
from tests.kernels.plain import near, randn

# Sequences, tokens, heads, width without position, rotated width, value width, padding.
SHAPES = [(2, 3, 5, 12, 4, 8, 0), (1, 2, 33, 16, 6, 20, 3), (2, 1, 2, 8, 8, 8, 8)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@interpreted
def test_interpreted_heads_are_near_the_reference(dtype: torch.dtype) -> None:
    for batch, tokens, heads, nope, rope, width, padding in SHAPES:
        angles_TP = randn(tokens, rope // 2, seed=0)
        turns_TP = torch.polar(torch.full_like(angles_TP, 1.25), angles_TP).to(torch.complex64)
        exact_TP = turns_TP.to(torch.complex128)
        # A part of each row, turned and turned back.
        rows = randn(batch, tokens, heads, nope + rope, seed=1, dtype=dtype)
        for inverse in (False, True):
            made, expected = rows.clone(), rows.double()
            kernels.rotate_(made[..., nope:], turns_TP, inverse=inverse)
            reference.rotate_(expected[..., nope:], exact_TP, inverse=inverse)
            near(made, expected, 1)
            assert_same_bits(made[..., :nope], rows[..., :nope])
        # Keys and values in wider memory, whose end becomes 0; the shared key is a part of wider rows.
        up_NE = randn(batch * tokens, heads * (nope + width), seed=2, dtype=dtype)
        shared = randn(batch, tokens, rope + 3, seed=3, dtype=dtype)[..., 3:]
        sizes = (nope + rope + padding, width + padding)
        made_heads = tuple(torch.full((batch, tokens, heads, size), torch.nan, dtype=dtype) for size in sizes)
        expected_heads = tuple(torch.empty_like(made, dtype=torch.float64) for made in made_heads)
        kernels.fill_keys_and_values(made_heads, turns_TP, up_NE, shared, nope)  # type: ignore[arg-type]
        reference.fill_keys_and_values(expected_heads, exact_TP, up_NE.double(), shared.double(), nope)  # type: ignore[arg-type]
        for made, expected in zip(made_heads, expected_heads, strict=True):
            near(made, expected, 1)
        # Gradients in another order of dimensions in memory, as attention's backward may return them.
        grads = [randn(batch, heads, tokens, size, seed=4, dtype=dtype).transpose(1, 2) for size in sizes]
        out, exact_out = shared.clone(), shared.double()
        grad_NE = kernels.keys_and_values_gradient((grads[0], grads[1]), turns_TP, out, nope, width)
        exact_grads = (grads[0].double(), grads[1].double())
        near(grad_NE, reference.keys_and_values_gradient(exact_grads, exact_TP, exact_out, nope, width), 0)
        near(out, exact_out, 1, largest=float(exact_grads[0].abs().sum(2).max()))
