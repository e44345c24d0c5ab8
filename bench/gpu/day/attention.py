"""Times torch's attention kernels for MLA's heads, 192 wide with values of 128.

Prints which kernel torch chooses, what each one takes forward and backward, and whether its gradients repeat to the
bit. Without a GPU it runs torch's plain kernel on a few tokens, to show that the code works.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

QUERY_WIDTH, VALUE_WIDTH = 192, 128
NUM_CALLS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Shapes and types of one measurement.

    Attributes:
        kernels: torch's name of each kernel, with the width that values are padded to for it.
    """

    device: torch.device
    num_tokens: int
    num_heads: int
    kernels: dict[SDPBackend, int]


def default_setting() -> Setting:
    """Returns V3's sizes on a GPU, few tokens elsewhere."""
    if torch.cuda.is_available():
        kernels = {
            SDPBackend.CUDNN_ATTENTION: VALUE_WIDTH,
            SDPBackend.EFFICIENT_ATTENTION: VALUE_WIDTH,
            SDPBackend.FLASH_ATTENTION: QUERY_WIDTH,  # refuses values of another width than keys
        }
        return Setting(device=torch.device("cuda"), num_tokens=4096, num_heads=128, kernels=kernels)
    kernels = {SDPBackend.MATH: VALUE_WIDTH}
    return Setting(device=torch.device("cpu"), num_tokens=16, num_heads=2, kernels=kernels)


def heads(setting: Setting, value_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries, keys and values of one sequence, [1, heads, tokens, width] in bf16, that need gradients."""
    shape = (1, setting.num_tokens, setting.num_heads)
    made = [
        torch.randn(*shape, width, device=setting.device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for width in (QUERY_WIDTH, QUERY_WIDTH, value_width)
    ]
    return made[0], made[1], made[2]


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Returns a call's mean time; waits for the device before and after all calls."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    call()
    synchronize()
    begun = time.perf_counter()
    for _ in range(NUM_CALLS):
        call()
    synchronize()
    return 1e3 * (time.perf_counter() - begun) / NUM_CALLS


def report(setting: Setting, kernel: SDPBackend, value_width: int) -> str:
    """Measures one kernel and returns a line about it."""
    query, key, value = heads(setting, value_width)
    scale = QUERY_WIDTH**-0.5

    def forward() -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)

    def gradients() -> tuple[Tensor, ...]:
        out = forward()
        return torch.autograd.grad(out, (query, key, value), torch.ones_like(out))

    with sdpa_kernel([kernel]):
        repeats = all(torch.equal(first, again) for first, again in zip(gradients(), gradients(), strict=True))
        with torch.no_grad():
            forward_time = milliseconds(forward, setting.device)
        backward_time = max(milliseconds(gradients, setting.device) - forward_time, 1e-6)
    # Half of all pairs of tokens; the backward multiplies five times for the forward's two.
    operations = setting.num_heads * setting.num_tokens**2 * (QUERY_WIDTH + VALUE_WIDTH)
    return (
        f"forward {forward_time:.3f} ms, {operations / forward_time / 1e9:.0f} TFLOP/s; backward {backward_time:.3f} "
        f"ms, {2.5 * operations / backward_time / 1e9:.0f} TFLOP/s; gradients repeat to the bit: {repeats}"
    )


def main() -> int:
    """Prints the kernel that torch chooses and a line for each; the exit code is 1 if none of them runs."""
    setting = default_setting()
    query, key, value = heads(setting, VALUE_WIDTH)
    chosen = torch._fused_sdp_choice(query, key, value, None, 0.0, True, scale=QUERY_WIDTH**-0.5)
    print(f"torch {torch.__version__} on {setting.device} chooses {SDPBackend(chosen).name}")
    failed = 0
    for kernel, value_width in setting.kernels.items():
        try:
            line = report(setting, kernel, value_width)
        except RuntimeError as error:  # a kernel that refuses these heads; the others are still measured
            failed += 1
            line = str(error).splitlines()[0]
        print(f"{kernel.name}, values {value_width} wide: {line}", flush=True)
    return 1 if failed == len(setting.kernels) else 0


if __name__ == "__main__":
    sys.exit(main())
