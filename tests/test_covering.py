"""Tests of the covering sample of parameters."""

from itertools import combinations, product

import pytest

from tests.covering import covering


def test_a_sample_of_strength_2_holds_every_pair_in_far_fewer_cases_than_the_product() -> None:
    cases = [dict(zip("abcd", values, strict=True)) for values in product(range(4), repeat=4)]
    sample = [cases[position] for position in covering(cases)]
    assert 16 <= len(sample) <= 28
    for first, second in combinations("abcd", 2):
        assert {(case[first], case[second]) for case in sample} == set(product(range(4), repeat=2))
    assert covering(cases) == covering(cases)


@pytest.mark.covering(1)
@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("second", [1, 2, 3])
def test_cases_outside_the_sample_are_marked(request: pytest.FixtureRequest, first: int, second: int) -> None:
    cases = [item for item in request.session.items if item.name.startswith("test_cases_outside_the_sample")]
    is_marked = [item.get_closest_marker("exhaustive") is not None for item in cases]
    assert is_marked.count(False) in (1, 3)
