"""The learning rate's course: every kind of schedule, spans of every unit, and what is worth a warning."""

from dataclasses import replace
from itertools import pairwise

import pytest

from data.config import BatchRamp, BatchSizes
from launch.config.run import compose_run
from launch.train import preview
from tests.tiny import OPTIM
from train.config import TrainConfig
from train.optim.learning_rate import DecayedRate, Duration, OptimConfig, WsdRate, learning_rate, schedule_warnings

SIZES = BatchSizes(4, 8)


def build(*overrides: str) -> TrainConfig:
    return compose_run(overrides)


def rates(config: OptimConfig, num_steps: int, sizes: BatchSizes = SIZES) -> list[float]:
    return [learning_rate(config, sizes, num_steps, step) for step in range(num_steps)]


def decayed(kind: str, start: str = "10 steps", end: str = "20 steps", ratio: float = 0.1) -> OptimConfig:
    schedule = DecayedRate(
        kind=kind,
        warmup=Duration.from_plain("4 steps"),
        decay_start=Duration.from_plain(start),
        decay_end=Duration.from_plain(end),
        final_ratio=ratio,
    )
    return replace(OPTIM, learning_rate=1.0, schedule=schedule)


def test_learning_rate_warms_up_holds_decays_and_stays() -> None:
    seen = rates(decayed("cosine"), 30)
    assert seen[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(seen[4:11]) == {1.0}
    assert all(later < earlier for earlier, later in pairwise(seen[10:21]))
    assert seen[15] == pytest.approx(0.55)
    assert seen[20:] == pytest.approx([0.1] * 10)


def test_learning_rate_linear_is_a_straight_line_to_the_final_rate() -> None:
    seen = rates(decayed("linear"), 30)
    assert seen[10:21] == pytest.approx([1 - 0.09 * step for step in range(11)])


@pytest.mark.parametrize("unit", ["steps", "tokens", "%"])
def test_learning_rate_is_equal_for_every_unit_of_duration(unit: str) -> None:
    """The run has 40 steps of 32 tokens each."""
    scale = {"steps": 1.0, "tokens": 32.0, "%": 2.5}[unit]
    for kind in ("cosine", "linear"):
        spans = [f"{steps * scale:g} {unit}" for steps in (10, 20)]
        assert rates(decayed(kind, *spans), 40) == rates(decayed(kind), 40)  # type: ignore[arg-type]


def test_learning_rate_of_every_kind_fits_a_run_of_any_length() -> None:
    for kind in ("cosine", "linear", "wsd"):
        for num_steps in (40, 2000):
            config = build(f"optim/schedule={kind}").optim
            seen = rates(config, num_steps)
            peak, half = max(seen), seen[num_steps // 2]
            assert peak == pytest.approx(config.learning_rate)
            assert seen.index(peak) + 1 == pytest.approx(num_steps * 0.1, abs=1)
            assert half > 0.45 * peak
            assert seen[-1] < 0.2 * peak
            assert not schedule_warnings(config, SIZES, num_steps)


def test_learning_rate_after_a_resume_with_more_steps_follows_the_longer_run() -> None:
    """Durations in steps keep their place, shares of the run move, and wsd before its decay does not change."""
    in_steps, in_shares = decayed("linear"), decayed("linear", "25 %", "50 %")
    assert rates(in_steps, 80)[:40] == rates(in_steps, 40)
    assert rates(in_shares, 40)[15] == pytest.approx(0.55)
    assert rates(in_shares, 80)[15] == 1.0
    wsd = build("optim/schedule=wsd", "optim.schedule.warmup=4 steps").optim
    assert rates(wsd, 80)[:32] == rates(wsd, 40)[:32]


def test_learning_rate_wsd_is_stable_until_its_last_part() -> None:
    def seen(decay: str, shape: str) -> list[float]:
        schedule = WsdRate(
            kind="wsd",
            warmup=Duration.from_plain("0 %"),
            decay=Duration.from_plain(decay),
            decay_shape=shape,  # type: ignore[arg-type]
            final_ratio=0.0,
        )
        return rates(replace(OPTIM, learning_rate=1.0, schedule=schedule), 20)

    for decay in ("25 %", "5 steps", "160 tokens"):
        assert seen(decay, "linear") == pytest.approx([1.0] * 16 + [0.8, 0.6, 0.4, 0.2])
        assert seen(decay, "one_minus_sqrt")[15:] == pytest.approx([1 - (step / 5) ** 0.5 for step in range(5)])


def test_learning_rate_constant_only_has_a_warm_up() -> None:
    config = replace(build("optim/schedule=constant").optim, learning_rate=1.0)
    assert rates(config, 50)[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert set(rates(config, 50)[4:]) == {1.0}


def test_learning_rate_by_tokens_equals_the_technical_report() -> None:
    """Compares with arXiv:2412.19437, section 4.2: billions of tokens, and a warm-up in steps."""
    config, sizes = build("optim=adamw_v3").optim, BatchSizes(15_360, 4096)
    warm = [learning_rate(config, sizes, 240_000, step) for step in (0, 999, 1999)]
    assert warm == pytest.approx([1.1e-7, 1.1e-4, 2.2e-4])
    published = {2_000: 2.2e-4, 9_999: 2.2e-4, 12_150: (2.2e-4 + 2.2e-5) / 2, 14_301: 2.2e-5, 14_632: 2.2e-5}
    published |= {14_634: 7.3e-6, 14_800: 7.3e-6}
    for billions, rate in published.items():
        step = round(billions * 10**9 / (15_360 * 4096))
        assert learning_rate(config, sizes, 240_000, step) == pytest.approx(rate, rel=1e-4), billions


def test_learning_rate_of_a_batch_ramp_is_measured_in_tokens() -> None:
    sizes = BatchSizes(8, 10, BatchRamp(start_sequences=2, end_tokens=200, num_sizes=2))
    assert [sizes.tokens_before(step) for step in (0, 10, 20, 25)] == [0, 200, 1000, 1400]
    config = decayed("linear", "200 tokens", "50 %", 0.0)
    assert rates(config, 25, sizes)[10:17] == pytest.approx([1.0, 0.84, 0.68, 0.52, 0.36, 0.2, 0.04])


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["optim.schedule.warmup=200 steps"],
            ["optim.schedule.warmup", "longer than the run", "200 steps"],
        ),
        (
            ["optim.schedule.warmup=9 steps", "optim.schedule.decay_end=20 steps", "task.steps=2000"],
            ["optim.schedule.decay_end", "1 %", "2,000 steps"],
        ),
        (["optim=adamw_v3"], ["optim.schedule.warmup", "2000 steps"]),
        (["optim.schedule.decay_end=50 steps"], []),
        (["optim/schedule=wsd", "optim.schedule.decay=90 %"], []),
    ],
)
def test_schedule_that_does_not_fit_the_run_gives_a_warning(overrides: list[str], parts: list[str]) -> None:
    config = build(*overrides)
    lines = schedule_warnings(config.optim, config.batch_sizes, config.task.steps)
    assert len(lines) == bool(parts)
    assert all(part in lines[0] for part in parts)
    assert all("\n" not in line for line in lines)
    shown = preview(overrides).splitlines()
    assert [line for line in shown if line.startswith("# warning: ")] == [f"# warning: {line}" for line in lines]


def test_duration_reads_what_it_writes() -> None:
    for text, plain in (
        ("5 %", "5 %"), ("2.5%", "2.5 %"), ("2000 steps", "2000 steps"), ("1 step", "1 steps"),
        ("14.633e12 tokens", "14633000000000 tokens"), ("10_000tokens", "10000 tokens"), (0, "0 %"),
    ):  # fmt: skip
        assert Duration.from_plain(text).to_plain() == plain
        assert Duration.from_plain(plain) == Duration.from_plain(text)
