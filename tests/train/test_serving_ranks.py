"""Tests of a server's ranks that share experts: every request gets the tokens that it gets alone on one rank."""

import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from comm.config import TwoHopDispatchConfig
from comm.dispatch.local import LocalDispatcher
from infer.config import GenerateError, Sampling, Speculative
from infer.continuous import ContinuousEngine
from infer.engines.expert_ranks import RankDecoder, RanksEngine, SequenceTransfers, ServingRank
from infer.engines.local import LocalEngine
from infer.placement import Placement, PlacementShape
from infer.protocol import NumberedPrompt, Request
from model.transformer import Transformer, initialize_weights
from tests.ranks import run_ranks
from tests.tiny import MODEL
from tests.train.test_decoding import Layout, config_of, foresee, opened

NUM_RANKS = 4
SHAPE = PlacementShape(num_experts=8, num_groups=4, num_ranks=NUM_RANKS, num_nodes=1, num_redundant=4, policy="global")
PLACEMENT = Placement(shape=SHAPE, layers={}).rebalanced({1: np.array([90.0, 1, 1, 2, 50, 3, 2, 1])})
TWO_HOP = TwoHopDispatchConfig(
    kind="two_hop", payload="full", max_nodes=2, node_cap="verify", chunks=2, partial_sums="rows"
)
IN_ORDER = Placement(shape=replace(SHAPE, num_redundant=0), layers={})


class Anything:
    """A constraint that allows every token."""

    def allowed(self) -> None:
        """Returns that all tokens may be next."""

    def accept(self, token: int) -> None:
        """Does nothing."""


def requests() -> list[tuple[NumberedPrompt, Request]]:
    """Returns 50 greedy requests and some with draws, of mixed lengths, some with a constraint, which has no pickle."""
    rng = random.Random(5)
    made = []
    for number in range(56):
        tokens = tuple(rng.randrange(MODEL.vocab_size) for _ in range(rng.choice((1, 2, 5, 9, 33))))
        sampling = Sampling(temperature=0.0 if number < 50 else 0.8, seed=number)
        request = Request(samples=1, max_new_tokens=rng.randrange(1, 7), sampling=sampling)
        if number % 8 == 5:
            request = replace(request, constraint=lambda: Anything())
        made.append((NumberedPrompt(number=number, tokens=tokens), request))
    return made


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """How ranks serve."""

    speculative: Speculative
    prefix_cache: bool = True
    placement: Placement = IN_ORDER
    prefill_ranks: int = 0
    rebalance_seconds: float | None = None
    two_hop: bool = False
    least_overlapped: int | None = None


VARIANTS = (
    Variant(speculative=False, prefix_cache=False),
    Variant(speculative="auto", placement=PLACEMENT, rebalance_seconds=0.25),
    Variant(speculative="auto", prefill_ranks=2, two_hop=True, least_overlapped=2),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What a rank saw of a variant: the tokens that it chose, its placement, and on rank 0 all tokens by number."""

    num_tokens: int
    is_placed_again: bool
    tokens: dict[int, list[tuple[int, float]]]


def serve(rank: int, world_size: int, folder: Path) -> list[Served]:
    served = []
    for variant in VARIANTS:
        config = config_of(Layout(kind="1f1b", data=world_size, expert=world_size), folder)
        if variant.two_hop:
            config = replace(config, dispatch=TWO_HOP, cluster=replace(config.cluster, ranks_per_node=2))
        with opened(config) as (_, pipeline):
            pipeline.place_experts(variant.placement)
            engine = ContinuousEngine(
                pipeline.model,
                max_sequences=8,
                cached_tokens=4 * 64,
                chunk_tokens=32,
                speculative=variant.speculative,
                prefix_cache=variant.prefix_cache,
                build_decoder=partial(RankDecoder, 60.0, variant.least_overlapped),
            )
            transfers = SequenceTransfers(engine, rank, world_size, variant.prefill_ranks, 60.0)
            serving = ServingRank(engine, variant.placement, pipeline.place_experts, transfers)
            tokens = {}
            if rank:
                serving.follow()
            else:
                seconds = variant.rebalance_seconds
                ranks = RanksEngine(serving, variant.prefill_ranks, seconds)
                tokens = drive(ranks)
            assert isinstance(engine.batch.decoder, RankDecoder)
            assert (engine.batch.decoder.num_divided > 5) == (variant.least_overlapped is not None)
            is_placed_again = serving.placement is not variant.placement
            chosen = engine.counts()["tokens"]
            served.append(Served(num_tokens=chosen, is_placed_again=is_placed_again, tokens=tokens))
    return served


def drive(engine: RanksEngine) -> dict[int, list[tuple[int, float]]]:
    """Submits requests while others are continued, and cancels one."""
    waiting = requests()
    random.Random(1).shuffle(waiting)
    tokens: dict[int, list[tuple[int, float]]] = {}
    with pytest.raises(GenerateError):
        engine.submit(NumberedPrompt(number=99, tokens=(MODEL.vocab_size,)), waiting[0][1])
    assert engine.is_idle
    assert engine.step() == []
    engine.submit(NumberedPrompt(number=100, tokens=(1, 2, 3)), replace(waiting[0][1], max_new_tokens=40))
    while waiting or not engine.is_idle:
        for prompt, request in waiting[:7]:
            engine.submit(prompt, request)
        waiting = waiting[7:]
        if len(waiting) == 28:
            engine.cancel(100)
        for news in engine.step():
            assert news.number < 100 or len(waiting) > 20
            tokens.setdefault(news.number, []).extend((token.token, token.log_prob) for token in news.tokens)
    counts = engine.counts()
    assert (counts["queued"], counts["active"], counts["free_blocks"]) == (0, 0, counts["total_blocks"])
    engine.close()
    del tokens[100]
    return tokens


@pytest.mark.slow
def test_ranks_that_share_experts_give_each_request_the_tokens_of_one_rank(tmp_path: Path) -> None:
    model = Transformer(MODEL, LocalDispatcher(MODEL.num_routed_experts), torch.float64)
    initialize_weights(model, 7)
    foresee(model)
    local = LocalEngine(model, speculative=False)
    expected = {}
    for prompt, request in requests():
        (sample,) = local.generate([replace(prompt, number=0)], request).rollouts
        expected[prompt.number] = sample
    for variant, *served in zip(VARIANTS, *run_ranks(NUM_RANKS, serve, tmp_path), strict=True):
        assert {rank.is_placed_again for rank in served} == {variant.rebalance_seconds is not None}
        if variant.prefill_ranks:
            # Each of 57 requests gets its first token from a rank that reads, and with a constraint all.
            others = [len(expected[prompt.number].tokens) - 1 for prompt, request in requests() if request.constraint]
            assert sum(rank.num_tokens for rank in served[: variant.prefill_ranks]) == 57 + sum(others)
        assert all(rank.num_tokens > 20 for rank in served)
        tokens = served[0].tokens
        assert {number: [token for token, _ in chosen] for number, chosen in tokens.items()} == {
            number: list(sample.tokens) for number, sample in expected.items()
        }
        for number, chosen in tokens.items():
            log_probs = [log_prob for _, log_prob in chosen]
            np.testing.assert_allclose(log_probs, expected[number].log_probs, atol=1e-10, rtol=0)
