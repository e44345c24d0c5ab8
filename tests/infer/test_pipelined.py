"""Tests of the parts of the pipelined engine that need no ranks: plans, caches and the programs of cohorts."""

import random

import pytest
import torch

from infer.config import GenerateError
from infer.engines.pipelined.engine import CohortSizes
from infer.engines.pipelined.plan import NOTHING, Cohort, RoundFormat, RoundPlan
from model.attention.kv_cache import KvCache


def test_packed_rounds_are_unpacked() -> None:
    generator, cpu = random.Random(2), torch.device("cpu")
    form = RoundFormat(max_rows=5, hidden_size=6, dtype=torch.bfloat16)
    for kind in ("prompts", "chunk", "step"):
        for num_rows in range(6):
            counts = tuple(generator.randrange(3) for _ in range(num_rows))
            plan = RoundPlan(
                kind=kind,
                sources=tuple(generator.randrange(-1, 5) for _ in range(num_rows)),
                lengths=tuple(generator.randrange(9) for _ in range(num_rows)),
                counts=counts,
                places=tuple(generator.randrange(50) for _ in range(num_rows)),
            )
            assert plan.rows == tuple(row for row in range(num_rows) if counts[row])
            tokens_N = torch.randint(0, 2**40, (plan.num_tokens,))
            hidden_ND = torch.randn(plan.num_tokens, 6, dtype=torch.bfloat16)
            packed = form.pack(plan, tokens_N, cpu)
            found, payload = form.unpack(packed)
            assert found == plan
            assert torch.equal(form.token_ids(payload), tokens_N)
            assert len(payload) == form.num_payload_bytes("tokens", packed[: form.plan_bytes])
            packed = form.pack(plan, hidden_ND, cpu)
            found, payload = form.unpack(packed)
            assert found == plan
            assert torch.equal(form.hidden(payload), hidden_ND)
            assert len(payload) == form.num_payload_bytes("activation", packed[: form.plan_bytes])
    empty = form.pack(RoundPlan(), None, cpu)
    assert len(empty) == form.plan_bytes
    assert form.unpack(empty)[0] == RoundPlan()


def test_cache_rows_follow_their_sources() -> None:
    generator = random.Random(3)
    cache = KvCache(2, 3, 6, 8, torch.float64, torch.device("cpu"))
    held: list[torch.Tensor] = []  # each row's tokens, [layers, T, values]
    for _ in range(200):
        sources, lengths = [], []
        for _ in range(generator.randrange(7)):
            source = generator.randrange(-1, len(held))
            sources.append(source)
            lengths.append(0 if source < 0 else generator.randrange(held[source].shape[1] + 1))
        cache.arrange(sources, lengths)
        held = [
            held[source][:, :length].clone() if source >= 0 else torch.empty(3, 0, 2, dtype=torch.float64)
            for source, length in zip(sources, lengths, strict=True)
        ]
        for row, values in enumerate(held):
            num_new = generator.randrange(9 - values.shape[1])
            new = torch.rand(3, num_new, 2, dtype=torch.float64)
            for layer in range(3):
                cache.write_row(layer, row, values.shape[1], new[layer])
            held[row] = torch.cat((values, new), 1)
            cache.resize(row, held[row].shape[1])
        for row, values in enumerate(held):
            for layer in range(3):
                read = cache.read(layer, slice(row, row + 1), values.shape[1])[0]
                assert torch.equal(read, values[layer])


def test_cohort_alternates_with_its_caller_and_ends() -> None:
    seen: list[float] = []
    plans = [RoundPlan(sources=(0,), lengths=(number,), counts=(1,), places=(0,)) for number in range(3)]

    def program() -> None:
        assert not torch.is_grad_enabled()
        for plan in plans:
            seen.append(float(cohort.exchange(plan, torch.tensor([1]))))

    cohort = Cohort(program, "test")
    found = [cohort.start()[0]]
    for number in range(3):
        assert cohort.is_running
        found.append(cohort.resume(torch.tensor(float(number)))[0])
    assert found == [*plans, NOTHING[0]]
    assert seen == [0.0, 1.0, 2.0]
    assert not cohort.is_running
    cohort.close()


def test_cohort_that_is_closed_leaves_no_thread() -> None:
    cohort = Cohort(lambda: cohort.exchange(RoundPlan(), torch.tensor([1])) and None, "test")
    cohort.start()
    thread = cohort._thread
    assert thread.is_alive()
    cohort.close()
    assert not thread.is_alive()


@pytest.mark.parametrize("error", [GenerateError("prompt 1: wrong"), RuntimeError("a bug")])
def test_cohort_keeps_errors_of_the_user_and_raises_others(error: Exception) -> None:
    def program() -> None:
        cohort.exchange(RoundPlan(sources=(-1,), lengths=(0,), counts=(1,), places=(0,)), torch.tensor([1]))
        raise error

    cohort = Cohort(program, "test")
    cohort.start()
    if isinstance(error, GenerateError):
        assert cohort.resume(torch.tensor(0.0)) is NOTHING
        assert cohort.error is error
    else:
        with pytest.raises(RuntimeError, match="a bug"):
            cohort.resume(torch.tensor(0.0))
    assert not cohort.is_running


@pytest.mark.parametrize("name", ["cohorts", "max_rows", "prefill_tokens"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(GenerateError, match=f"{name}: must be at least 1, is 0; nearest valid: 1"):
        CohortSizes(**{name: 0})
