"""Tests of the covering sample of parameters."""

from itertools import combinations, product

import pytest

from tests.covering import covering


def test_a_sample_of_strength_1_holds_every_value_in_as_many_cases_as_the_longest_axis() -> None:
    cases = [{"a": a, "b": b, "c": c} for a, b, c in product(range(5), "xyz", (True, False))]
    sample = [cases[position] for position in covering(cases, 1)]
    assert len(sample) == 5
    assert {case["a"] for case in sample} == set(range(5))
    assert {case["b"] for case in sample} == set("xyz")
    assert {case["c"] for case in sample} == {True, False}


def test_a_sample_of_strength_2_holds_every_pair_in_far_fewer_cases_than_the_product() -> None:
    cases = [dict(zip("abcd", values, strict=True)) for values in product(range(4), repeat=4)]
    sample = [cases[position] for position in covering(cases)]
    assert 16 <= len(sample) <= 28
    for first, second in combinations("abcd", 2):
        assert {(case[first], case[second]) for case in sample} == set(product(range(4), repeat=2))
    assert covering(cases) == covering(cases)


def test_a_sample_of_one_parameter_holds_every_case() -> None:
    assert covering([{"a": value} for value in range(7)]) == set(range(7))


@pytest.mark.covering(1)
@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("second", [1, 2, 3])
def test_cases_outside_the_sample_are_marked(request: pytest.FixtureRequest, first: int, second: int) -> None:
    cases = [item for item in request.session.items if item.name.startswith("test_cases_outside_the_sample")]
    is_marked = [item.get_closest_marker("exhaustive") is not None for item in cases]
    assert is_marked.count(False) in (1, 3)
