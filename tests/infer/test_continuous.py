"""Continuous batching: each request gets the tokens that it gets alone, and no block of the cache is lost."""

import functools
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from infer.config import GenerateError, Sampling, Speculative
from infer.continuous import ContinuousEngine, SequenceUpdate
from infer.deployment import Deployment, DeploymentConfig
from infer.engines.local import LocalEngine
from infer.protocol import ChosenToken, NumberedPrompt, Request, Sample
from launch.plan_request import read_request
from model.config import BLOCK_TOKENS
from model.transformer import Transformer
from tests.covering import exhaustive
from tests.infer.models import SMALL, make_foresighted, whole_pass

CONFIG = replace(SMALL, max_position_tokens=512)
VOCAB = CONFIG.vocab_size
REQUEST = Request(samples=1, max_new_tokens=12, sampling=Sampling())
DRAWN = Sampling(temperature=0.9, top_p=0.9, seed=7)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_foresighted(CONFIG)


def make_prompts(count: int) -> list[tuple[int, ...]]:
    """Returns prompts of a few to 200 tokens, of which a third begin with the same two blocks."""
    chosen = random.Random(5)
    shared = tuple(chosen.randrange(VOCAB) for _ in range(2 * BLOCK_TOKENS))
    lengths = [chosen.choice((1, 2, 9, BLOCK_TOKENS, BLOCK_TOKENS + 1, 100)) for _ in range(count)]
    tails = [tuple(chosen.randrange(VOCAB) for _ in range(length)) for length in lengths]
    return [shared + tail if number % 3 == 0 else tail for number, tail in enumerate(tails)]


@functools.cache
def continue_alone(model: Transformer, sampling: Sampling) -> list[Sample]:
    """Returns the answers to 50 prompts without drafts, each continued alone if the number of a prompt counts."""
    engine = LocalEngine(model, speculative=False)
    request = replace(REQUEST, sampling=sampling)
    prompts = [NumberedPrompt(number=0, tokens=prompt) for prompt in make_prompts(50)]
    if sampling.temperature:
        return [engine.generate([prompt], request).rollouts[0] for prompt in prompts]
    return list(engine.generate([replace(prompt, number=at) for at, prompt in enumerate(prompts)], request).rollouts)


class Client:
    """Collects the news of an engine by request."""

    def __init__(self, engine: ContinuousEngine) -> None:
        self.engine = engine
        self.tokens: dict[int, list[ChosenToken]] = {}
        self.last: dict[int, SequenceUpdate] = {}
        self.prompt_scores: dict[int, tuple[ChosenToken, ...]] = {}

    def submit(self, number: int, prompt: Sequence[int], request: Request) -> None:
        self.engine.submit(NumberedPrompt(number=number, tokens=tuple(prompt)), request)

    def step(self) -> None:
        """Runs a step, and checks the holders of all blocks."""
        for news in self.engine.step():
            key = news.number
            assert key not in self.last, "news of a sequence that has ended"
            self.tokens.setdefault(key, []).extend(news.tokens)
            if news.prompt_scores is not None:
                self.prompt_scores[news.number] = news.prompt_scores
            if news.finish is not None:
                self.last[key] = news
        self.check_blocks()

    def run(self) -> None:
        while not self.engine.is_idle:
            self.step()

    def ids(self, number: int) -> tuple[int, ...]:
        return tuple(chosen.token for chosen in self.tokens[number])

    def check_blocks(self) -> None:
        decoder = self.engine.batch.decoder
        for cache in (decoder.main, decoder.mtp):
            held = list(chain.from_iterable(cache._tables))
            assert cache.num_free_blocks == self.engine.counts()["total_blocks"] - len(set(held))
            assert [cache._blocks._holders[block] for block in held] == [held.count(block) for block in held]
            assert len(cache.lengths) == len(self.engine.batch.rows)
        # Rows being read have the blocks of their whole text, the others at most one block more than their tokens need.
        for row, sequence in enumerate(self.engine.batch.rows):
            needed = sequence.num_text if row >= self.engine.batch.num_active else decoder.main.lengths[row]
            assert len(decoder.main._tables[row]) <= -(-needed // BLOCK_TOKENS) + 1


@pytest.mark.parametrize(
    ("sampling", "speculative", "prefix_cache", "blocks"),
    [
        (Sampling(), False, False, 1000),
        (DRAWN, True, True, 8),
        *exhaustive(
            (Sampling(), True, True, 8),
            (DRAWN, False, False, 1000),
            *((sampling, "auto", True, 1000) for sampling in (Sampling(), DRAWN)),
            *((sampling, False, True, 8) for sampling in (Sampling(), DRAWN)),
            *((sampling, True, False, 8) for sampling in (Sampling(), DRAWN)),
        ),
    ],
)
def test_requests_in_any_order_get_the_tokens_of_each_alone(
    model: Transformer, sampling: Sampling, speculative: Speculative, prefix_cache: bool, blocks: int
) -> None:
    """Few blocks make requests wait, and sequences are preempted and read again."""
    prompts = make_prompts(50)
    request = replace(REQUEST, sampling=sampling)
    client = Client(
        ContinuousEngine(
            model,
            max_sequences=12,
            cached_tokens=blocks * BLOCK_TOKENS,
            chunk_tokens=80,
            speculative=speculative,
            prefix_cache=prefix_cache,
        )
    )
    order = random.Random(1).sample(range(50), 50)
    for at, number in enumerate(order):
        client.submit(number, prompts[number], request)
        if at % 4 == 3:
            client.step()
    client.run()
    for number, sample in enumerate(continue_alone(model, sampling)):
        assert client.ids(number) == sample.tokens
        logs = [chosen.log_prob for chosen in client.tokens[number]]
        assert logs == pytest.approx(sample.log_probs, rel=0, abs=1e-10)
    counts = client.engine.counts()
    assert (counts["preemptions"] > 0) == (blocks == 8)
    assert (counts["reused_tokens"] > 0) == prefix_cache


class OnlyMultiples:
    """Allows multiples of a number, and then of the next one."""

    def __init__(self) -> None:
        self.factor = 3

    def allowed(self) -> NDArray[np.bool_]:
        return np.arange(VOCAB) % self.factor == 0

    def accept(self, token: int) -> None:
        assert token % self.factor == 0
        self.factor += 1


def test_every_request_has_its_own_settings(model: Transformer) -> None:
    """Seeds, stop tokens, biases, penalties, constraints and alternatives differ within one batch, with drafts."""
    prompt = make_prompts(2)[1]
    requests = {
        0: REQUEST,
        1: replace(REQUEST, sampling=DRAWN),
        2: replace(REQUEST, sampling=replace(DRAWN, seed=8), num_alternatives=3),
        3: replace(REQUEST, logit_bias={5: 100.0}),
        4: replace(REQUEST, constraint=OnlyMultiples, sampling=DRAWN),
        5: replace(REQUEST, sampling=Sampling(repetition_penalty=1.5, temperature=0.7, top_k=9)),
        6: replace(REQUEST, max_new_tokens=3, num_alternatives=0),
        7: replace(REQUEST, sampling=DRAWN, step=1),
        8: replace(REQUEST, sampling=DRAWN, step=2),
    }
    alone: dict[int, list[int]] = {}
    for together in (False, True):
        client = Client(ContinuousEngine(model, max_sequences=9, cached_tokens=4096, speculative=True))
        for number, request in requests.items():
            client.submit(number, prompt, request)
            if not together:
                client.run()
        client.run()
        ids = {number: [*client.ids(number)] for number in requests}
        alone = alone or ids
    assert ids == alone
    assert len({tuple(ids[number]) for number in (0, 1, 2, 7, 8)}) == 5
    assert set(ids[3]) == {5}
    assert all(token % (3 + at) == 0 for at, token in enumerate(ids[4]))
    assert len(ids[6]) == 3
    assert client.tokens[6][0].alternatives == ()
    # Log-probabilities are the model's own.
    logits_TV, _ = whole_pass(model, [*prompt, *ids[2]])
    logs_TV = logits_TV[len(prompt) - 1 : -1].log_softmax(-1)
    for at, chosen in enumerate(client.tokens[2]):
        best = logs_TV[at].topk(3)
        assert chosen.log_prob == pytest.approx(float(logs_TV[at, chosen.token]), abs=1e-10)
        assert [token for token, _ in chosen.alternatives] == best.indices.tolist()
        assert [value for _, value in chosen.alternatives] == pytest.approx(best.values.tolist(), abs=1e-10)


@pytest.mark.parametrize("max_new_tokens", [0, 2])
def test_prompts_are_scored_in_chunks_although_their_blocks_are_cached(model: Transformer, max_new_tokens: int) -> None:
    prompt = make_prompts(1)[0]
    client = Client(ContinuousEngine(model, max_sequences=4, cached_tokens=4096, chunk_tokens=50))
    client.submit(0, prompt, REQUEST)
    client.run()
    request = replace(REQUEST, max_new_tokens=max_new_tokens, scores_prompt=True, num_alternatives=2)
    client.submit(1, prompt, request)
    client.submit(2, prompt, replace(request, scores_prompt=False))
    client.run()
    logs_TV = whole_pass(model, list(prompt))[0].log_softmax(-1)
    scores = client.prompt_scores[1]
    assert tuple(one.token for one in scores) == prompt[1:]
    for at, one in enumerate(scores):
        assert one.log_prob == pytest.approx(float(logs_TV[at, prompt[at + 1]]), abs=1e-10)
        assert one.alternatives[0][1] == pytest.approx(float(logs_TV[at].max()), abs=1e-10)
    assert [len(client.ids(number)) for number in (1, 2)] == [max_new_tokens] * 2
    assert client.ids(1) == client.ids(0)[:max_new_tokens]


def test_short_request_behind_a_long_prompt_starts_within_two_chunks(model: Transformer) -> None:
    client = Client(ContinuousEngine(model, max_sequences=4, cached_tokens=2048, chunk_tokens=16))
    client.submit(0, [1] * 400, REQUEST)
    for _ in range(3):
        client.step()
    client.submit(1, [1, 2, 3], REQUEST)
    client.step()
    client.step()
    assert client.tokens[1]
    assert (0, 0) not in client.tokens
    # The long one is not overtaken forever.
    for number in range(2, 60):
        client.submit(number, [1, 2, number], replace(REQUEST, max_new_tokens=1))
        client.step()
    assert client.tokens[0]


def test_shared_beginning_is_read_once(model: Transformer) -> None:
    prompts = [(9,) * 448 + (tail,) for tail in range(3)]
    client = Client(ContinuousEngine(model, max_sequences=4, cached_tokens=4096, chunk_tokens=64))
    steps = []
    for number, prompt in enumerate(prompts):
        client.submit(number, prompt, replace(REQUEST, max_new_tokens=1))
        before = client.engine.counts()["passes"]
        client.run()
        steps.append(client.engine.counts()["passes"] - before)
    assert steps == [8, 1, 1]
    assert client.engine.counts()["reused_tokens"] == 2 * 448


def test_bytes_of_the_cache_are_those_that_a_plan_predicts() -> None:
    model = make_foresighted(CONFIG, torch.bfloat16)
    cluster = read_request(["experiment=v3_671b"]).config.cluster
    deployment = Deployment(CONFIG, cluster, "bf16", DeploymentConfig())
    decoder = ContinuousEngine(model, max_sequences=3, cached_tokens=1000, speculative=True).batch.decoder
    # 1,000 tokens need 16 whole blocks.
    assert decoder.main.num_bytes + decoder.mtp.num_bytes == 16 * BLOCK_TOKENS * deployment.token_bytes


@pytest.mark.long
def test_concurrent_requests_take_little_time() -> None:
    config = replace(CONFIG, hidden_size=256, expert_intermediate_size=128, max_position_tokens=2048)
    large = make_foresighted(config, torch.float32)
    chosen = random.Random(2)
    prompts = [[chosen.randrange(VOCAB) for _ in range(chosen.choice((4, 16, 60, 200)))] for _ in range(32)]
    requests = [replace(REQUEST, max_new_tokens=chosen.choice((20, 50, 100))) for _ in prompts]

    def seconds(batches: Sequence[Sequence[int]]) -> float:
        client = Client(ContinuousEngine(large, max_sequences=32, cached_tokens=32 * 320))
        began = time.process_time()
        for batch in batches:
            for number in batch:
                client.submit(number, prompts[number], requests[number])
            while not client.engine.is_idle:
                client.engine.step()
        return time.process_time() - began

    together = min(seconds([range(32)]) for _ in range(2))
    apart = seconds([[number] for number in range(32)])
    print(f"together {together:.2f} s, one after another {apart:.2f} s: {together / apart:.2f}")
    assert together <= 0.35 * apart


def test_requests_with_a_shared_beginning_multiply_only_their_own_tokens(model: Transformer) -> None:
    client = Client(ContinuousEngine(model, max_sequences=2, cached_tokens=4096, speculative=False))
    operations = []
    for number in range(4):
        client.submit(number, [7] * 448 + [number], replace(REQUEST, max_new_tokens=1))
        with FlopCounterMode(display=False) as counter:
            client.run()
        operations.append(counter.get_total_flops())
    assert max(operations[1:]) <= 0.05 * operations[0], operations


def test_requests_that_never_fit_or_are_invalid_are_refused(model: Transformer) -> None:
    engine = ContinuousEngine(model, max_sequences=2, cached_tokens=128)
    with pytest.raises(GenerateError, match=r"^tokens: the cache must hold .*, is 130; nearest valid: 128$"):
        engine.submit(NumberedPrompt(number=0, tokens=(1,) * 118), REQUEST)
    with pytest.raises(GenerateError, match=r"^prompt 1: tokens must be"):
        engine.submit(NumberedPrompt(number=0, tokens=(VOCAB,)), REQUEST)
    assert engine.is_idle


def test_unusable_logits_and_constraints_end_only_their_request(model: Transformer) -> None:
    client = Client(ContinuousEngine(model, max_sequences=4, cached_tokens=1024))

    class Nothing(OnlyMultiples):
        def allowed(self) -> NDArray[np.bool_]:
            return np.zeros(VOCAB, dtype=bool)

    client.submit(0, [1, 2], replace(REQUEST, constraint=Nothing))
    client.submit(1, [1, 2], REQUEST)
    client.run()
    assert str(client.last[0].error) == "prompt 1: its constraint allows no token"
    assert client.last[1].error is None
    assert len(client.ids(1)) == 12
    broken = make_foresighted(CONFIG)
    with torch.no_grad():
        broken.head_weight.fill_(float("nan"))
    client = Client(ContinuousEngine(broken, max_sequences=4, cached_tokens=1024))
    client.submit(7, [1, 2], replace(REQUEST, sampling=DRAWN))
    client.submit(8, [1, 2], REQUEST)
    client.run()
    for number in (7, 8):
        assert str(client.last[number].error).startswith(f"prompt {number + 1}: the model's logits must be finite")


@pytest.mark.parametrize("speculative", [False, True])
def test_sequences_move_between_engines(model: Transformer, speculative: bool) -> None:
    """One engine reads prompts and another one continues them, with the same tokens and draws."""
    prompts = make_prompts(8)
    request = replace(REQUEST, sampling=DRAWN)
    alone = Client(ContinuousEngine(model, max_sequences=8, cached_tokens=4096, speculative=False))
    prefill, decode = (
        Client(ContinuousEngine(model, max_sequences=8, cached_tokens=tokens, speculative=speculative))
        for tokens in (4096, 1024)
    )
    for number, prompt in enumerate(prompts):
        alone.submit(number, prompt, request)
        prefill.submit(number, prompt, request)
    alone.run()
    while not prefill.engine.is_idle:
        prefill.step()
        for sequence in list(prefill.engine.batch.rows[: prefill.engine.batch.num_active]):
            decode.engine.import_sequence(prefill.engine.export_sequence(sequence.index))
        decode.step()
    decode.run()
    counts = decode.engine.counts()
    assert counts["free_blocks"] == counts["total_blocks"]
    for key, tokens in alone.tokens.items():
        moved = [*prefill.tokens[key], *decode.tokens.get(key, [])]
        assert [chosen.token for chosen in moved] == [chosen.token for chosen in tokens]
        logs = [chosen.log_prob for chosen in tokens]
        assert [chosen.log_prob for chosen in moved] == pytest.approx(logs, rel=0, abs=1e-10)


def test_random_submissions_and_cancellations_lose_no_block(model: Transformer) -> None:
    chosen = random.Random(11)
    prompts = make_prompts(12)
    client = Client(
        ContinuousEngine(model, max_sequences=5, cached_tokens=12 * BLOCK_TOKENS, chunk_tokens=70, speculative=True)
    )
    cancelled = set()
    for number in range(500):
        match chosen.randrange(4):
            case 0:
                request = replace(REQUEST, max_new_tokens=chosen.randrange(1, 9))
                client.submit(number, chosen.choice(prompts), request)
            case 1:
                gone = chosen.randrange(number + 1)
                cancelled.add(gone)
                client.engine.cancel(gone)
                client.check_blocks()
                assert all(row.index != gone for row in client.engine.batch.rows)
            case _:
                client.step()
    client.run()
    counts = client.engine.counts()
    assert counts["free_blocks"] == counts["total_blocks"] == 12
    assert client.tokens.keys() - client.last.keys() <= cancelled
    assert torch.is_grad_enabled()
