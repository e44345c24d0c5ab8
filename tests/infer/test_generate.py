"""Tests of generation: greedy tokens are the argmax, no result depends on its batch, and each ends correctly."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from infer.config import GenerateError, Sampling, Speculative
from infer.generate import Stream, generate
from model.transformer import Transformer
from tests.infer.models import SMALL, make_foresighted, make_model

PROMPTS = [[5, 9], [1, 2, 3, 4, 5, 6, 7], [8], [100, 200, 300], [7, 7, 7, 7]]
WARM = Sampling(temperature=0.9, top_k=50, top_p=0.95, seed=4)


def made(model: Transformer, prompts: list[list[int]], num_tokens: int, **options: object) -> list[list[int]]:
    generation = generate(model, prompts, max_new_tokens=num_tokens, **options)  # type: ignore[arg-type]
    return [list(continuation.tokens) for continuation in generation.continuations]


@pytest.mark.parametrize("speculative", [False, True])
def test_every_token_is_the_most_probable_after_those_before(speculative: Speculative) -> None:
    model = make_foresighted()
    for prompt, tokens in zip(PROMPTS, made(model, PROMPTS, 12, speculative=speculative), strict=True):
        assert len(tokens) == 12
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]]))
        assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), WARM])
def test_batch_size_changes_no_token(speculative: Speculative, sampling: Sampling) -> None:
    model = make_foresighted()
    options = {"sampling": sampling, "speculative": speculative, "stop": [3, 50, 111, 162]}
    alone = made(model, PROMPTS, 15, batch_size=1, **options)
    assert len({len(tokens) for tokens in alone}) > 1, "all end at the same length: nothing is ragged here"
    for batch_size in (2, 3, 16):
        assert made(model, PROMPTS, 15, batch_size=batch_size, **options) == alone


@pytest.mark.parametrize("speculative", [False, True])
def test_draws_depend_on_seed_and_number_not_on_other_prompts(speculative: Speculative) -> None:
    model = make_foresighted()
    options = {"sampling": WARM, "speculative": speculative}
    first = made(model, PROMPTS, 10, **options)
    others = [[9, 9, 9], *PROMPTS[1:3], [4], [11, 12]]
    again = made(model, others, 10, **options)
    assert again[1:3] == first[1:3]
    assert again[0] != first[0]
    assert made(model, PROMPTS, 10, sampling=replace(WARM, seed=5), speculative=speculative)[1] != first[1]
    twins = made(model, [PROMPTS[1]] * 4, 10, **options)
    assert len({tuple(tokens) for tokens in twins}) == 4


def test_top_k_of_one_and_tiny_temperature_are_greedy() -> None:
    model = make_model()
    greedy = made(model, PROMPTS, 10)
    assert made(model, PROMPTS, 10, sampling=Sampling(temperature=5.0, top_k=1)) == greedy
    assert made(model, PROMPTS, 10, sampling=Sampling(temperature=5.0, top_p=1e-9)) == greedy
    assert made(model, PROMPTS, 10, sampling=Sampling(temperature=1e-12)) == greedy


@pytest.mark.parametrize("speculative", [False, True])
def test_stop_tokens_end_and_are_left_out(speculative: Speculative) -> None:
    model = make_foresighted()
    (free,) = made(model, [[5, 9]], 12, speculative=speculative)
    for at, token in enumerate(free):
        end = free.index(token)
        generation = generate(model, [[5, 9]], max_new_tokens=12, stop=[token, 319], speculative=speculative)
        assert generation.continuations[0].tokens == tuple(free[:end]), at
        assert generation.continuations[0].finish == "stop"
    both = generate(model, [[5, 9]], max_new_tokens=12, stop=[free[7], free[4]], speculative=speculative)
    assert list(both.continuations[0].tokens) == free[: min(free.index(free[7]), free.index(free[4]))]


@pytest.mark.parametrize("speculative", [False, True])
def test_length_is_exact_and_never_passes_the_positions(speculative: Speculative) -> None:
    model = make_foresighted()
    (longest,) = made(model, [[1, 2, 3]], 9, speculative=False)
    for num_tokens in range(10):
        generation = generate(model, [[1, 2, 3]], max_new_tokens=num_tokens, speculative=speculative)
        assert list(generation.continuations[0].tokens) == longest[:num_tokens]
        assert generation.continuations[0].finish == "length"
    bounded = make_foresighted(replace(SMALL, max_position_tokens=8))
    prompts = [list(range(1, length + 1)) for length in (3, 7, 8)]
    assert [len(tokens) for tokens in made(bounded, prompts, 50, speculative=speculative)] == [5, 1, 0]
    assert made(bounded, prompts[:1], 50, speculative=speculative) == [longest[:5]]


@pytest.mark.parametrize("speculative", [False, True])
def test_stream_gives_the_same_tokens_as_they_are_made(speculative: Speculative) -> None:
    model = make_foresighted()
    options = {"max_new_tokens": 9, "sampling": WARM, "stop": [50, 111], "speculative": speculative}
    whole = generate(model, PROMPTS, batch_size=2, **options)  # type: ignore[arg-type]
    stream = Stream(model, PROMPTS, batch_size=2, **options)  # type: ignore[arg-type]
    assert stream.statistics.passes == 0
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    ended: list[int] = []
    largest = 0
    for piece in stream:
        assert piece.index not in ended
        tokens[piece.index] += piece.tokens
        largest = max(largest, len(piece.tokens))
        if piece.finish is not None:
            ended.append(piece.index)
            assert piece.finish == whole.continuations[piece.index].finish
    assert sorted(ended) == list(range(len(PROMPTS)))
    assert [tuple(made) for made in tokens] == [continuation.tokens for continuation in whole.continuations]
    assert largest == (2 if speculative else 1)
    assert replace(stream.statistics, seconds=0.0) == replace(whole.statistics, seconds=0.0)


@pytest.mark.parametrize("speculative", [False, True])
def test_caller_may_end_a_prompt_at_any_token(speculative: Speculative) -> None:
    model = make_foresighted()
    free = made(model, PROMPTS, 9, speculative=speculative)
    for at in range(9):
        calls: list[tuple[int, int]] = []

        def ends(index: int, token: int, calls: list[tuple[int, int]] = calls, at: int = at) -> bool:
            calls.append((index, token))
            return index == 1 and sum(number == 1 for number, _ in calls) == at + 1

        generation = generate(model, PROMPTS, max_new_tokens=9, speculative=speculative, stop_condition=ends)
        expected = [free[0], free[1][: at + 1], *free[2:]]
        assert [list(continuation.tokens) for continuation in generation.continuations] == expected
        assert generation.continuations[1].finish == "stop"
        assert [[token for number, token in calls if number == index] for index in range(5)] == expected


def test_statistics_without_drafts_count_a_pass_for_each_token() -> None:
    generation = generate(make_model(), PROMPTS, max_new_tokens=6, speculative=False)
    statistics = generation.statistics
    assert (statistics.passes, statistics.tokens, statistics.drafts_offered) == (30, 30, 0)
    assert (statistics.drafts_offered, statistics.acceptance_rate) == (0, 0.0)
    assert statistics.seconds > 0
    assert statistics.summary() == "no drafts, 30 passes"


def test_no_prompts_make_nothing() -> None:
    assert generate(make_model(), [], max_new_tokens=4).continuations == ()


def test_generation_records_no_gradients_and_no_load() -> None:
    model = make_model()
    generate(model, PROMPTS, max_new_tokens=4)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.load.any() for module in model.modules() if hasattr(module, "load"))


@pytest.mark.parametrize(
    ("prompts", "options", "parts"),
    [
        ([[1], []], {}, ["prompt 2", "at least one token"]),
        ([[1], [2, 320]], {}, ["prompt 2", "from 0 to 319", "320"]),
        ([[-1]], {}, ["prompt 1", "-1"]),
        ([[1] * 65], {}, ["prompt 1", "max_position_tokens=64", "65"]),
        ([[1]], {"max_new_tokens": -1}, ["max_new_tokens", "-1"]),
        ([[1]], {"batch_size": 0}, ["batch_size", "0"]),
    ],
)
def test_what_cannot_be_continued_is_rejected(
    prompts: list[list[int]], options: dict[str, int], parts: list[str]
) -> None:
    with pytest.raises(GenerateError) as refused:
        generate(make_model(), prompts, **{"max_new_tokens": 3, **options})
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), WARM])
def test_scores_that_are_no_numbers_are_rejected(speculative: Speculative, sampling: Sampling) -> None:
    model = make_model()
    with torch.no_grad():
        model.head_weight[7] = torch.nan
    with pytest.raises(GenerateError, match=r"^prompt 1: .*finite.* 0 new tokens"):
        generate(model, PROMPTS, max_new_tokens=3, sampling=sampling, speculative=speculative)


def test_drafter_that_gives_no_numbers_costs_its_drafts_alone() -> None:
    for sampling in (Sampling(), WARM):
        model = make_model()
        expected = generate(model, PROMPTS, max_new_tokens=5, speculative=False).continuations
        with torch.no_grad():
            model.mtp_block(1).eh_proj.weight.fill_(torch.nan)
        made_with = generate(model, PROMPTS, max_new_tokens=5, sampling=sampling, speculative=True)
        assert made_with.statistics.tokens == 25
        assert sampling.temperature > 0 or made_with.continuations == expected


def test_drafts_without_an_mtp_module_are_rejected_and_auto_does_without() -> None:
    model = make_model(replace(SMALL, mtp_depth=0))
    with pytest.raises(GenerateError, match=r"^speculative: .*MTP"):
        generate(model, [[1]], max_new_tokens=3, speculative=True)
    assert generate(model, [[1]], max_new_tokens=3).statistics.drafts_offered == 0


def test_latent_of_an_odd_size_is_decoded_one_token_at_a_time() -> None:
    model = make_model(replace(SMALL, kv_lora_rank=7), torch.float32)
    (tokens,) = made(model, [[5]], 6, speculative=False)
    with torch.no_grad():
        logits = model(torch.tensor([[5, *tokens]]))
    assert logits[0, :-1].argmax(-1).tolist() == tokens


@pytest.mark.parametrize("as_given", [torch.tensor, np.array, lambda ids: tuple(np.int64(token) for token in ids)])
def test_prompts_may_be_rows_of_numbers_of_any_kind(as_given: Callable[[list[int]], Sequence[int]]) -> None:
    model = make_model()
    assert made(model, [as_given(prompt) for prompt in PROMPTS], 4) == made(model, PROMPTS, 4)  # type: ignore[misc]


@pytest.mark.parametrize("prompt", [[1.5], "ab", 3, [[1]]])
def test_prompt_that_is_no_list_of_ids_is_rejected(prompt: object) -> None:
    with pytest.raises(GenerateError, match=r"^prompt 2: must be a list of token ids"):
        generate(make_model(), [[1], prompt], max_new_tokens=2)  # type: ignore[list-item]
