"""Measures seconds and peak memory of a small model's training step, here and in transformers.

Each contender runs in a separate process, and their steps alternate.

The configuration has 11.5M weights, 4.6M of them at work on a token. A step is forward, cross-entropy of the main head,
backward, clipping of the gradient norm and torch's fused AdamW.
"""

import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from torch import Tensor

from tests.programs.bench.turns import steps_in_turns

Precision = Literal["float32", "bf16"]

VOCAB = 4096
SEQUENCES, TOKENS = 8, 256
THREADS = 2
LEAST_SPEED = 1.5
MOST_MEMORY = 0.7

_RELEASED_KEYS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
}


@dataclass(frozen=True, slots=True)
class Contender:
    """Implementation in one of its modes. `type` is the dtype of weights, or `autocast` for bf16 products."""

    name: Literal["ours", "ours, logits", "transformers"]
    type: Literal["float32", "bf16", "autocast"]
    experts: Literal["", "eager", "grouped_mm"] = ""
    attention: Literal["", "eager", "sdpa"] = ""

    def __str__(self) -> str:
        return ", ".join(part for part in (self.name, self.type, self.experts, self.attention) if part)


@dataclass(frozen=True, slots=True)
class Sample:
    """Steps of a contender: median and minimum seconds, median CPU seconds, peak memory, last loss."""

    seconds: float
    shortest: float
    cpu_seconds: float
    peak_bytes: int
    loss: float

    @property
    def tokens_per_second(self) -> float:
        return SEQUENCES * TOKENS / self.seconds


def contenders(precision: Precision) -> list[Contender]:
    """Returns the project with its loss and with plain logits, and every mode of transformers."""
    types: tuple[Literal["float32", "bf16", "autocast"], ...] = (
        ("float32",) if precision == "float32" else ("bf16", "autocast")
    )
    experts: tuple[Literal["eager", "grouped_mm"], ...] = ("eager", "grouped_mm")
    attentions: tuple[Literal["eager", "sdpa"], ...] = ("eager", "sdpa")
    others = [Contender("transformers", kind, e, a) for kind in types for e in experts for a in attentions]
    return [Contender("ours", types[0]), Contender("ours, logits", types[0]), *others]


def measure_training(precision: Precision, num_rounds: int) -> dict[Contender, Sample]:
    """Runs steps of all contenders in turn, after two unmeasured ones."""
    serves = {contender: partial(_serve, contender) for contender in contenders(precision)}
    samples = {}
    for contender, steps in steps_in_turns(2, num_rounds, serves).items():
        seconds, cpu, peaks, losses = zip(*steps, strict=True)
        samples[contender] = Sample(
            statistics.median(seconds), min(seconds), statistics.median(cpu), peaks[-1], losses[-1]
        )
    return samples


def training_text(precision: Precision, samples: dict[Contender, Sample]) -> str:
    """Formats a table of the contenders relative to the fastest mode of transformers."""
    best = min((s for c, s in samples.items() if c.name == "transformers"), key=lambda sample: sample.seconds)
    lines = [
        f"A training step in {precision}: {SEQUENCES} x {TOKENS} tokens, {THREADS} threads, "
        f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}, interleaved; "
        f"over transformers' fastest mode, targets >= {LEAST_SPEED} and <= {MOST_MEMORY}",
        f"{'':44}{'seconds':>8}{'tokens/s':>10}{'over':>6}{'CPU s':>7}{'over':>6}{'peak MiB':>10}{'over':>6}"
        f"{'loss':>8}",
    ]
    for contender, sample in samples.items():
        lines.append(
            f"{contender!s:44}{sample.seconds:8.3f}{sample.tokens_per_second:10,.0f}"
            f"{best.seconds / sample.seconds:6.2f}{sample.cpu_seconds:7.2f}{best.cpu_seconds / sample.cpu_seconds:6.2f}"
            f"{sample.peak_bytes / 2**20:10,.0f}{sample.peak_bytes / best.peak_bytes:6.2f}{sample.loss:8.4f}"
        )
    return "\n".join(lines)


def training_rows(samples: dict[Contender, Sample]) -> list[dict[str, Any]]:
    """Returns the same as plain data."""
    return [
        {
            "contender": str(contender),
            "seconds": sample.seconds,
            "tokens_per_second": sample.tokens_per_second,
            "cpu_seconds": sample.cpu_seconds,
            "peak_bytes": sample.peak_bytes,
        }
        for contender, sample in samples.items()
    ]


def _serve(contender: Contender, num_steps: int, pipe: Connection) -> None:
    """Runs steps in turn, and reports seconds, CPU seconds, peak memory and loss of each."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    tokens = torch.randint(VOCAB, (SEQUENCES, TOKENS + 1), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    loss_of, model = _build(contender)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for _ in range(num_steps):
        pipe.recv()
        started, cpu = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=contender.type == "autocast"):
            loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        cpu_seconds = time.process_time() - cpu
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send((seconds, cpu_seconds, peak_bytes, float(loss.detach())))


def _build(contender: Contender) -> tuple[Callable[[Tensor, Tensor], Tensor], torch.nn.Module]:
    dtype = torch.bfloat16 if contender.type == "bf16" else torch.float32
    if contender.name == "transformers":
        return _build_transformers(contender, dtype)
    from comm.dispatch.local import LocalDispatcher
    from model.hf.config import parse_config
    from model.objective import CrossEntropy, LossSums, MicroBatch, loss_names
    from model.transformer import Transformer, initialize_weights

    config = parse_config({**_RELEASED_KEYS, "model_type": "deepseek_v3", "num_nextn_predict_layers": 0}, "config")  # type: ignore[arg-type]
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), dtype)
    initialize_weights(model, 0)
    objective = CrossEntropy(factors=(1 / (SEQUENCES * TOKENS),), balance=0.0)

    def loss(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        batch = MicroBatch(inputs_BT=(inputs_BT,), targets_BT=(targets_BT,))
        return model.loss(batch, objective, LossSums(loss_names(0)))

    def loss_of_logits(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(model(inputs_BT).flatten(0, 1), targets_BT.flatten())

    return (loss_of_logits if contender.name == "ours, logits" else loss), model


def _build_transformers(
    contender: Contender, dtype: torch.dtype
) -> tuple[Callable[[Tensor, Tensor], Tensor], torch.nn.Module]:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(**_RELEASED_KEYS, attn_implementation=contender.attention)  # type: ignore[call-arg]
    config._experts_implementation = contender.experts
    model = DeepseekV3ForCausalLM(config).to(dtype).train()  # type: ignore[arg-type]

    def loss(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = model(input_ids=inputs_BT, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())

    return loss, model
