"""The rule of kernels/quantize/reference.py for numbers in a kernel's registers; bit-equal."""

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
    """Returns the bits, int32, of the largest float32 magnitude along AXIS, kept with length 1; NaN wins."""
    return tl.max(values.to(tl.int32, bitcast=True) & MAGNITUDE_BITS, axis=AXIS, keep_dims=True)


@triton.jit  # type: ignore[untyped-decorator]
def compute_scales(amax_bits: tl.tensor, min_amax: tl.tensor, POWER_OF_TWO: tl.constexpr) -> tl.tensor:
    """Computes float32 scales from the bits of largest magnitudes; NaN if a magnitude is not finite."""
    finite = amax_bits < INFINITY_BITS
    amax = tl.where(finite, amax_bits, 0).to(tl.float32, bitcast=True)
    scale_bits = tl.div_rn(tl.maximum(amax, min_amax), LARGEST).to(tl.int32, bitcast=True)
    if POWER_OF_TWO:
        # Adding the mantissa's mask carries into the exponent unless the number is a power of two already.
        scale_bits = (scale_bits + MANTISSA_BITS) & INFINITY_BITS
    return tl.where(finite, scale_bits, NAN_BITS).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def compute_codes(values: tl.tensor, scales: tl.tensor, POWER_OF_TWO: tl.constexpr) -> tl.tensor:
    """Computes e4m3 codes: float32 `value / scale` to nearest even, then to e4m3 to nearest even.

    No quotient rounds to more than 448. If scales are not powers of two, a division per number would cost more than its
    memory traffic. Instead, one reciprocal per scale is used, and its remainder, exact in fused arithmetic, is divided
    again. For every scale in [1, 2) this gives the bits of the division near all numbers at which codes change, as a
    test of all 2**23 scales shows; powers of two extend this to all scales, from 2**-126 to 2**120.
    """
    scale_bits = scales.to(tl.int32, bitcast=True)
    inverse_power = (-(scale_bits & INFINITY_BITS) + RECIPROCAL_BITS).to(tl.float32, bitcast=True)
    if POWER_OF_TWO:
        scaled = values * inverse_power
    else:
        mantissa = scales * inverse_power
        # Negating twice keeps the sign of a zero, whose remainder is +0.
        inverse_mantissa = tl.div_rn(-1.0, mantissa)
        negated = values * (inverse_power * -1.0)
        quotient = negated * inverse_mantissa
        scaled = tl.fma(tl.fma(quotient, mantissa, negated), inverse_mantissa, quotient)
    return tl.where(scales == scales, scaled, scales).to(tl.float8e4nv)
