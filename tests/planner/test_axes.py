"""Axes and formats that are planned and not run, by hand."""

from dataclasses import replace
from typing import Any

import pytest

from base.refusal import ConfigError
from launch.config.run import check
from model.size import HeldParameters, StageShape, held_parameters
from planner.axes import with_gathers
from planner.scaling import KernelRates
from tests.planner.planned import SMALL, request_of
from train.config import TrainConfig
from train.predict.layer_times import LayerTimes, PartTimes

V3 = request_of("experiment=v3_671b", "precision=bf16")
FAR = 1e30


def rates() -> KernelRates:
    assert isinstance(V3.planner.rates, KernelRates)
    return V3.planner.rates


def changed(*, fast: bool = False, tensor: int = 1, sequences: int = 1, **plan: Any) -> TrainConfig:
    """Returns V3 with these axes on as many ranks."""
    links: Any = {"intra_node_bytes_per_second": FAR, "inter_node_bytes_per_second": FAR} if fast else {}
    mesh = replace(V3.config.parallelism, tensor=tensor, data=128 // tensor)
    return replace(
        V3.config,
        parallelism=mesh,
        cluster=replace(V3.config.cluster, **links),
        plan=replace(V3.config.plan, **plan),
        batch=replace(V3.config.batch, micro_sequences=sequences),
    )


def times(**axes: Any) -> LayerTimes:
    return rates().part_seconds(changed(**axes))


def test_tensor_ranks_divide_computation_and_send_rows_that_nothing_hides() -> None:
    """Two ranks with two sequences compute as long as one rank with one; a rank receives the other's rows."""
    alone, two = times(fast=True), times(fast=True, tensor=2, sequences=2)
    # Small sides are slower, and reads of half the weights are faster.
    assert two.moe.forward == pytest.approx(alone.moe.forward, rel=0.08)
    assert two.dense.forward == pytest.approx(alone.dense.forward, rel=0.08)
    assert two.head.forward == pytest.approx(alone.head.forward, rel=0.01)
    sent = times(tensor=2).dense.forward - times(fast=True, tensor=2).dense.forward
    assert sent == pytest.approx(2048 * 2 * (1536 + 576 + 3 * 7168) / 160e9)


def test_tensor_ranks_hold_their_share_and_all_routed_experts() -> None:
    model = V3.config.model
    whole = held_parameters(model, [StageShape(layers=range(2, 5), is_first=False, is_last=False)], 4)
    held: HeldParameters = whole.split(model, 4)
    kept = 3 * 7168 * (1536 + 576 + 2) + 2 * 7168 * 256
    assert held.routed == whole.routed
    assert 4 * (held.ordinary - kept) == pytest.approx(whole.ordinary - kept, abs=4)


def test_gathers_of_shards_hide_behind_their_layer_and_the_rest_is_exchange() -> None:
    part = PartTimes(forward=1.0, backward_input=1.0, backward_weight=1.0)
    maps = [(10**6, 10**6)]
    slow, fast = changed(fsdp=True), changed(fsdp=True, fast=True)
    assert with_gathers(part, changed(), rates().reference, maps) == part
    assert with_gathers(part, fast, rates().reference, maps) == part
    seconds = (10**12 + 187_105_280) * 2 / 160e9
    found = with_gathers(part, slow, rates().reference, maps)
    assert found.forward_exchange == pytest.approx(seconds - 1, rel=1e-3)
    assert found.backward_exchange == pytest.approx(3 * seconds - 2, rel=1e-3)


def test_formats_speed_up_products_of_layers_and_not_of_heads() -> None:
    bf16, mxfp8, nvfp4 = (times(products=name) for name in (None, "mxfp8", "nvfp4"))
    assert bf16.moe.forward > mxfp8.moe.forward > nvfp4.moe.forward
    assert bf16.head == mxfp8.head


@pytest.mark.parametrize("override", ["parallelism.tensor=2", "plan.fsdp=true"])
def test_no_run_executes_what_is_only_planned(override: str) -> None:
    request = request_of(*SMALL, override)
    assert any("planned, not run" in note and override in note for note in request.notes)
    with pytest.raises(ConfigError, match=f"^{override.partition('=')[0]}: is planned by launch.plan and not run"):
        check(request.config)


@pytest.mark.parametrize(
    ("override", "message"),
    [("parallelism.tensor=3", "parallelism.tensor: must divide"), ("plan.products=mxfp8", "plan.products: needs")],
)
def test_axes_that_a_device_or_model_cannot_have_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        request_of(*SMALL, override)
