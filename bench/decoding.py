"""Measures CPU seconds of greedy decoding, here and in transformers with the same weights: one thread, in turns.

The configuration is that of `training.py`, without an MTP module. All contenders must generate the same token ids.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.training import SHAPES, architecture

PROMPT_TOKENS, NEW_TOKENS = 64, 48
GOALS = {1: 1.3, 8: 1.5, 32: 2.0}
"""Least speed over transformers' fastest mode, by batch size."""

Decode = Callable[[Tensor, int], list[list[int]]]


@dataclass(frozen=True, slots=True)
class DecodingSample:
    """CPU seconds of a contender's generations of one batch size, and of their first token, in turns."""

    contender: str
    batch_size: int
    seconds: tuple[float, ...]
    prefill_seconds: tuple[float, ...]


def measure_decoding(num_rounds: int) -> list[DecodingSample]:
    """Generates with all contenders in turn, after one unmeasured round; raises ValueError if ids differ."""
    torch.set_num_threads(1)
    contenders = _build()
    samples = []
    vocab = architecture(SHAPES["11.5M"]).vocab_size
    for batch_size in GOALS:
        generator = torch.Generator().manual_seed(batch_size)
        prompts_BT = torch.randint(vocab, (batch_size, PROMPT_TOKENS), generator=generator)
        seconds: dict[tuple[str, int], list[float]] = {}
        for number in range(1 + num_rounds):
            ids = {}
            for name, decode in contenders.items():
                for num_new in (1, NEW_TOKENS):
                    began = time.process_time()
                    ids[name] = decode(prompts_BT, num_new)
                    if number:
                        seconds.setdefault((name, num_new), []).append(time.process_time() - began)
            if any(tokens != ids["ours"] for tokens in ids.values()):
                raise ValueError(f"decoding: contenders must generate equal ids, differ at batch {batch_size}")
        for name in contenders:
            samples.append(DecodingSample(name, batch_size, tuple(seconds[name, NEW_TOKENS]), tuple(seconds[name, 1])))
    return samples


def decoding_text(samples: list[DecodingSample]) -> str:
    """Formats a table of the contenders relative to the fastest mode of transformers."""
    lines = [
        f"Greedy decoding: prompt {PROMPT_TOKENS}, {NEW_TOKENS} new tokens, float32, one thread, equal ids, in turns",
        f"{'':28}{'batch':>6}{'CPU s':>8}{'least':>8}{'prefill':>9}{'over':>6}{'least':>7}{'goal':>6}",
    ]
    for sample in samples:
        others = [each for each in samples if each.batch_size == sample.batch_size and each.contender != "ours"]
        best = min(others, key=lambda other: statistics.median(other.seconds))
        median = statistics.median(sample.seconds)
        lines.append(
            f"{sample.contender:28}{sample.batch_size:6}{median:8.3f}{min(sample.seconds):8.3f}"
            f"{statistics.median(sample.prefill_seconds):9.3f}{statistics.median(best.seconds) / median:6.2f}"
            f"{min(best.seconds) / min(sample.seconds):7.2f}{GOALS[sample.batch_size]:6.1f}"
        )
    return "\n".join(lines)


def _build() -> dict[str, Decode]:
    from transformers import DeepseekV3ForCausalLM

    from comm.dispatch.local import LocalDispatcher
    from model.pretrained import save_hf
    from model.transformer import Transformer, initialize_weights
    from tests.infer.continuing import generate

    config = architecture(SHAPES["11.5M"])
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.float32)
    initialize_weights(model, 0)

    def ours(prompts_BT: Tensor, num_new: int) -> list[list[int]]:
        made = generate(model, prompts_BT.tolist(), max_new_tokens=num_new, batch_size=len(prompts_BT))
        return [list(continuation.tokens) for continuation in made.continuations]

    contenders: dict[str, Decode] = {"ours": ours}
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, Path(folder) / "model")
        for experts in ("eager", "grouped_mm"):
            other = DeepseekV3ForCausalLM.from_pretrained(
                Path(folder) / "model",
                dtype=torch.float32,
                attn_implementation="sdpa",
                experts_implementation=experts,
            )
            contenders[f"transformers, {experts}"] = _decode_with(other.eval())
    return contenders


def _decode_with(model: Any) -> Decode:
    @torch.no_grad()
    def decode(prompts_BT: Tensor, num_new: int) -> list[list[int]]:
        options = {"max_new_tokens": num_new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        ids_BT = model.generate(prompts_BT, attention_mask=torch.ones_like(prompts_BT), **options)
        return ids_BT[:, PROMPT_TOKENS:].tolist()

    return decode
