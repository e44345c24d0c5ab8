"""Tests of the rules of `parallelism.context`: what divides what, and which tasks may split sequences."""

import pytest

from launch.config.run_config import check, compose_run
from tests.launch.test_config import NEEDS
from train.config.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["parallelism.context=3", "batch.sequence_length_tokens=256"],
            ["batch.sequence_length_tokens", "2 x parallelism.context = 6", "is 256", "252 or 258"],
        ),
        (
            ["parallelism=four_ranks", "parallelism.context=2", "parallelism.expert=3"],
            ["parallelism.expert", "parallelism.data x parallelism.context = 4", "is 3", "2 or 4"],
        ),
        (
            ["parallelism.context=2", "cluster=one_gpu", "attention=flex"],
            ["attention", "logarithms", "parallelism.context above 1", "is flex", "nearest valid: auto or sdpa"],
        ),
        (["parallelism.context=0"], ["parallelism.context", "above 0", "is 0"]),
        (
            ["parallelism.context=2", "task=dpo", *NEEDS["task=dpo"]],
            ["parallelism.context", "must be 1 with task=dpo", "is 2", "nearest valid: 1", "pretrain"],
        ),
    ],
)
def test_context_rule_names_key_value_and_nearest(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(compose_run(overrides))
    for part in parts:
        assert part in str(caught.value)


def test_context_multiplies_ranks_and_divides_a_rank_s_tokens() -> None:
    config = compose_run(["parallelism=four_ranks", "parallelism.context=2", "parallelism.expert=4"])
    assert config.parallelism.world_size == 8
    assert config.rank_sequence_tokens == config.batch.sequence_length_tokens // 2
    assert config.dispatch_site.tokens.max_tokens == config.batch.micro_sequences * config.rank_sequence_tokens
    assert config.num_micro_batches == compose_run(["parallelism=four_ranks"]).num_micro_batches
