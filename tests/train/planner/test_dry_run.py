"""Comparison of built ranks with arithmetic: every difference beyond padding is named."""

from train.planner.built_ranks import BuiltRank, compared_kind
from train.planner.text import built_text

SIZES = {
    "parameters": 5_343_227_904,
    "weights_bytes": 10_693_808_128,
    "gradients_bytes": 21_372_911_616,
    "optimiser_bytes": 1_554_241_920,
}


def built(*ranks: int) -> BuiltRank:
    parameters, weights, gradients, optimizer = SIZES.values()
    return BuiltRank(
        rank=0,
        pipeline_rank=ranks[0],
        pipeline_ranks=ranks,
        parameters=parameters,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
    )


def test_equal_counts_and_padding_differ_in_nothing() -> None:
    padded = {**SIZES, "optimiser_bytes": SIZES["optimiser_bytes"] + 144}
    kind = compared_kind(built(0, 15), {0: SIZES, 15: padded})
    assert kind == {"pipeline_ranks": [0, 15], **SIZES, "equal": True, "differences": []}


def test_each_difference_of_any_rank_has_both_numbers() -> None:
    other = dict(zip(SIZES, (1, 2, 3, 4), strict=True))
    assert compared_kind(built(0, 15), {0: SIZES, 15: other})["differences"] == [
        "parameters: built 5,343,227,904, by arithmetic 1",
        "bytes of weights: built 10,693,808,128, by arithmetic 2",
        "bytes of gradients: built 21,372,911,616, by arithmetic 3",
        "bytes of optimizer: built 1,554,241,920, by arithmetic 4",
    ]


def test_lines_name_all_ranks_within_100_columns() -> None:
    others = range(1, 15)
    counted = {rank: {**SIZES, "parameters": 1} for rank in others}
    header, equal, differs = built_text(
        [compared_kind(built(0, 15), {0: SIZES, 15: SIZES}), compared_kind(built(*others), counted)]
    )
    assert max(map(len, (header, equal, differs))) <= 100
    assert equal.split()[0] == "0,15"
    assert equal.endswith("equal")
    assert differs.split()[:2] == ["1..14", "(14)"]
    assert differs.endswith("differs")
