"""The work of a start grows linearly, and messages of watchdogs do not grow (`bench.scale` has sizes)."""

import pytest

from bench.scale.groups import measure, published_layout
from bench.scale.rendezvous import (
    LIMIT_SECONDS,
    LIMITED_RANKS,
    CountedStore,
    Simulation,
    count_requests,
    opened_server,
)
from bench.scale.watchdog import LIMIT_BYTES, inquire, longest_messages, training_messages


@pytest.mark.slow
def test_requests_and_longest_record_of_a_rendezvous_grow_linearly() -> None:
    small, large = count_requests(128, fanout=8), count_requests(1024, fanout=8)
    assert small.requests / 128 < 25
    assert large.requests / 1024 == pytest.approx(small.requests / 128, rel=0.05)
    assert max(small.longest_bytes, large.longest_bytes) < 1000
    assert count_requests(1024).longest_bytes < 5000


@pytest.mark.slow
def test_real_store_serves_a_rendezvous_within_its_limit() -> None:
    with opened_server() as (store, cpu):
        work = Simulation(256, store, cpu).run()
    counted = Simulation(256, CountedStore(), lambda: 0.0).run()
    assert work.requests == counted.requests
    assert work.seconds < LIMIT_SECONDS * 256 / LIMITED_RANKS  # 0.05 of 0.9 s on free cores


def test_longest_message_fits_a_datagram_at_any_size_even_if_nothing_in_it_repeats() -> None:
    for num_ranks in (64, 2048, 100_352, 4_000_000):
        longest = longest_messages(num_ranks)
        assert max(longest.values()) < LIMIT_BYTES / 2, longest
    for num_ranks in (2048, 100_352):
        messages = training_messages(num_ranks)
        assert max(messages.values()) < 8192, messages
        assert max(messages["state"], messages["verdict"]) < 1500, messages  # one packet of a network


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_one_rank_asks_each_rank_once_and_names_the_silent_one() -> None:
    figures = inquire(500)
    assert figures.verdict.text == (
        "rank 498 did not reach a collective within 0.2 s and did not respond: stopped or disconnected; "
        "ranks 0 to 497 and 499 waited for sum of losses (number 0 of group world [0 to 499])"
    )
    assert tuple(figures.verdict.culprits) == (498,)
    # A request and a reply of each rank, some requests to the silent one, and rank 0's notices and verdicts.
    assert figures.num_datagrams < 2 * 500 + 10 * 64
    assert figures.seconds < 6


@pytest.mark.long
def test_groups_of_100352_ranks_take_under_a_second_of_arithmetic_and_no_memory_that_grows() -> None:
    layout = published_layout(100_352)
    found = measure(layout.world_size)
    assert found["groups: arithmetic of all partitions, s"] < 1  # 0.014 on free cores
    assert found["groups: peak memory of the arithmetic, bytes"] < 2**20
    assert found["groups: expert, stage and expert-data groups, s"] < 1  # 0.04 on free cores
    # Expert, stage, expert-data, rail, node and pipeline groups are one each; links are 4 for each of 2 pairs.
    assert found["groups: of them for groups of the rank"] == 6 + 4 * 2


@pytest.mark.slow
def test_calls_of_new_group_grow_linearly() -> None:
    small, large = (measure(num_ranks)["groups: calls of new_group"] for num_ranks in (1024, 4096))
    assert large < 4 * small
