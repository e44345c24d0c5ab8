"""The learning rate's shape."""

from dataclasses import fields, replace
from itertools import pairwise

import pytest

from launch.compose import compose
from launch.config import read_config
from tests.tiny import OPTIM
from train.config import TokenOptimConfig
from train.optim.learning_rate import learning_rate

CONFIG = replace(
    OPTIM, learning_rate=1.0, final_learning_rate=0.1, warmup_steps=4, decay_start_step=10, decay_end_step=20
)


def test_learning_rate_warms_up_holds_decays_and_stays() -> None:
    rates = [learning_rate(CONFIG, step, 0) for step in range(30)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(rates[4:11]) == {1.0}
    assert all(later < earlier for earlier, later in pairwise(rates[10:21]))
    assert rates[15] == pytest.approx(0.55)
    assert set(rates[20:]) == {0.1}


def test_learning_rate_by_tokens_is_the_reports() -> None:
    """arXiv:2412.19437, section 4.2; T tokens, warm-up in steps."""
    config = read_config(compose("train", ["optim=adamw_v3"])).optim
    assert [learning_rate(config, step, 0) for step in (0, 999, 1999)] == pytest.approx([1.1e-7, 1.1e-4, 2.2e-4])
    told = {2_000: 2.2e-4, 10_000: 2.2e-4, 12_150: (2.2e-4 + 2.2e-5) / 2, 14_300: 2.2e-5, 14_632: 2.2e-5}
    told |= {14_633: 7.3e-6, 14_800: 7.3e-6}
    for billions, rate in told.items():
        assert learning_rate(config, 100_000, billions * 10**9) == pytest.approx(rate, rel=1e-12), billions


def test_learning_rate_by_tokens_is_that_by_steps_where_steps_are_equal() -> None:
    shared = {
        field.name: getattr(CONFIG, field.name) for field in fields(CONFIG) if field.name[:5] not in ("kind", "decay")
    }
    spans = {"decay_start_tokens": 70, "decay_end_tokens": 140, "last_start_tokens": 1000, "last_learning_rate": 0.0}
    by_tokens = TokenOptimConfig(kind="tokens", **shared, **spans)
    for step in range(40):
        assert learning_rate(by_tokens, step, step * 7) == learning_rate(CONFIG, step, 0)
    assert learning_rate(by_tokens, 143, 1001) == 0.0
