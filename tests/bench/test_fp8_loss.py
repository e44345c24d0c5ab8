"""The comparison of losses computes gaps and draws curves."""

from pathlib import Path

import pytest

from tests.bench.fp8_loss import gap, smooth
from tests.bench.fp8_loss_picture import draw


def test_smoothing_is_an_exponential_mean() -> None:
    assert smooth([1.0, 2.0, 0.0]) == pytest.approx([1.0, 1.1, 0.99])


def test_gap_is_the_absolute_relative_distance_over_the_last_steps() -> None:
    bf16 = [4.0] * 300
    fp8 = [8.0] * 100 + [4.0] * 150 + [3.99] * 49 + [4.02]
    found = gap(1, bf16, fp8)
    assert found.largest == pytest.approx(0.005)
    assert found.mean == pytest.approx((49 * 0.0025 + 0.005) / 200)


def test_picture_is_the_same_for_the_same_numbers(tmp_path: Path) -> None:
    curves = {(kind, seed): [9.0 - 0.01 * step for step in range(40)] for kind in ("bf16", "fp8") for seed in (0, 1)}
    for name in ("a.svg", "b.svg", "c.png"):
        draw(curves, 0.0025, "a title", tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "a title" in (tmp_path / "a.svg").read_text()
    assert (tmp_path / "c.png").stat().st_size > 1000
