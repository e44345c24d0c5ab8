from typing import Any

from torch import distributed

from comm.agreement import (
    MOST_REPORTS,
    Reports,
    compare_with_first_rank,
    exchange_reports,
    gather_on_first,
    gather_present,
    sum_over_ranks,
)
from tests.ranks import run_ranks

_SIZE = 10
_VALUES = {1: ["a", "long value " * 100], 4: {"b": 2}, 9: ("c",)}


def _agree(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {"sums": sum_over_ranks([rank, 1])}
    found["none"] = exchange_reports(None)
    found["empty text"] = exchange_reports("" if rank == 2 else None)
    found["two"] = exchange_reports({3: "third", 7: "x" * 5000}.get(rank))
    found["all"] = exchange_reports(f"report of {rank}")
    found["equal"] = compare_with_first_rank("same")
    found["different"] = compare_with_first_rank("same" if rank % 4 else f"own {rank}")
    found["present"] = gather_present(_VALUES.get(rank))
    found["no values"] = gather_present(None)
    found["texts"] = gather_on_first("é" * rank)
    group = distributed.new_group(list(range(1, world_size)))
    if rank:
        # The group's first rank is rank 1 of the world.
        found["in group"] = exchange_reports("of the last" if rank == world_size - 1 else None, group)
        found["texts of group"] = gather_on_first(str(rank), group)
        found["first of group"] = compare_with_first_rank(str(rank), group)[0]
    return found


def test_ranks_agree_on_sums_reports_and_values() -> None:
    ranks = run_ranks(_SIZE, _agree)
    for rank, found in enumerate(ranks):
        assert found["sums"] == [sum(range(_SIZE)), _SIZE], rank
        assert found["none"] == Reports(0, ()), rank
        assert [(each.rank, each.text) for each in found["empty text"].first] == [(2, "")], rank
        two = found["two"]
        assert two.name_ranks() == "ranks 3, 7", rank
        assert (two.first_text, len(two.first[1].text)) == ("third", 4000), rank
        assert found["all"].name_ranks() == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 others", rank
        assert [each.text for each in found["all"].first] == [f"report of {low}" for low in range(MOST_REPORTS)], rank
        assert found["equal"] == ("same", Reports(0, ())), rank
        expected, others = found["different"]
        assert (expected, others.total, others.first[0].text) == ("own 0", _SIZE - 1, "same"), rank
        assert found["present"] == list(_VALUES.values()), rank
        assert found["no values"] == [], rank
        assert found["texts"] == (["é" * each for each in range(_SIZE)] if rank == 0 else None), rank
        if rank:
            assert [(each.rank, each.text) for each in found["in group"].first] == [(_SIZE - 2, "of the last")], rank
            assert found["texts of group"] == ([str(each) for each in range(1, _SIZE)] if rank == 1 else None), rank
            assert found["first of group"] == "1", rank


def _name_alone(rank: int, world_size: int) -> str:
    return exchange_reports("alone").name_ranks()


def test_one_report_names_one_rank() -> None:
    (found,) = run_ranks(1, _name_alone)
    assert found == "rank 0"
