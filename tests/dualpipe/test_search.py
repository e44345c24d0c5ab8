"""The search over preferences keeps its makespan and effort, and is deterministic."""

from dualpipe.generate.builder import Attempt, Builder
from dualpipe.generate.dualpipe_split import empty
from dualpipe.generate.preferences import Preferences
from dualpipe.generate.search import Search
from dualpipe.simulate.costs import Costs, uniform


def builder_of(num_ranks: int, num_micro_batches: int) -> Builder:
    costs = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0)
    return Builder(empty(num_ranks, num_micro_batches), uniform(costs, num_ranks, num_ranks), num_ranks + 1)


def test_search_finds_orders_at_the_lower_bound() -> None:
    for num_ranks, num_micro_batches in ((2, 5), (3, 6), (4, 4), (5, 7), (6, 12)):
        makespan = 3 * num_micro_batches + (num_ranks - 1) // 2
        found: list[Attempt] = []

        def accept(_: Preferences, attempt: Attempt, found: list[Attempt] = found) -> bool:
            found.append(attempt)
            return True

        assert Search(300_000).run(builder_of(num_ranks, num_micro_batches), makespan, 300_000, accept)
        assert [attempt.time for attempt in found] == [makespan]


def test_search_stops_once_its_effort_is_spent() -> None:
    search = Search(20_000)
    assert not search.run(builder_of(4, 8), 3 * 8, 5_000, lambda *_: True)
    assert 20_000 - 5_000 - 4 * 3 * 8 * 2 < search.left <= 15_000
    assert not search.run(builder_of(4, 8), 3 * 8, 50_000, lambda *_: True)
    assert search.left <= 0


def test_search_is_deterministic() -> None:
    def walk() -> list[tuple[Preferences, Attempt]]:
        found: list[tuple[Preferences, Attempt]] = []

        def accept(preferences: Preferences, attempt: Attempt) -> bool:
            found.append((preferences, attempt))
            return len(found) == 3

        assert Search(300_000).run(builder_of(3, 7), 3 * 7 + 2, 300_000, accept)
        return found

    assert walk() == walk()
