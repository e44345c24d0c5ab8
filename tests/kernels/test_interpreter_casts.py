"""The interpreter's casts, as the tests mend them, are torch's own."""

import torch

from tests.kernels.interpreter_casts import interpreted


@interpreted
def test_interpreted_casts_round_as_torch_does() -> None:
    """Of a sweep that includes ties, carries, subnormals, NaN and infinity."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def cast(numbers: tl.tensor, out: tl.tensor, BLOCK: tl.constexpr) -> None:
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + offsets, tl.load(numbers + offsets).to(out.dtype.element_ty))

    bits = torch.arange(-(2**31), 2**31, 2**16 + 2**11 - 1)[: 2**16 - 2**12].to(torch.int32)
    around = torch.arange(-500, 500, 1 / 16).repeat(1)[: 2**12]
    float32 = torch.cat([bits.view(torch.float32), around])
    every_code = torch.arange(256, dtype=torch.uint8).repeat(256).view(torch.float8_e4m3fn)
    differing = {}
    for numbers, dtype in (
        (float32, torch.float8_e4m3fn),
        (float32, torch.float8_e5m2),
        (float32, torch.bfloat16),
        (float32, torch.float16),
        (float32.bfloat16(), torch.float8_e4m3fn),
        (float32.double() * (1 + 2.0**-30), torch.float32),
        (every_code, torch.float32),
        (every_code, torch.bfloat16),
    ):
        out = torch.empty(2**16, dtype=dtype)
        cast[(16,)](numbers, out, BLOCK=2**12)
        expected = numbers
        if dtype.itemsize == 1:
            expected = expected.float().clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
        expected = expected.to(dtype).double()
        same = (out.double() == expected) | (out.double().isnan() & expected.isnan())
        differing[f"{numbers.dtype} to {dtype}"] = int((~same).sum())
    assert not any(differing.values()), differing
