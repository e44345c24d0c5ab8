"""Measures time, products and live memory of a micro-batch with and without recomputed layers.

`python -m bench.recomputed_layer` on one thread; turns alternate.
"""

import statistics
import time
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import LAYER, RECOMPUTED, MlaConfig
from model.linear import GradientStore
from model.objective import MicroBatch
from tests.model.live_memory import LiveMemory
from tests.model.test_recomputed_layer import make_model, run
from tests.tiny import MODEL

CONFIG: MlaConfig = replace(
    MODEL,
    hidden_size=256,
    dense_intermediate_size=2048,
    num_heads=8,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    expert_intermediate_size=512,
    num_routed_experts=16,
    max_position_tokens=1024,
)
TOKENS, TURNS = 512, 8


def main() -> None:
    """Prints one line for each measurement."""
    torch.set_num_threads(1)
    tokens = torch.randint(CONFIG.vocab_size, (2, TOKENS + 2), generator=torch.Generator().manual_seed(1))
    batch = MicroBatch(
        inputs_BT=(tokens[:, :TOKENS], tokens[:, 1 : TOKENS + 1]),
        targets_BT=(tokens[:, 1 : TOKENS + 1], tokens[:, 2:]),
        documents=None,
    )
    models = {"all three": make_model(RECOMPUTED, config=CONFIG), "layer": make_model((LAYER,), config=CONFIG)}
    stores = {name: GradientStore(model.parameters()) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(TURNS + 1):
        for name, model in models.items():
            started = time.process_time()
            for _ in run(model, batch, stores[name]):
                pass
            if turn:  # the first is slower
                seconds[name].append(time.process_time() - started)
    for name, model in models.items():
        with FlopCounterMode(display=False) as products:
            for _ in run(model, batch, stores[name]):
                pass
        with LiveMemory() as memory:
            passes = run(model, batch, stores[name])
            next(passes)
            kept = memory.live_bytes()
        print(
            f"{name}: {statistics.median(seconds[name]):.3f} CPU-s, {products.get_total_flops() / 1e9:.1f} GFLOP, "
            f"{kept / 2 / TOKENS:,.0f} bytes per token after F"
        )
    ratios = [again / kept for again, kept in zip(seconds["layer"], seconds["all three"], strict=True)]
    print(f"time with layer / with all three: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
