"""The engine that holds the whole model."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from unittest import mock

import numpy as np
import pytest
import torch

from comm.dispatch.local import LocalDispatcher
from infer.batch import DraftChoice
from infer.config import GenerateError, Sampling
from infer.engines.local import LocalEngine
from infer.protocol import PROMPT_SAMPLE, NumberedPrompt, Request, RouteKey, Sample
from infer.sample import distribution
from kernels.quantize import quantize_128x128
from model.attention.mla import EXPANDED_TOKENS
from model.config import Computing, Products
from model.router import Router, Routing
from model.transformer import Transformer, initialize_weights
from tests.covering import exhaustive
from tests.infer.models import SHAPES, make_foresighted
from tests.model.fp8_models import CONFIDENT, scale_like_trained

PROMPTS = [NumberedPrompt(number=number, tokens=tuple(range(number + 3, 2 * number + 4))) for number in range(8)]
REQUEST = Request(samples=6, max_new_tokens=16, sampling=Sampling(temperature=1.0, seed=3), stop=frozenset((50, 111)))


def trained_log_probs(model: Transformer, rollout: Sample, temperature: float) -> torch.Tensor:
    """Returns the log-probabilities that a training pass computes for a rollout's tokens."""
    prompt = PROMPTS[rollout.prompt].tokens
    with torch.no_grad():
        logits_1TV = model(torch.tensor([[*prompt, *rollout.tokens]]))
    logs_TV = (logits_1TV[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return logs_TV.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]


# Float32 cannot hold a log-probability near -9 better than to 1e-6, so its bound also grows with the value.
@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize(("dtype", "tolerances"), [(torch.float32, (2**-22, 1e-6)), (torch.float64, (0, 1e-12))])
@pytest.mark.parametrize(("temperature", "speculative"), [(0.6, False), (1.0, True), (1.5, False)])
def test_log_probs_are_those_of_a_training_pass(
    dtype: torch.dtype, tolerances: tuple[float, float], temperature: float, speculative: bool
) -> None:
    model = make_foresighted(dtype=dtype)
    sampling = Sampling(temperature=temperature, top_k=200, top_p=0.99, seed=5)
    request = replace(REQUEST, sampling=sampling, samples=4, max_new_tokens=24, stop=frozenset())
    rollouts = LocalEngine(model, speculative=speculative).generate(PROMPTS, request).rollouts
    assert sum(len(rollout.tokens) for rollout in rollouts) == 8 * 4 * 24
    for rollout in rollouts:
        found = torch.tensor(rollout.log_probs, dtype=dtype)
        trained = trained_log_probs(model, rollout, temperature)
        torch.testing.assert_close(found, trained, rtol=tolerances[0], atol=tolerances[1], msg=str(rollout))


def confident_model(products: Products) -> Transformer:
    """Builds a bf16 model that is about as unsure of its tokens as a trained one."""
    model = Transformer(CONFIDENT, LocalDispatcher(8), torch.bfloat16, computing=Computing(products=products))
    initialize_weights(model, 4)
    scale_like_trained(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("products", "temperature"), [("own", 0.6), ("fp8", 1.5), *exhaustive(("fp8_power_of_two", 1.0))]
)
def test_log_probs_in_16_and_8_bits_are_near_those_of_a_training_pass(products: Products, temperature: float) -> None:
    """Prompts are read whole or in chunks, and the MTP module drafts."""
    model = confident_model(products)
    sampling = Sampling(temperature=temperature, seed=5)
    request = replace(REQUEST, sampling=sampling, max_new_tokens=22, stop=frozenset())
    rollouts = LocalEngine(model, prefill_tokens=8).generate(PROMPTS, request).rollouts
    found = torch.cat([torch.tensor(each.log_probs) for each in rollouts])
    with model.weights_unchanged():
        trained = torch.cat([trained_log_probs(model, each, temperature) for each in rollouts])
    assert len(found) == 8 * 6 * 22
    assert 1.0 < -found.mean() < 4.0, "tokens that are almost certain or almost random show no difference"
    # Log-probabilities of decoding that ignores FP8 differ by 0.05.
    assert (found - trained).abs().mean() <= (2e-2 if products == "own" else 5e-3)


def test_weights_are_quantized_once_per_request_and_again_after_an_update() -> None:
    model = confident_model("fp8")
    engine, request = LocalEngine(model, speculative=False), replace(REQUEST, samples=1, max_new_tokens=6)
    with mock.patch("model.precision.fp8_rows.quantize_128x128", wraps=quantize_128x128) as quantize:
        before = engine.generate(PROMPTS, request).rollouts
        num_calls = quantize.call_count
        engine.generate(PROMPTS, replace(request, max_new_tokens=2))
        assert quantize.call_count == 2 * num_calls, "the number of tokens changes the number of conversions"
    with torch.no_grad():
        model.block(1).self_attn.get_parameter("o_proj.weight").neg_()
    assert engine.generate(PROMPTS, request).rollouts != before


@torch.no_grad()
def trained_routes(model: Transformer, tokens: Sequence[int]) -> dict[int, list[list[int]]]:
    """Returns the experts of each token, in rising order, that a pass without a cache chooses in each layer."""
    seen: list[list[list[int]]] = []
    plain = Router.route

    def route(gate: Router, logits_BTE: torch.Tensor) -> Routing:
        routing = plain(gate, logits_BTE)
        seen.append(routing.ids_TK.sort(-1).values.tolist())
        return routing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Router, "route", route)
        model(torch.tensor([list(tokens)]))
    return dict(enumerate(seen, model.config.num_dense_layers))


@pytest.mark.parametrize(("speculative", "batch_size", "prefill"), [(False, 48, 8192), (True, 5, 4)])
def test_recorded_experts_are_those_of_a_training_pass(speculative: bool, batch_size: int, prefill: int) -> None:
    model = make_foresighted(dtype=torch.float64)
    engine = LocalEngine(model, speculative=speculative, batch_size=batch_size, prefill_tokens=prefill)
    prompts, request = PROMPTS[1:6], replace(REQUEST, samples=3)
    made = engine.generate(prompts, replace(request, record_routes=True))
    assert made.rollouts == engine.generate(prompts, request).rollouts
    if speculative:
        assert 0 < made.statistics.drafts_accepted < made.statistics.drafts_offered
    assert made.routes is not None
    ids, layers = made.routes.ids, range(model.config.num_dense_layers, model.config.num_layers)
    for rollout in made.rollouts:
        prompt = PROMPTS[rollout.prompt].tokens
        expected = trained_routes(model, [*prompt, *rollout.tokens[:-1]])
        for layer in layers:
            parts = [ids[RouteKey(rollout.prompt, PROMPT_SAMPLE, layer)]]
            if len(rollout.tokens) > 1:
                parts.append(ids[RouteKey(rollout.prompt, rollout.sample, layer)])
            assert np.sort(np.concatenate(parts), -1).tolist() == expected[layer], (rollout, layer)
    # A prompt is held once. Rejected drafts are not held.
    num_tokens = sum(len(prompt.tokens) for prompt in prompts) + sum(len(each.tokens) - 1 for each in made.rollouts)
    assert made.routes.num_bytes == num_tokens * len(layers) * model.config.num_experts_per_token
    assert all(array.base is None for array in ids.values())


@pytest.mark.parametrize(
    ("sampling", "batch_size", "prefill"),
    [
        (Sampling(), 48, 8192),
        (Sampling(temperature=1.0, seed=3), 5, 4),
        (Sampling(temperature=0.8, top_k=200, repetition_penalty=1.2, seed=5), 7, 8192),
    ],
)
def test_drafts_chosen_by_time_change_no_token(
    sampling: Sampling, batch_size: int, prefill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes with and without drafts alternate at random, and so do prompts that the MTP module reads or not."""
    model = make_foresighted(dtype=torch.float64)
    request = replace(REQUEST, sampling=sampling, samples=3, record_routes=True)
    plain = LocalEngine(model, speculative=False).generate(PROMPTS, request)
    times = Random(2)
    monkeypatch.setattr(DraftChoice, "choose", lambda *_: times.random() < 0.6)
    monkeypatch.setattr(DraftChoice, "pays", lambda *_: times.random() < 0.5)
    made = LocalEngine(model, speculative="auto", batch_size=batch_size, prefill_tokens=prefill).generate(
        PROMPTS, request
    )
    assert 0 < made.statistics.drafts_accepted < made.statistics.drafts_offered < plain.statistics.tokens / 2
    for ours, theirs in zip(made.rollouts, plain.rollouts, strict=True):
        assert ours.tokens == theirs.tokens, (ours.prompt, ours.sample)
        assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-12)
    assert made.routes is not None
    assert plain.routes is not None
    assert made.routes.ids.keys() == plain.routes.ids.keys()
    for key, ids_TK in plain.routes.ids.items():
        assert np.array_equal(np.sort(made.routes.ids[key], -1), np.sort(ids_TK, -1)), key


@pytest.mark.parametrize("num_rows", [1, 3, 32])
@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("cost", [1.1, 1.4, 1.9])
def test_auto_is_as_fast_as_the_better_of_drafts_and_none(num_rows: int, rate: float, cost: float) -> None:
    """A pass with drafts takes `cost` times as long, and each is right with probability `rate`; noise of 5 %."""
    choice = DraftChoice("auto")
    chance = Random(num_rows)
    seconds = tokens = 0.0
    for _ in range(1000):
        is_drafted = choice.choose(num_rows)
        took = num_rows * (cost if is_drafted else 1) * (1 + 0.05 * chance.random())
        num_tokens = num_rows + (sum(chance.random() < rate for _ in range(num_rows)) if is_drafted else 0)
        choice.record(num_rows, took, num_tokens, is_drafted=is_drafted)
        seconds += took
        tokens += num_tokens
    assert tokens / seconds > 0.97 * max(1, (1 + rate) / cost) / 1.025
    assert choice.pays(num_rows) == (1 + rate > cost) or abs((1 + rate) / cost - 1) < 0.06
    assert choice.summary().startswith("speed with drafts by rows: ")


def test_drafts_are_chosen_for_each_number_of_rows() -> None:
    choice = DraftChoice("auto")
    for num_rows in (32, 2) * 200:
        is_drafted = choice.choose(num_rows)
        took = num_rows * (1.0 if not is_drafted else 1.2 if num_rows == 2 else 2.5)
        choice.record(num_rows, took, num_rows + is_drafted * num_rows * 3 // 4, is_drafted=is_drafted)
    assert (choice.pays(32), choice.pays(17), choice.pays(2), choice.pays(1)) == (False, False, True, False)


def test_requests_without_records_have_none() -> None:
    model = make_foresighted()
    made = LocalEngine(model).generate(PROMPTS[:2], REQUEST)
    assert made.routes is None
    assert all(rollout.kept == () for rollout in made.rollouts)
    # Sampling from all tokens has no sets.
    made = LocalEngine(model).generate(PROMPTS[:2], replace(REQUEST, record_kept=True))
    assert all(rollout.kept == () for rollout in made.rollouts)


@pytest.mark.covering(1)
@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("kept", [{"top_k": 7}, {"top_p": 0.8}, {"top_k": 40, "top_p": 0.9, "min_p": 0.05}], ids=str)
def test_log_probs_among_kept_tokens_are_those_of_a_training_pass(speculative: bool, kept: dict[str, float]) -> None:
    model = make_foresighted(dtype=torch.float64)
    sampling = Sampling(temperature=0.8, seed=5, **kept)  # type: ignore[arg-type]
    request, engine = replace(REQUEST, sampling=sampling, samples=2), LocalEngine(model, speculative=speculative)
    made = engine.generate(PROMPTS, replace(request, record_kept=True))
    plain = engine.generate(PROMPTS, request).rollouts
    assert [each.tokens for each in made.rollouts] == [each.tokens for each in plain]
    for rollout in made.rollouts:
        prompt = PROMPTS[rollout.prompt].tokens
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*prompt, *rollout.tokens]]))[0, len(prompt) - 1 : -1]
        target_TV = distribution(logits_TV, sampling)
        for at, (token, ids) in enumerate(zip(rollout.tokens, rollout.kept, strict=True)):
            assert ids == tuple(target_TV[at].nonzero().flatten().tolist()), (rollout, at)
            expected = (logits_TV[at, list(ids)] / 0.8).log_softmax(-1)[ids.index(token)]
            assert rollout.log_probs[at] == pytest.approx(float(expected), rel=0, abs=1e-12), (rollout, at)


@pytest.mark.slow
@pytest.mark.parametrize("speculative", [True, *exhaustive(False)])
def test_rollouts_depend_on_numbers_not_on_batch_or_other_prompts(speculative: bool) -> None:
    model = make_foresighted()

    def tokens(prompts: Sequence[NumberedPrompt], batch_size: int, step: int = 0) -> dict[tuple[int, int], Sample]:
        engine = LocalEngine(model, speculative=speculative, batch_size=batch_size)
        made = engine.generate(prompts, replace(REQUEST, step=step)).rollouts
        assert [(rollout.prompt, rollout.sample) for rollout in made] == [
            (prompt.number, sample) for prompt in prompts for sample in range(6)
        ]
        return {(rollout.prompt, rollout.sample): rollout for rollout in made}

    whole = tokens(PROMPTS, 48)
    assert len({rollout.tokens for rollout in whole.values()}) == 48
    assert {rollout.finish for rollout in whole.values()} == {"stop", "length"}
    for prompts, batch_size in ((PROMPTS, 5), (PROMPTS[:2], 1), (PROMPTS[::-1][:3], 48)):
        for place, rollout in tokens(prompts, batch_size).items():
            assert rollout.tokens == whole[place].tokens, place
    assert all(rollout.tokens != whole[place].tokens for place, rollout in tokens(PROMPTS, 48, step=1).items())


def test_stop_token_is_part_of_a_rollout() -> None:
    for rollout in LocalEngine(make_foresighted()).generate(PROMPTS, REQUEST).rollouts:
        assert (rollout.tokens[-1] in REQUEST.stop) == (rollout.finish == "stop")
        assert not set(rollout.tokens[:-1]) & REQUEST.stop
        assert len(rollout.tokens) == len(rollout.log_probs)


def test_continuations_of_a_prompt_share_its_pass() -> None:
    statistics = LocalEngine(make_foresighted(), speculative=False).generate(PROMPTS, REQUEST).statistics
    assert statistics.tokens - statistics.passes == 8 * 5  # the first tokens of five continuations cost no pass


def test_prompt_that_fills_the_positions_has_an_empty_rollout() -> None:
    model = make_foresighted()
    prompt = NumberedPrompt(number=0, tokens=(1,) * model.config.max_position_tokens)
    (rollout,) = LocalEngine(model).generate([prompt], replace(REQUEST, samples=1)).rollouts
    assert (rollout.tokens, rollout.finish) == ((), "length")


def test_request_without_samples_is_rejected() -> None:
    with pytest.raises(GenerateError, match=r"^samples: must be at least 1, is 0; nearest valid: 1$"):
        replace(REQUEST, samples=0)


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("shape", ["plain", "wide_values"])
def test_prompts_read_in_chunks_continue_as_whole_ones(speculative: bool, shape: str) -> None:
    config = replace(SHAPES[shape], max_position_tokens=256)
    model = make_foresighted(config)
    prompts = [NumberedPrompt(number=size, tokens=tuple(at * 7 % 311 for at in range(size))) for size in (3, 70, 150)]
    request = replace(REQUEST, samples=2, max_new_tokens=8)
    whole = LocalEngine(model, speculative=speculative).generate(prompts, request).rollouts
    # Chunks of fewer and of more tokens than `EXPANDED_TOKENS`, which are computed in two ways.
    for size in (7, EXPANDED_TOKENS, 149):
        engine = LocalEngine(model, speculative=speculative, prefill_tokens=size)
        for ours, theirs in zip(engine.generate(prompts, request).rollouts, whole, strict=True):
            assert ours.tokens == theirs.tokens, size
            assert ours.log_probs == pytest.approx(theirs.log_probs, rel=1e-11), size
