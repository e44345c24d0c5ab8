"""The rule of kernels/quantize/reference.py for numbers that a kernel holds in registers; same bits."""

import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)
MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
INFINITY_BITS = tl.constexpr(0x7F800000)
NAN_BITS = tl.constexpr(0x7FC00000)
MANTISSA_BITS = tl.constexpr(0x007FFFFF)
RECIPROCAL_BITS = tl.constexpr(0x7F000000)


@triton.jit  # type: ignore[untyped-decorator]
def largest_bits(values: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    """int32: bits of the largest magnitude of float32 numbers along AXIS, which stays with a length of 1.

    Bits of non-negative floats order as the floats do, and those of a NaN come last; a float maximum may drop it.
    """
    return tl.max(values.to(tl.int32, bitcast=True) & MAGNITUDE_BITS, axis=AXIS, keep_dims=True)


@triton.jit  # type: ignore[untyped-decorator]
def compute_scales(amax_bits: tl.tensor, min_amax: tl.tensor, POWER_OF_TWO: tl.constexpr) -> tl.tensor:
    """Scales in float32 from the bits of largest magnitudes; NaN where those are of no finite number."""
    finite = amax_bits < INFINITY_BITS
    amax = tl.where(finite, amax_bits, 0).to(tl.float32, bitcast=True)
    scale_bits = tl.div_rn(tl.maximum(amax, min_amax), LARGEST).to(tl.int32, bitcast=True)
    if POWER_OF_TWO:
        # Adding the mantissa's mask carries into the exponent unless the number is a power of two already.
        scale_bits = (scale_bits + MANTISSA_BITS) & INFINITY_BITS
    return tl.where(finite, scale_bits, NAN_BITS).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def compute_codes(values: tl.tensor, scales: tl.tensor, POWER_OF_TWO: tl.constexpr) -> tl.tensor:
    """Codes in e4m3: float32 `value / scale` to nearest even, and that to e4m3 to nearest even.

    No quotient rounds to more than 448, so that nothing saturates. Of scales that are no powers of two, a division for
    each number would cost more than its way through memory: one reciprocal per scale is used instead, and what it
    leaves as a remainder, exact in fused arithmetic, is divided once more. Of a scale in [1, 2) that gives the bits of
    the division near every number where codes change, as trying all 2**23 of them shows; hence the powers of two.

    Args:
        values: float32.
        scales: float32, 2**-126 at least and at most 2**120, or NaN; as `values` or of length 1 along an axis.
        POWER_OF_TWO: all scales are.
    """
    scale_bits = scales.to(tl.int32, bitcast=True)
    inverse_power = (-(scale_bits & INFINITY_BITS) + RECIPROCAL_BITS).to(tl.float32, bitcast=True)
    if POWER_OF_TWO:
        scaled = values * inverse_power
    else:
        mantissa = scales * inverse_power
        # Negative numbers twice: so the remainder of a zero, which is +0, leaves it its sign.
        inverse_mantissa = tl.div_rn(-1.0, mantissa)
        negated = values * (inverse_power * -1.0)
        quotient = negated * inverse_mantissa
        scaled = tl.fma(tl.fma(quotient, mantissa, negated), inverse_mantissa, quotient)
    return tl.where(scales == scales, scaled, scales).to(tl.float8e4nv)
