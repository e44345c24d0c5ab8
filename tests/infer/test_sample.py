"""Sampling equals a plain reference, and drafts change neither greedy tokens nor distributions."""

import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from infer.config import GenerateError, Sampling
from infer.sample import SequenceRandom, distribution, draw, log_probs, num_times, verify
from model.config import ModelConfig
from model.transformer import Transformer
from tests.infer.continuing import generate
from tests.infer.models import SHAPES, SMALL, chi_square, make_foresighted, make_model, whole_pass


def plainly(logits: list[float], sampling: Sampling) -> list[float]:
    """Computes the reference: tokens sorted by logit, the first k, then the first that reach p together."""
    if sampling.temperature == 0:
        best = logits.index(max(logits))
        return [float(token == best) for token in range(len(logits))]
    weights = [(2.718281828459045 ** (score / sampling.temperature), token) for token, score in enumerate(logits)]
    weights = sorted(weights, reverse=True)[: sampling.top_k or len(logits)]
    total = sum(weight for weight, _ in weights)
    kept, mass = [], 0.0
    for weight, token in weights:
        if mass / total >= sampling.top_p:
            break
        kept.append((weight, token))
        mass += weight
    probabilities = [0.0] * len(logits)
    for weight, token in kept:
        probabilities[token] = weight / mass
    return probabilities


@pytest.mark.covering(2)
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 5, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_distribution_equals_plain_reading(temperature: float, top_k: int | None, top_p: float) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = torch.randn(4, 23, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    made = distribution(logits, sampling)
    expected = [plainly(row, sampling) for row in logits.tolist()]
    torch.testing.assert_close(made, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    narrow = distribution(logits.to(torch.bfloat16), sampling)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.sum(-1), torch.ones(4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("temperature", [1e-30, 1e-39, 1e-46, 5e-324])
def test_distribution_of_a_tiny_temperature_is_the_best_token(temperature: float) -> None:
    logits = torch.tensor([[1e4, -3e4, 9.9e3]])
    for scores in (logits, logits.to(torch.bfloat16), logits.double()):
        assert distribution(scores, Sampling(temperature=temperature)).tolist() == [[1.0, 0.0, 0.0]]


def test_distribution_of_equal_scores_keeps_k() -> None:
    made = distribution(torch.zeros(1, 7), Sampling(temperature=1.0, top_k=3))
    assert sorted(made[0].tolist(), reverse=True) == pytest.approx([1 / 3] * 3 + [0.0] * 4)
    assert distribution(torch.zeros(1, 7), Sampling()).argmax() == 0


@pytest.mark.parametrize(("top_p", "count"), [(0.25, 1), (0.5, 2), (0.75, 3), (0.7500001, 4)])
def test_top_p_that_tokens_reach_exactly_keeps_no_further_token(top_p: float, count: int) -> None:
    """Four equal tokens have a probability of exactly 1/4, and their sums are exact."""
    made = distribution(torch.zeros(1, 4, dtype=torch.float64), Sampling(temperature=1.0, top_p=top_p))
    assert made[0].tolist() == pytest.approx([1 / count] * count + [0.0] * (4 - count))


def test_draws_follow_their_distribution() -> None:
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.01, 0.5, 0.0])
    counts = torch.bincount(draw(weights.expand(100_000, 7), times_of(100_000, 7)), minlength=7)
    statistic, limit = chi_square(counts, (weights / weights.sum()).to(torch.float64))
    assert statistic < limit


@pytest.mark.parametrize("time", [2.0**-1000, 1.0, 50.0])
def test_draw_never_gives_what_has_no_weight(time: float) -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1e-30], [1e-3, 0.0, 0.0]])
    times = torch.full((3, num_times(3)), time, dtype=torch.float64)
    times[:, ::2] = 50.0
    assert draw(weights, times).tolist() == [1, 2, 0]


def test_equal_times_mostly_draw_the_same_token_from_similar_weights() -> None:
    """Without groups the probability is at least (1 - d) / (1 + d), d the variation distance. Groups cost a bit."""
    generator = torch.Generator().manual_seed(6)
    target = (2 * torch.randn(1, 300, generator=generator, dtype=torch.float64)).softmax(-1).expand(20_000, 300)
    times = times_of(20_000, 300)
    assert draw(target, times).equal(draw(7 * target, times))
    for noise in (0.1, 0.5):
        near = target[:1].log() + noise * torch.randn(1, 300, generator=generator, dtype=torch.float64)
        draft = near.softmax(-1).expand(20_000, 300)
        distance = float((target[0] - draft[0]).abs().sum()) / 2
        same = float((draw(target, times) == draw(draft, times)).double().mean())
        assert (1 - distance) / (1 + distance) - 0.05 < same < 1 - distance


def test_random_numbers_of_a_draw_are_read_twice() -> None:
    random, again = SequenceRandom(4, 1), SequenceRandom(4, 1)
    first = [random.times(5, number).tolist() for number in (0, 1, 0, 1, 3, 2)]
    assert [again.times(5, None).tolist() for _ in range(4)] == [*first[:2], first[5], first[4]]
    assert first[:2] == first[2:4]


def test_draws_of_prompts_and_seeds_differ() -> None:
    drawn = {
        (seed, index): tuple(SequenceRandom(seed, index).uniform(3).tolist()) for seed in range(5) for index in range(5)
    }
    assert len(set(drawn.values())) == 25
    assert SequenceRandom(2, 3).uniform(3).tolist() == list(drawn[2, 3])
    one_by_one = SequenceRandom(2, 3)
    assert [float(one_by_one.uniform(1)) for _ in range(3)] == list(drawn[2, 3])


def test_draws_depend_on_all_bits_of_all_numbers() -> None:
    """A step of 2**40 must not draw what step 0 draws, as a seed of 32 bits would."""
    bits = [0, *(2**bit for bit in range(63))]
    numbers = [[0] * place + [bit] + [0] * (3 - place) for place in range(4) for bit in bits]
    drawn = {tuple(each): float(SequenceRandom(*each).uniform(1)) for each in numbers}
    assert len(set(drawn.values())) == len(drawn) == 4 * 63 + 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("temperature", value) for value in (-0.1, float("nan"), float("inf"))),
        *(("top_p", value) for value in (0.0, -1.0, 1.5, float("nan"))),
        *(("top_k", value) for value in (0, -3)),
        ("seed", -1),
    ],
)
def test_sampling_out_of_range_is_rejected(key: str, value: float) -> None:
    with pytest.raises(GenerateError, match=rf"^{key}: .*{value}"):
        Sampling(**{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_min_p_keeps_tokens_near_the_most_probable_one(min_p: float, top_p: float) -> None:
    logits = torch.randn(4, 23, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2
    whole = distribution(logits, Sampling(temperature=0.8, top_p=top_p))
    expected = whole.masked_fill(whole < min_p * whole.amax(-1, keepdim=True), 0)
    made = distribution(logits, Sampling(temperature=0.8, top_p=top_p, min_p=min_p))
    torch.testing.assert_close(made, expected / expected.sum(-1, keepdim=True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.5])
def test_log_probs_are_those_of_all_tokens_at_the_temperature(temperature: float) -> None:
    logits, tokens = torch.tensor([[1.0, 2.0, 4.0], [0.0, -1e4, 5.0]]), torch.tensor([1, 1])
    expected = (logits / (temperature or 1)).log_softmax(-1)[[0, 1], tokens]
    made = log_probs(logits, tokens, Sampling(temperature=temperature, top_k=1))
    torch.testing.assert_close(made, expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_p": 1.5}, "min_p: must be from 0 to 1, is 1.5; nearest valid: 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: must be finite and above 0, is 0.0; nearest valid: 1"),
        ({"presence_penalty": float("nan")}, "presence_penalty: must be finite, is nan; nearest valid: 0"),
    ],
)
def test_min_p_and_penalties_out_of_range_are_rejected(values: dict[str, float], message: str) -> None:
    with pytest.raises(GenerateError, match=f"^{re.escape(message)}$"):
        Sampling(**values)  # type: ignore[arg-type]


def times_of(rows: int, vocab: int) -> Tensor:
    numbers = SequenceRandom(seed=4, prompt=0).times(rows * num_times(vocab), None)
    return torch.from_numpy(numbers).view(rows, num_times(vocab))


VOCAB = 8
LETTERS = replace(SMALL, vocab_size=VOCAB)
FILTERS = [Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=4), Sampling(temperature=1.3, top_p=0.8)]


def prompts_of(config: ModelConfig, count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(0, config.vocab_size, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_speculative_greedy_is_greedy_on_fifty_prompts(dtype: torch.dtype) -> None:
    model = make_foresighted(dtype=dtype)
    prompts = prompts_of(model.config, 50, 1)
    plain = generate(model, prompts, max_new_tokens=16, stop=[3, 77], speculative=False)
    drafted = generate(model, prompts, max_new_tokens=16, stop=[3, 77], speculative=True)
    assert drafted.continuations == plain.continuations
    statistics = drafted.statistics
    assert 0.1 < statistics.acceptance_rate < 0.9
    assert statistics.tokens == plain.statistics.passes
    assert statistics.tokens - statistics.passes > 0.1 * statistics.tokens


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_speculative_greedy_is_greedy_for_every_shape_and_a_bad_drafter(shape: str) -> None:
    for model in (make_foresighted(SHAPES[shape]), make_model(SHAPES[shape], seed=9)):
        prompts = prompts_of(model.config, 6, 2)
        plain = generate(model, prompts, max_new_tokens=9, speculative=False)
        assert generate(model, prompts, max_new_tokens=9, speculative=True).continuations == plain.continuations


def test_statistics_count_what_happened() -> None:
    """The first of 9 tokens takes a pass. Each later pass yields one token, or two if its draft is accepted."""
    model = make_foresighted()
    for prompt in prompts_of(model.config, 8, 3):
        statistics = generate(model, [prompt], max_new_tokens=9, speculative=True).statistics
        assert statistics.tokens == 9
        assert statistics.passes == 9 - statistics.drafts_accepted
        # A pass for only the last token cannot use a draft.
        assert statistics.passes - 2 <= statistics.drafts_offered <= statistics.passes - 1
        assert statistics.tokens - statistics.passes == statistics.drafts_accepted
        assert f"({statistics.drafts_accepted} of {statistics.drafts_offered})" in statistics.summary()


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, replace(SMALL, mtp_hidden="pre_norm")])
def test_drafts_are_those_of_whole_passes(config: ModelConfig) -> None:
    """The accepted drafts equal those of the MTP module's best tokens over the whole text without a cache."""
    model = make_foresighted(config)
    prompts = prompts_of(config, 12, 4)
    offered = accepted = 0
    for prompt in prompts:
        tokens = list(generate(model, [prompt], max_new_tokens=15, speculative=False).continuations[0].tokens)
        drafts = whole_pass(model, [*prompt, *tokens])[1].argmax(-1).tolist()
        at = 1  # of the token to draft; its draft follows the pair that ends one token before
        while at < len(tokens):
            is_right = drafts[len(prompt) + at - 2] == tokens[at]
            if at + 1 < len(tokens):
                offered += 1
                accepted += is_right
            at += 1 + is_right
    statistics = generate(model, prompts, max_new_tokens=15, speculative=True, batch_size=5).statistics
    assert (statistics.drafts_offered, statistics.drafts_accepted) == (offered, accepted)
    assert 0.1 < statistics.acceptance_rate < 0.9


def test_verified_tokens_are_distributed_as_without_drafts() -> None:
    """The token follows p, for different p and q with zeros."""
    rows = 200_000
    generator = torch.Generator().manual_seed(8)
    target = torch.tensor([0.5, 0.2, 0.0, 0.05, 0.25], dtype=torch.float64)
    draft = torch.tensor([0.1, 0.5, 0.2, 0.0, 0.2], dtype=torch.float64)
    drafts = torch.multinomial(draft, rows, replacement=True, generator=generator)
    accepted, tokens = verify(target.expand(rows, 5), draft.expand(rows, 5), drafts, times_of(rows, 5))
    statistic, limit = chi_square(torch.bincount(tokens, minlength=5), target)
    assert statistic < limit
    assert tokens[accepted].equal(drafts[accepted])
    # The acceptance rate is the overlap of p and q.
    overlap = float(torch.minimum(target, draft).sum())
    assert float(accepted.double().mean()) == pytest.approx(overlap, abs=5 * (overlap * (1 - overlap) / rows) ** 0.5)


def test_verify_of_one_hot_distributions_keeps_the_right_draft_alone() -> None:
    best, other, _ = torch.eye(3)[[0, 1, 2]]
    target, draft = torch.stack((best, best)), torch.stack((best, other))
    for time in (2.0**-50, 50.0):
        times = torch.full((2, num_times(3)), time, dtype=torch.float64)
        accepted, tokens = verify(target, draft, torch.tensor([0, 1]), times)
        assert accepted.tolist() == [True, False]
        assert tokens.tolist() == [0, 0]


def test_verify_equal_distributions_always_keep() -> None:
    same = torch.tensor([[0.3, 0.7]]).expand(1000, 2)
    assert verify(same, same, torch.ones(1000, dtype=torch.int64), times_of(1000, 2))[0].all()


@torch.no_grad()
def exactly(model: Transformer, prompt: list[int], num_tokens: int, sampling: Sampling) -> Tensor:
    """Returns the probability of every continuation, [V] * num_tokens, from whole passes."""
    continuations = list(product(range(VOCAB), repeat=num_tokens - 1))
    logits = model(torch.tensor([[*prompt, *tokens] for tokens in continuations]))[:, len(prompt) - 1 :]
    steps = distribution(logits, sampling)
    joint = torch.ones((VOCAB,) * num_tokens, dtype=torch.float64)
    for row, tokens in enumerate(continuations):
        path = 1.0
        for step, token in enumerate(tokens):
            path *= float(steps[row, step, token])
        joint[tokens] = path * steps[row, -1]
    return joint


@pytest.mark.covering(1)
@pytest.mark.slow
@pytest.mark.parametrize("sampling", FILTERS, ids=["warm", "top_k", "top_p"])
@pytest.mark.parametrize("speculative", [True, False], ids=["drafts", "plain"])
def test_sampled_continuations_follow_the_models_distribution(sampling: Sampling, speculative: bool) -> None:
    """Compares the frequencies of continuations of three tokens with their exact probabilities."""
    model, count = make_foresighted(LETTERS, seed=5), 4000
    generation = generate(
        model, [[1, 6, 2]] * count, max_new_tokens=3, sampling=sampling, speculative=speculative, batch_size=1000
    )
    if speculative:
        assert 0.1 < generation.statistics.acceptance_rate < 0.95
    counts = torch.zeros((VOCAB,) * 3, dtype=torch.float64)
    for continuation in generation.continuations:
        counts[continuation.tokens] += 1
    statistic, limit = chi_square(counts, exactly(model, [1, 6, 2], 3, sampling))
    assert statistic < limit
