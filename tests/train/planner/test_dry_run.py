"""Comparison of built ranks with arithmetic: every difference beyond padding is named."""

from dataclasses import replace

from train.planner.dry_run import RankComparison, RankCounts, built_json, built_lines

HELD = RankCounts(parameters=5_343_227_904, weights=10_693_808_128, gradients=21_372_911_616, optimizer=1_554_241_920)


def test_equal_counts_and_padding_differ_in_nothing() -> None:
    assert HELD.differences(HELD) == ()
    assert replace(HELD, optimizer=HELD.optimizer + 144).differences(HELD) == ()


def test_each_difference_has_both_numbers() -> None:
    other = RankCounts(parameters=1, weights=2, gradients=3, optimizer=4)
    assert HELD.differences(other) == (
        "parameters: built 5,343,227,904, by arithmetic 1",
        "bytes of weights: built 10,693,808,128, by arithmetic 2",
        "bytes of gradients: built 21,372,911,616, by arithmetic 3",
        "bytes of optimizer: built 1,554,241,920, by arithmetic 4",
    )


def test_lines_name_all_ranks_within_100_columns() -> None:
    kinds = [
        RankComparison(pipeline_ranks=(0, 15), built=HELD, differences=()),
        RankComparison(pipeline_ranks=tuple(range(1, 15)), built=HELD, differences=("parameters: built 1, ...",)),
    ]
    header, equal, differs = built_lines(kinds)
    assert max(map(len, (header, equal, differs))) <= 100
    assert equal.split()[0] == "0,15"
    assert equal.endswith("equal")
    assert differs.split()[:2] == ["1..14", "(14)"]
    assert differs.endswith("differs")
    assert [each["equal"] for each in built_json(kinds)] == [True, False]
