"""The plan as text: 100 columns, the verdict first, and a table whose parts add up."""

import re

import pytest

from tests.train.planner.planned import PUBLISHED, plan_of, request_of
from train.planner.text import COLUMNS, labeled, plan_text
from train.planner.values import plan_values

RUNS = {
    "published": PUBLISHED,
    "priced": (*PUBLISHED, "cost.watts_per_gpu=700", "cost.gpu_mtbf_hours=50000"),
    "quickstart": ("experiment=quickstart",),
    "default": (),
    "too_large": ("model=v3_671b", "cluster=h800"),
}


def lines_of(name: str) -> list[str]:
    plan = plan_of(*RUNS[name])
    return plan_text(plan, plan_values(plan, request_of(*RUNS[name]).planner))


@pytest.mark.parametrize("name", RUNS)
def test_no_line_is_longer_than_100_columns(name: str) -> None:
    lines = lines_of(name)
    assert [line for line in lines if len(line) > COLUMNS] == []
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("published", r"fits: the largest rank, \d+, needs \d\d\.\d GB of 84\.9 GB"),
        ("too_large", r"does not fit: the largest rank, 0, needs \d+\.\d GB of 84\.9 GB"),
        ("quickstart", r"the largest rank, \d, needs \d+\.\d MB; cluster\.memory_bytes, .*, is not given"),
    ],
)
def test_first_line_says_whether_it_fits_and_names_the_largest_rank(name: str, first: str) -> None:
    line = lines_of(name)[0]
    assert re.fullmatch(first, line)
    assert f" {plan_of(*RUNS[name]).memory.worst.pipeline_rank}, " in line


@pytest.mark.parametrize("name", RUNS)
def test_table_of_memory_has_every_rank_and_its_parts_add_up(name: str) -> None:
    plan = plan_of(*RUNS[name])
    lines = lines_of(name)
    start = next(number for number, line in enumerate(lines) if line.startswith("memory of the pipeline ranks"))
    assert lines[start + 1].split()[0] == "ranks"
    ranks, unit = list[int](), {"GB": 1.0, "MB": 1e3}[lines[start][-2:]]
    for line in lines[start + 2 : lines.index("", start)]:
        named, *sizes = line.removesuffix(" %").split()
        first, _, last = named.partition("-")
        ranks += range(int(first), int(last or first) + 1)
        has_share = plan.config.cluster.memory_bytes is not None
        *parts, total = [float(size) for size in re.sub(r"(\d+\.\d) MB", _in_gb, " ".join(sizes)).split()][
            : -1 if has_share else None
        ]
        assert sum(parts) == pytest.approx(total, abs=0.05 * (len(parts) + 1))
        assert total == pytest.approx(plan.memory.ranks[ranks[-1]].total / 1e9 * unit, abs=0.05)
    assert ranks == list(range(plan.config.parallelism.pipeline))


def _in_gb(found: re.Match[str]) -> str:
    return f"{float(found[1]) / 1000:.4f}"


def test_columns_of_cost_have_units() -> None:
    lines = lines_of("priced")
    text = "\n".join(lines)
    header = next(line for line in lines if line.startswith("stage"))
    assert header.split() == ["stage", "billion", "tokens", "GPU-hours", "dollars", "days", "kWh"]
    assert "goodput" in text
    assert "context_extension: sequences of 32,768 and 131,072 tokens" in text


def test_a_number_stays_in_the_line_of_its_unit() -> None:
    text = " ".join(f"part {number} s" for number in range(100))
    for line in labeled("name", text):
        assert not line[11:].startswith("s ")
        assert len(line) <= COLUMNS
