"""Scaled times: the reference is itself, and work, precision and devices scale what they should."""

from dataclasses import astuple, replace

import pytest

from launch import plan
from tests.train.planner.planned import PUBLISHED, request_of
from train.config import PrecisionConfig, TrainConfig
from train.config.errors import ConfigError
from train.planner.config import KernelRates
from train.planner.scaling import RowsPerToken, rows_per_token, scaled_times
from train.schedule.layer_times import LayerTimes


def rates() -> KernelRates:
    found = request_of(*PUBLISHED).planner.rates
    assert isinstance(found, KernelRates)
    return found


def published() -> TrainConfig:
    return request_of(*PUBLISHED).config


def with_cluster(**values: float) -> LayerTimes:
    config = published()
    return scaled_times(rates(), replace(config, cluster=replace(config.cluster, **values)))


def test_reference_layer_has_the_times_of_the_trace() -> None:
    """profile-data, train.json: F 8.97 ms, I 14.65, W 7.46; exchange 10.34 and 9.77."""
    moe = scaled_times(rates(), published()).moe
    assert moe.forward == pytest.approx(8.97e-3, rel=0.002)
    assert moe.backward_input == pytest.approx(14.65e-3, rel=0.002)
    assert moe.backward_weight == pytest.approx(7.46e-3, rel=0.002)
    assert moe.forward_exchange == pytest.approx(10.34e-3, rel=0.01)
    assert moe.backward_exchange == pytest.approx(9.78e-3, rel=0.01)


def test_twice_the_sequences_take_twice_the_time() -> None:
    config = published()
    one = scaled_times(rates(), config)
    two = scaled_times(rates(), replace(config, batch=replace(config.batch, micro_sequences=2)))
    for single, double in zip((one.moe, one.dense, one.head), (two.moe, two.dense, two.head), strict=True):
        assert astuple(double) == pytest.approx([2 * seconds for seconds in astuple(single)])


def test_longer_sequences_add_scores_alone() -> None:
    config = published()
    one = scaled_times(rates(), config)
    longer = scaled_times(
        rates(), replace(config, batch=replace(config.batch, sequence_length_tokens=8192, micro_sequences=1))
    )
    scores = rates().attention.forward.scores
    assert longer.moe.forward == pytest.approx(2 * one.moe.forward + 2 * scores)
    assert longer.moe.backward_weight == pytest.approx(2 * one.moe.backward_weight)


def test_twice_the_peak_halves_products_and_scores_alone() -> None:
    base, fast = with_cluster(), with_cluster(peak_flops=2 * 989e12)
    kernels = (rates().attention.forward, rates().experts.forward)
    saved = sum(each.products + each.scores for each in kernels) / 2
    assert base.moe.forward - fast.moe.forward == pytest.approx(saved)
    assert fast.moe.forward_exchange == base.moe.forward_exchange


def test_links_scale_the_exchange_alone() -> None:
    base, slow = with_cluster(), with_cluster(inter_node_bytes_per_second=25e9)
    assert slow.moe.forward_exchange == pytest.approx(2 * base.moe.forward_exchange)
    assert slow.moe.forward == base.moe.forward


def test_fewer_sms_for_communication_leave_more_for_computation() -> None:
    base, free = with_cluster(), with_cluster(communication_sms=10)
    assert free.moe.forward == pytest.approx(base.moe.forward * 112 / 122)


def test_sms_for_communication_must_leave_some_for_computation() -> None:
    for num_sms, changes in ((132, {"communication_sms": 132}), (20, {"communication_sms": 20, "num_sms": 20})):
        valid = num_sms - 1
        rule = rf"^cluster.communication_sms: must be below the device's {num_sms} SMs, .* nearest valid: {valid}$"
        with pytest.raises(ConfigError, match=rule):
            with_cluster(**changes)
        with pytest.raises(ConfigError, match=rule):
            plan.main(["experiment=v3_671b", *(f"cluster.{key}={value}" for key, value in changes.items())])


def test_bf16_has_no_casts_and_slower_products() -> None:
    config = published()
    bf16 = scaled_times(rates(), replace(config, precision=PrecisionConfig(kind="bf16"))).moe
    kernels = (rates().attention.forward, rates().experts.forward)
    expected = sum(1.75 * each.products + each.scores + each.other for each in kernels)
    assert bf16.forward == pytest.approx(expected, rel=0.002)
    assert bf16.forward_exchange == scaled_times(rates(), config).moe.forward_exchange, "dispatch.payload is fp8"


@pytest.mark.parametrize("model", ["v2_lite_16b", "moonlight_16b", "v2_236b"])
def test_smaller_models_take_less_time(model: str) -> None:
    config = request_of(f"model={model}", "cluster=h800", "precision=bf16", "batch.sequence_length_tokens=4096").config
    own, large = scaled_times(rates(), config), scaled_times(rates(), published())
    tokens = config.batch.micro_sequences
    assert 0 < own.moe.forward / tokens < large.moe.forward
    assert own.moe.forward_exchange == 0


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_recomputed_layers_add_to_the_backward_for_inputs_alone(precision: str) -> None:
    """Another dispatch; experts without their last product; in bf16 also the output projection of attention."""
    config = published()
    if precision == "bf16":
        config = replace(config, precision=PrecisionConfig(kind="bf16"))
    kept = scaled_times(rates(), config).moe
    again = scaled_times(rates(), replace(config, recompute=("layer",))).moe
    assert (again.forward, again.backward_weight) == (kept.forward, kept.backward_weight)
    assert again.forward_exchange == kept.forward_exchange
    sent = again.backward_exchange - kept.backward_exchange
    assert 0.3 * kept.forward_exchange < sent < 0.6 * kept.forward_exchange
    assert 0.2 * kept.forward < again.backward_input - kept.backward_input < 0.7 * kept.forward


def test_rows_in_bf16_take_the_time_of_their_bytes() -> None:
    """A row in FP8 has a byte for each value and 4 for each 128. Rows from experts are in bf16 in both cases."""
    config = replace(published(), precision=PrecisionConfig(kind="bf16"))
    fp8, full = (
        scaled_times(rates(), replace(config, dispatch=replace(config.dispatch, payload=payload))).moe
        for payload in ("fp8", "full")
    )
    exchange, more = rates().exchange, 2 / (1 + 4 / 128) - 1
    forward, backward = exchange.dispatch + exchange.combine, exchange.dispatch_backward + exchange.combine_backward
    assert full.forward_exchange / fp8.forward_exchange - 1 == pytest.approx(more * exchange.dispatch / forward)
    assert full.backward_exchange / fp8.backward_exchange - 1 == pytest.approx(
        more * exchange.combine_backward / backward
    )


def rows_of(*overrides: str) -> RowsPerToken:
    return rows_per_token(request_of("experiment=v3_671b", *overrides).config)


def test_published_rows_across_nodes() -> None:
    """At most 4 of 8 nodes, own node included: 3.469 rows were counted for random scores."""
    assert rows_of().across_nodes == pytest.approx(3.469, abs=0.03)


def test_a_copy_for_each_expert_crosses_nodes_seven_times() -> None:
    """8 experts, of which 7 in 8 are on other nodes."""
    rows = rows_of("dispatch=all_to_all")
    assert rows.across_nodes == pytest.approx(8 * 7 / 8, abs=0.03)
    assert rows.within_node == pytest.approx(8 * 7 / 64, abs=0.03)


def test_without_a_cap_of_nodes_more_rows_cross() -> None:
    """8 experts of 256 on 8 nodes of 32 experts: 8 x (1 - C(224, 8) / C(256, 8)) nodes, less the own."""
    miss = 1.0
    for place in range(8):
        miss *= (224 - place) / (256 - place)
    rows = rows_of("model.num_limited_groups=8", "dispatch.max_nodes=8")
    assert rows.across_nodes == pytest.approx(7 * (1 - miss), abs=0.03)


def test_ranks_of_one_node_send_nothing_across() -> None:
    rows = rows_of("cluster.ranks_per_node=64", "dispatch=all_to_all")
    assert rows.across_nodes == 0
    assert rows.within_node == pytest.approx(8 * 63 / 64, abs=0.03)


def test_one_expert_rank_sends_nothing() -> None:
    assert rows_of("parallelism.expert=1", "dispatch=local") == RowsPerToken(across_nodes=0.0, within_node=0.0)
