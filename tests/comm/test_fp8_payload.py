"""The FP8 wrapper equals quantization before any dispatcher, with half the bytes.

Shape legend: T tokens, K experts per token, A arrived rows, N rows, D hidden size.
"""

import traceback
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, distributed

from comm.dispatch.build import Fp8Dispatcher
from comm.dispatch.local import LocalDispatcher
from comm.dispatch.traffic import LayerTraffic
from comm.lane import ThreadLane
from comm.protocol import Dispatcher
from kernels.quantize.layout import GRADIENTS_MIN_AMAX, ROWS_MIN_AMAX, pack, unpack
from kernels.quantize.reference import dequantize_1x128, quantize_1x128
from tests.comm import contract, laws
from tests.comm.backends import Setting, maker, watching
from tests.inline_lane import InlineLane
from tests.ranks import run_ranks

_NUM_EXPERTS, _NUM_CHOICES = 8, 3


def _changed(rows_ND: Tensor, min_amax: float) -> Tensor:
    """Returns quantized and dequantized rows."""
    return dequantize_1x128(quantize_1x128(rows_ND, power_of_two=True, min_amax=min_amax), rows_ND.dtype)


@pytest.mark.parametrize("hidden_size", [1, 128, 130])
def test_packed_row_holds_codes_and_scales_and_nothing_else(hidden_size: int) -> None:
    generator = torch.Generator().manual_seed(hidden_size)
    for num_rows in (0, 1, 7):
        quantized = quantize_1x128(torch.randn(num_rows, hidden_size, generator=generator), power_of_two=True)
        packed = pack(quantized)
        assert packed.dtype == torch.uint8
        assert packed.shape == (num_rows, hidden_size + 4 * ((hidden_size + 127) // 128))
        codes, scales = unpack(packed, hidden_size)
        assert torch.equal(codes.view(torch.uint8), quantized.codes.view(torch.uint8))
        assert torch.equal(scales, quantized.scales)


@dataclass(frozen=True)
class Case:
    """Tokens of one rank: a fifth of the choices is dropped, and the last of several ranks has no token."""

    ids_TK: Tensor
    rows_TD: Tensor
    gradients_TD: Tensor
    weights_TK: Tensor

    @classmethod
    def make(cls, rank: int, world_size: int, dtype: torch.dtype, hidden_size: int) -> "Case":
        """Makes rows of magnitude 1 and gradients of magnitude 1e-9."""
        generator = torch.Generator().manual_seed(rank)
        num_tokens = 0 if 0 < rank == world_size - 1 else 20 + 3 * rank
        ids_TK = torch.rand(num_tokens, _NUM_EXPERTS, generator=generator).topk(_NUM_CHOICES, -1).indices
        ids_TK = ids_TK.masked_fill(torch.rand(ids_TK.shape, generator=generator) < 0.2, -1)
        rows_TD, gradients_TD = torch.randn(2, num_tokens, hidden_size, generator=generator)
        weights_TK = torch.rand(ids_TK.shape, generator=generator)
        return cls(ids_TK, rows_TD.to(dtype), (gradients_TD * 1e-9).to(dtype), weights_TK)


def _check_equals_plain(plain: Dispatcher, case: Case) -> None:
    """Compares bitwise. Rows and gradients are quantized only in the direction to experts."""
    fp8 = Fp8Dispatcher(plain)
    assert fp8.num_local_experts == plain.num_local_experts
    handle, own = plain.plan(case.ids_TK), fp8.plan(case.ids_TK, case.weights_TK)
    assert own.num_tokens == len(case.rows_TD)
    expected = plain.dispatch(_changed(case.rows_TD, ROWS_MIN_AMAX), case.weights_TK, handle).wait()
    arrived = fp8.dispatch(case.rows_TD, case.weights_TK, own).wait()
    again_AD = fp8.dispatch_again(case.rows_TD, own).wait()
    combined = [each.combine(expected.rows_AD, held).wait() for each, held in ((plain, handle), (fp8, own))]
    copied_AD = plain.combine_backward(_changed(case.gradients_TD, GRADIENTS_MIN_AMAX), handle).wait()
    gradients_AD = fp8.combine_backward(case.gradients_TD, own).wait()
    back = [
        each.dispatch_backward(copied_AD, expected.weights_A, held).wait()
        for each, held in ((plain, handle), (fp8, own))
    ]
    assert arrived.counts == expected.counts
    assert torch.equal(arrived.weights_A, expected.weights_A)
    for found, wanted in (
        (arrived.rows_AD, expected.rows_AD),
        (again_AD, expected.rows_AD),
        (gradients_AD, copied_AD),
        (combined[1], combined[0]),
        *zip(back[1], back[0], strict=True),
    ):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
        assert found.numel() == 0 or found.count_nonzero() > found.numel() // 2


def _check_setting(rank: int, world_size: int, setting: Setting) -> str:
    """Returns the failure, if any, after all ranks have finished."""
    plain, failures = maker(setting, _NUM_EXPERTS, watching())(InlineLane()), []
    for dtype, hidden_size in ((torch.bfloat16, 256), (torch.float32, 130), (torch.float64, 130)):
        try:
            _check_equals_plain(plain, Case.make(rank, world_size, dtype, hidden_size))
        except AssertionError:
            failures.append(f"rank {rank}, {dtype}, hidden size {hidden_size}: {traceback.format_exc()}")
    return "\n".join(failures)


@pytest.mark.parametrize(
    "setting",
    [Setting("local", (0,)), Setting("all_to_all", (0, 0, 1, 1)), Setting("two_hop", (0, 0, 1, 1), {"chunks": 2})],
    ids=lambda setting: setting.kind,
)
def test_fp8_dispatcher_equals_quantizing_before_the_plain_one(setting: Setting) -> None:
    failures = run_ranks(len(setting.nodes), _check_setting, setting)
    assert not any(failures), "\n".join(failures)


_EXACT_LAWS = (
    laws.law_rows_arrive_as_specified,
    laws.law_combine_sums_each_token_s_experts,
    laws.law_backwards_are_adjoint,
    laws.law_handles_are_independent_and_reusable,
    laws.law_inputs_may_be_strided_and_results_carry_no_graph,
)
"""Laws with small integers, which are exact in e4m3."""


def _check_contract(rank: int, world_size: int) -> list[str]:
    world, failures = distributed.group.WORLD, []
    assert world is not None
    setting = Setting("all_to_all", (0, 1))
    inner = maker(setting, contract.num_experts_for(world_size), watching())
    with ThreadLane("comm") as comm_lane:
        bench = contract.Bench(lambda lane: Fp8Dispatcher(inner(lane)), comm_lane, world, setting.nodes, rank)
        for law in _EXACT_LAWS:
            try:
                law(bench)
            except AssertionError:
                failures.append(f"{law.__name__}, rank {rank}: {traceback.format_exc()}")
    return failures


def test_fp8_dispatcher_keeps_the_contract_if_rows_fit_its_codes() -> None:
    failures = [failure for found in run_ranks(2, _check_contract) for failure in found]
    assert not failures, "\n".join(failures)


def _count_bytes(rank: int, world_size: int) -> dict[str, LayerTraffic]:
    observers = watching()
    plain = maker(Setting("all_to_all", (0, 0, 1, 1)), _NUM_EXPERTS, observers)(InlineLane())
    dispatcher = Fp8Dispatcher(plain)
    case = Case.make(rank, world_size, torch.bfloat16, hidden_size=512)
    handle = dispatcher.plan(case.ids_TK)
    arrived = dispatcher.dispatch(case.rows_TD, case.weights_TK, handle).wait()
    found = {"dispatch": observers.traffic.take().total}
    dispatcher.combine_backward(case.gradients_TD, handle).wait()
    found["combine backward"] = observers.traffic.take().total
    dispatcher.combine(arrived.rows_AD, handle).wait()
    return {**found, "combine": observers.traffic.take().total}


def _bytes_per_row(counted: LayerTraffic) -> set[float]:
    """Returns bytes per row within and across nodes, if rows were sent."""
    assert counted.predicted_bytes_within_node == counted.num_bytes_within_node
    assert counted.predicted_bytes_across_nodes == counted.num_bytes_across_nodes
    pairs = (
        (counted.num_bytes_within_node, counted.num_rows_within_node),
        (counted.num_bytes_across_nodes, counted.num_rows_across_nodes),
    )
    return {num_bytes / rows for num_bytes, rows in pairs if rows}


def test_bytes_counted_are_codes_and_scales_and_weights() -> None:
    """A weight is sent with each row to experts, with at most 16 bytes of padding."""
    row, weight = 512 + 4 * 512 // 128, 4
    ranks = run_ranks(4, _count_bytes)
    assert sum(found["dispatch"].num_rows_across_nodes for found in ranks) > 50
    for rank, found in enumerate(ranks):
        sizes = _bytes_per_row(found["dispatch"])
        assert {size for size in sizes if not row + weight <= size <= row + weight + 16} == set(), f"rank {rank}"
        assert _bytes_per_row(found["combine backward"]) <= {row}, f"rank {rank}"
        assert _bytes_per_row(found["combine"]) <= {2 * 512}, f"rank {rank}"


def _local() -> Fp8Dispatcher:
    return Fp8Dispatcher(LocalDispatcher(1))


def _to_expert(rows_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rows and gradients that arrive at the only expert."""
    dispatcher = _local()
    handle = dispatcher.plan(torch.zeros(len(rows_TD), 1, dtype=torch.int64))
    arrived = dispatcher.dispatch(rows_TD, torch.ones(len(rows_TD), 1), handle).wait()
    return arrived.rows_AD, dispatcher.combine_backward(rows_TD, handle).wait()


def test_no_gradient_that_bfloat16_holds_is_flushed() -> None:
    """All positive bfloat16 numbers up to 2^127, each as the largest of its tile."""
    rows_TD = torch.arange(1, 0x7F01, dtype=torch.int16).view(torch.bfloat16)[:, None]
    plain_TD, gradients_TD = _to_expert(rows_TD)
    assert (float(rows_TD[0]), float(rows_TD[-1])) == (2.0**-133, 2.0**127)
    assert gradients_TD.count_nonzero() == len(rows_TD)
    error_TD = (gradients_TD.double() / rows_TD.double() - 1).abs()
    assert error_TD[rows_TD >= 2.0**-131].max() <= 2.0**-4  # half a unit of a code's three bits
    assert plain_TD.count_nonzero() < len(rows_TD)  # the bound of activations would flush some
