"""Measures CPU seconds of a server's ranks with and without overlap, in turns: `python -m bench.serving`."""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import distributed as dist

from bench.training import SHAPES, architecture
from infer.config import Sampling
from infer.continuous import ContinuousEngine
from infer.engines.expert_ranks import RankDecoder, RanksEngine, SequenceTransfers, ServingRank
from infer.placement import Placement
from infer.protocol import NumberedPrompt, Request
from tests.ranks import run_ranks
from tests.train.test_decoding import Layout, config_of, opened
from train.config import PrecisionConfig

NUM_RANKS = 2
ALWAYS = 2  # tokens of a divided pass, as with `overlap=true`


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of both ranks together."""

    requests: int
    prompt_tokens: int
    new_tokens: int
    chunk_tokens: int


LOADS = {
    "prefill, 1024 tokens a pass": Load(64, 256, 1, 1024),
    "prefill, 2048": Load(64, 256, 1, 2048),
    "prefill, 4096": Load(64, 256, 1, 4096),
    "decoding, 512 sequences": Load(1024, 4, 8, 1024),
}


def serve(rank: int, world_size: int, folder: Path, num_rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Returns CPU seconds with and without overlap of each round, over all ranks, by load."""
    torch.set_num_threads(1)
    config = config_of(Layout(kind="1f1b", data=world_size, expert=world_size), folder)
    model = architecture(SHAPES["11.5M"])
    placement = Placement.in_order(model.num_routed_experts, world_size)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in LOADS}
    with opened(replace(config, model=model, precision=PrecisionConfig(kind="float32"))) as (_, pipeline):
        pipeline.place_experts(placement)
        for number in range(1 + num_rounds):  # the first one is not measured
            for name, load in LOADS.items():
                made = {}
                for least in (ALWAYS, None) if number % 2 else (None, ALWAYS):
                    engine = ContinuousEngine(
                        pipeline.model,
                        max_sequences=load.requests,
                        cached_tokens=320 * load.requests,
                        chunk_tokens=load.chunk_tokens,
                        speculative=False,
                        prefix_cache=False,
                        build_decoder=lambda *args, least=least, **options: RankDecoder(60.0, least, *args, **options),
                    )
                    transfers = SequenceTransfers(engine, rank, world_size, 0, 60.0)
                    serving = ServingRank(engine, placement, pipeline.place_experts, transfers)
                    began = time.process_time()
                    tokens = drive(RanksEngine(serving, 0, None), load) if rank == 0 else serving.follow()
                    seconds = torch.tensor(time.process_time() - began)
                    dist.all_reduce(seconds)
                    made[least] = (float(seconds), tokens)
                    assert isinstance(engine.batch.decoder, RankDecoder)
                    assert (engine.batch.decoder.num_divided > 0) == (least is not None)
                    engine.close()
                (overlapped, tokens), (plain, others) = made[ALWAYS], made[None]
                assert tokens == others, name
                measured[name] += [(overlapped, plain)] if number else []
    return measured


def drive(engine: RanksEngine, load: Load) -> dict[int, list[int]]:
    """Submits all requests at once, and returns their tokens."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(256, (load.requests, load.prompt_tokens), generator=generator).tolist()
    request = Request(samples=1, max_new_tokens=load.new_tokens, sampling=Sampling())
    for number, prompt in enumerate(prompts):
        engine.submit(NumberedPrompt(number=number, tokens=tuple(prompt)), request)
    tokens: dict[int, list[int]] = {}
    while not engine.is_idle:
        for news in engine.step():
            tokens.setdefault(news.number, []).extend(token.token for token in news.tokens)
    engine.close()
    return tokens


def main() -> None:
    """Prints the medians of both, and of their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    with tempfile.TemporaryDirectory() as folder:
        measured = run_ranks(NUM_RANKS, serve, Path(folder), parser.parse_args().rounds)[0]
    print(f"CPU s of {NUM_RANKS} ranks, 11.5M parameters, float32, equal tokens: median of each, and of the ratio")
    for name, pairs in measured.items():
        overlapped, plain = (statistics.median(pair[index] for pair in pairs) for index in range(2))
        ratios = sorted(pair[0] / pair[1] for pair in pairs)
        span = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        print(
            f"{name:28} overlap {overlapped:6.2f}  without {plain:6.2f}  ratio {statistics.median(ratios):.3f} ({span})"
        )


if __name__ == "__main__":
    main()
