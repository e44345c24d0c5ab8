"""SwiGLU experts over sorted rows, and every gradient, against one row after the other in float64.

Products of few rows equal those of many rows, for every number of rows that has a separate form.

Shape legend: N rows given, A rows in the experts' order, D hidden size, E experts, M intermediate size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from comm.dispatch.local import LocalDispatcher
from kernels.expert_mlp import (
    ExpertImplementation,
    choose_expert_implementation,
    down_gradient,
    expert_hidden,
    expert_mlp,
    expert_mlp_backward,
    gate_up_gradient,
)
from kernels.few_rows import few_rows_experts, few_rows_linear
from kernels.launch import without_launches
from kernels.swiglu import triton as triton_swiglu
from tests.kernels.plain import expert_rows, near, randn, strided

COUNTS = [(3, 0, 4, 1), (0, 0, 0, 0), (1,), (70, 3, 0, 65), (2, 290, *[0] * 14)]
TYPES: list[tuple[ExpertImplementation, torch.dtype]] = [
    ("reference", torch.float64),
    ("reference", torch.float32),
    ("reference", torch.bfloat16),
    ("grouped", torch.float32),
    ("grouped", torch.bfloat16),
]


@dataclass(frozen=True)
class Operand:
    """What a choice reads of a tensor."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of a pass. `tokens_A` is None if rows are in the experts' order."""

    rows_ND: Tensor
    weights_A: Tensor
    gate_up_EHD: Tensor
    down_EDM: Tensor
    grad_ND: Tensor
    counts: tuple[int, ...]
    tokens_A: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Found:
    """Results of a pass, in the order of `expected_of`."""

    out_AD: Tensor
    grad_rows_AD: Tensor
    grad_weights_A: Tensor
    grad_gate_up_EHD: Tensor
    grad_down_EDM: Tensor


def make_case(
    counts: tuple[int, ...], dtype: torch.dtype, *, by_token: bool, hidden: int = 16, width: int = 24
) -> Case:
    total, experts = sum(counts), len(counts)
    given = 5 if by_token else total
    generator = torch.Generator().manual_seed(8)
    return Case(
        rows_ND=randn(given, hidden, seed=0, dtype=dtype),
        weights_A=torch.rand(total, generator=generator).to(dtype) + 0.5,
        gate_up_EHD=randn(experts, 2 * width, hidden, seed=1, dtype=dtype) / 2,
        down_EDM=randn(experts, hidden, width, seed=2, dtype=dtype) / 2,
        grad_ND=randn(given, hidden, seed=3, dtype=dtype),
        counts=counts,
        tokens_A=torch.randint(0, 5, (total,), generator=generator) if by_token else None,
    )


def in_order(case: Case, values_ND: Tensor) -> Tensor:
    return values_ND if case.tokens_A is None else values_ND[case.tokens_A]


def expected_of(case: Case) -> Found:
    leaves = [in_order(case, case.rows_ND), case.weights_A, case.gate_up_EHD, case.down_EDM]
    leaves = [leaf.detach().double().clone().requires_grad_() for leaf in leaves]
    rows, weights, gate_up, down = leaves
    out = expert_rows(rows, weights, gate_up, down, case.counts)
    (out * in_order(case, case.grad_ND).double() + sum(leaf.sum() * 0 for leaf in leaves)).sum().backward()
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return Found(
        out_AD=out.detach(),
        grad_rows_AD=grads[0],
        grad_weights_A=grads[1],
        grad_gate_up_EHD=grads[2],
        grad_down_EDM=grads[3],
    )


def run(implementation: ExpertImplementation, case: Case, *, at_once: bool, keeps_gated: bool) -> Found:
    """Runs forward and backward; the experts' gradients are computed at once, or later from what was kept."""
    gated = case.rows_ND.new_empty(sum(case.counts), case.down_EDM.shape[2]) if keeps_gated else None
    weights = (case.gate_up_EHD, case.down_EDM)
    operands = (case.rows_ND, case.weights_A, *weights, case.counts, case.tokens_A, gated)
    out, hidden = expert_mlp.by(implementation)(*operands)
    backward = expert_mlp_backward.by(implementation)
    given = (case.grad_ND, case.weights_A, hidden, *weights, case.counts, case.tokens_A)
    if at_once:
        grad_rows, grad_weights, rest = backward(*given, rows_ND=case.rows_ND)
        grad_gate_up, grad_down = rest
    else:
        grad_rows, grad_weights, (grad_hidden,) = backward(*given)
        of_gate_up = gate_up_gradient.by(implementation)
        grad_gate_up = of_gate_up(grad_hidden, in_order(case, case.rows_ND), case.counts)
        given_down = (in_order(case, case.grad_ND), case.weights_A, hidden, case.counts, gated)
        grad_down = down_gradient.by(implementation)(*given_down)
    return Found(
        out_AD=out,
        grad_rows_AD=grad_rows,
        grad_weights_A=grad_weights,
        grad_gate_up_EHD=grad_gate_up,
        grad_down_EDM=grad_down,
    )


def tensors(found: Found) -> dict[str, Tensor]:
    return {name: getattr(found, name) for name in Found.__dataclass_fields__}


def assert_near(found: Found, expected: Found) -> None:
    """Asserts closeness in bf16: a few thousandths of the whole, 3 % of the largest number."""
    for name, exact in tensors(expected).items():
        made = tensors(found)[name]
        if made.dtype == torch.bfloat16:
            error = made.double() - exact
            assert made.shape == exact.shape, name
            assert float(error.norm()) <= 0.008 * float(exact.norm()), name
            assert not exact.numel() or float(error.abs().max()) <= 0.03 * float(exact.abs().max()), name
        else:
            near(made, exact, 16, sums=32)


@pytest.mark.covering(2)
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize(("implementation", "dtype"), TYPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_experts_and_gradients_equal_row_by_row(
    counts: tuple[int, ...], implementation: ExpertImplementation, dtype: torch.dtype, by_token: bool, at_once: bool
) -> None:
    case = make_case(counts, dtype, by_token=by_token)
    expected = expected_of(case)
    before = [case.rows_ND.clone(), case.grad_ND.clone(), case.weights_A.clone()]
    found = run(implementation, case, at_once=at_once, keeps_gated=False)
    assert_near(found, expected)
    for now, then in zip((case.rows_ND, case.grad_ND, case.weights_A), before, strict=True):
        assert torch.equal(now, then)
    again = run(implementation, case, at_once=at_once, keeps_gated=True)
    for name, tensor in tensors(again).items():
        assert torch.equal(tensor, tensors(found)[name]), name
    for expert, count in enumerate(counts):
        if not count:
            assert not found.grad_gate_up_EHD[expert].any()
            assert not found.grad_down_EDM[expert].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_experts_of_odd_sizes_and_strided_rows_equal_row_by_row(dtype: torch.dtype) -> None:
    case = make_case((3, 0, 2, 9), dtype, by_token=False, hidden=7, width=5)
    expected = expected_of(case)
    wide = Case(
        rows_ND=strided(case.rows_ND),
        weights_A=strided(case.weights_A),
        gate_up_EHD=case.gate_up_EHD,
        down_EDM=case.down_EDM.transpose(1, 2).contiguous().transpose(1, 2),
        grad_ND=strided(case.grad_ND),
        counts=case.counts,
        tokens_A=None,
    )
    for at_once in (False, True):
        assert_near(run("reference", wide, at_once=at_once, keeps_gated=True), expected)


@pytest.fixture
def _garbage() -> Iterator[None]:
    """Fills uninitialized memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.usefixtures("_garbage")
@pytest.mark.parametrize("keeps_gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "width"), [(4, 10_016), (80, 100)])
def test_experts_of_many_rows_equal_row_by_row(hidden: int, width: int, dtype: torch.dtype, keeps_gated: bool) -> None:
    """Rows so wide that a few of them fill a cache: experts are then worked on a few at a time.

    Memory in between is never read before it is written: oneDNN's bf16 products of rows whose width is no multiple of
    32 read on into the next row, and multiply by 0 what they find there.
    """
    case = make_case((3, 0, 2, 9, 30, 1, 0, 64), dtype, by_token=True, hidden=hidden, width=width)
    expected = expected_of(case)
    for at_once in (False, True):
        found = run("reference", case, at_once=at_once, keeps_gated=keeps_gated)
        for name, exact in tensors(expected).items():
            error = (tensors(found)[name].double() - exact).norm() / exact.norm()
            assert float(error) < (1e-12 if dtype == torch.float64 else 0.008), name


@pytest.mark.covering(2)
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize(("implementation", "dtype"), TYPES)
@pytest.mark.parametrize("counts", [(3, 5, 70), (0, 2, 3)])
def test_what_is_not_a_number_stays_with_its_expert(
    counts: tuple[int, ...], implementation: ExpertImplementation, dtype: torch.dtype, by_token: bool, at_once: bool
) -> None:
    """Products of 16-bit numbers read adjacent rows, whose values must have no effect."""
    case = make_case(counts, dtype, by_token=by_token)
    first, last = counts[0], counts[0] + counts[1]
    if case.tokens_A is not None:
        # The middle expert alone serves token 4.
        case.tokens_A[case.tokens_A == 4] = 3
        case.tokens_A[first:last] = 4
    middle = slice(4, 5) if by_token else slice(first, last)
    clean = run(implementation, case, at_once=at_once, keeps_gated=False)
    case.rows_ND[middle], case.grad_ND[middle], case.weights_A[first:last] = torch.nan, torch.inf, -torch.inf
    found = run(implementation, case, at_once=at_once, keeps_gated=False)
    for name, tensor in tensors(found).items():
        expected = tensors(clean)[name]
        for kept in (
            (slice(0, 1), slice(2, 3))
            if name.startswith(("grad_gate", "grad_down"))
            else (slice(0, first), slice(last, None))
        ):
            assert torch.equal(tensor[kept], expected[kept]), name


def test_experts_are_grouped_if_torch_supports_them() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for device, dtype, width, expected in (
        (cuda, torch.bfloat16, 24, "grouped"),
        (cuda, torch.bfloat16, 25, "reference"),
        (cuda, torch.float32, 24, "reference"),
        (cpu, torch.bfloat16, 24, "reference"),
        (cpu, torch.float32, 24, "reference"),
    ):
        assert choose_expert_implementation(device, dtype, 16, width) == expected


@pytest.mark.parametrize(("hidden", "width", "expected"), [(16, 24, "grouped"), (15, 24, "reference")])
def test_every_function_of_experts_chooses_by_both_of_their_sizes(hidden: int, width: int, expected: str) -> None:
    def of(*shape: int) -> Tensor:
        return Operand(torch.device("cuda"), torch.bfloat16, shape)  # type: ignore[return-value]

    weights = (of(2, 2 * width, hidden), of(2, hidden, width))
    rows, gated = of(4, hidden), of(4, 2 * width)
    assert expert_mlp.choose(rows, of(4), *weights, (2, 2)) == expected
    assert expert_hidden.choose(rows, weights[0], (2, 2)) == expected
    assert expert_mlp_backward.choose(rows, of(4), gated, *weights, (2, 2)) == expected
    assert gate_up_gradient.choose(gated, rows, (2, 2)) == expected
    assert down_gradient.choose(rows, of(4), gated, (2, 2)) == expected


@pytest.mark.parametrize(("implementation", "dtype"), TYPES)
def test_hidden_values_alone_have_the_same_bits(implementation: ExpertImplementation, dtype: torch.dtype) -> None:
    for counts in COUNTS:
        case = make_case(counts, dtype, by_token=False)
        given = (case.rows_ND, case.weights_A, case.gate_up_EHD, case.down_EDM, case.counts)
        _, hidden_AH = expert_mlp.by(implementation)(*given)
        alone_AH = expert_hidden.by(implementation)(case.rows_ND, case.gate_up_EHD, case.counts)
        assert torch.equal(alone_AH, hidden_AH), counts


def test_grouped_experts_apply_the_gate_by_one_kernel_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, seen on tensors without memory: plain PyTorch would read and write the hidden values several times."""
    launched: list[str] = []
    for name in ("swiglu", "swiglu_backward"):
        launcher = getattr(triton_swiglu, name)

        def counted(*operands: Tensor, name: str = name, launcher: Any = launcher) -> Tensor:
            launched.append(name)
            result: Tensor = launcher(*operands)
            return result

        monkeypatch.setattr(triton_swiglu, name, counted)
    counts = (3, 5)
    with torch.device("meta"):
        rows_AD, weights_A = torch.empty(8, 16, dtype=torch.bfloat16), torch.empty(8, dtype=torch.bfloat16)
        gate_up_EHD = torch.empty(2, 48, 16, dtype=torch.bfloat16)
        down_EDM = torch.empty(2, 16, 24, dtype=torch.bfloat16)
    with without_launches():
        out_AD, hidden_AH = expert_mlp(rows_AD, weights_A, gate_up_EHD, down_EDM, counts)
        assert out_AD.shape == (8, 16)
        assert launched == ["swiglu"]
        expert_mlp_backward(out_AD, weights_A, hidden_AH, gate_up_EHD, down_EDM, counts)
    assert launched == ["swiglu", "swiglu", "swiglu_backward"]


@pytest.mark.parametrize("num_rows", [1, 4, 5, 129])
@pytest.mark.parametrize(("num_outputs", "dtype"), [(48, torch.float64), (30, torch.float64), (48, torch.bfloat16)])
def test_linear_of_few_rows_is_linear(num_rows: int, num_outputs: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Rows of a wider matrix, as a split makes them.
    x_RI = torch.randn(num_rows, 50, generator=generator).to(dtype)[:, 3:43]
    weight_OI = torch.randn(num_outputs, 40, generator=generator).to(dtype)
    out_RO = few_rows_linear(x_RI, weight_OI)
    assert out_RO.is_contiguous()
    torch.testing.assert_close(out_RO, functional.linear(x_RI, weight_OI))


@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_experts_of_few_rows_are_those_of_sorted_rows(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    rows_TD, gate_up_EHD, down_EDM, scores_TE = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((num_tokens, 24), (6, 32, 24), (6, 24, 16), (num_tokens, 6))
    )
    # No token chooses the last expert.
    weights_TK, ids_TK = scores_TE[:, :5].topk(3)
    dispatcher = LocalDispatcher(6)
    counts, order = dispatcher.local_order(dispatcher.plan(ids_TK))
    weights_A = order.copy_weights(weights_TK)
    out_AD, _ = expert_mlp(rows_TD, weights_A, gate_up_EHD, down_EDM, counts, order.tokens_A)
    made_TD = few_rows_experts(rows_TD, ids_TK, weights_TK, gate_up_EHD, down_EDM)
    torch.testing.assert_close(made_TD, order.sum_rows(out_AD))
