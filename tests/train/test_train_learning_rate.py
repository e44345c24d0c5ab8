"""The learning rate's shape."""

from dataclasses import replace
from itertools import pairwise

import pytest

from tests.tiny import OPTIM
from train.optim.learning_rate import learning_rate

CONFIG = replace(
    OPTIM, learning_rate=1.0, final_learning_rate=0.1, warmup_steps=4, decay_start_step=10, decay_end_step=20
)


def test_learning_rate_warms_up_holds_decays_and_stays() -> None:
    rates = [learning_rate(CONFIG, step) for step in range(30)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(rates[4:11]) == {1.0}
    assert all(later < earlier for earlier, later in pairwise(rates[10:21]))
    assert rates[15] == pytest.approx(0.55)
    assert set(rates[20:]) == {0.1}
