"""Measures CPU seconds and peak memory of training steps, here and in transformers.

Each contender runs in a separate process with one thread and the environment of a rank, and their steps alternate. A
step is forward, cross-entropy of the main head, backward, clipping of the gradient norm and torch's fused AdamW.
"""

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from torch import Tensor

from bench.turns import steps_in_turns
from comm.dispatch.local import LocalDispatcher
from launch.config.run import compose_run
from launch.ranks.machine import apply_rank_environment
from model.config import ModelConfig
from model.hf.config import write_config
from model.objective import CrossEntropy, LossSums, MicroBatch, loss_names
from model.transformer import Transformer, initialize_weights

Precision = Literal["float32", "bf16"]


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of `conf/model` without MTP modules, and the batch of a step."""

    model: str
    sequences: int
    tokens: int
    micro_batches: int
    sizes: dict[str, Any]  # other sizes than those of the file
    targets: dict[Precision, float]  # least speed over transformers


_11M: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_layers": 6,
    "num_dense_layers": 1,
    "expert_intermediate_size": 128,
    "mtp_depth": 0,
}
SHAPES = {
    "quickstart": Shape("quickstart", 1, 128, 8, {"mtp_depth": 0}, {"float32": 1.0}),
    "11.5M": Shape("quickstart", 8, 256, 1, _11M, {"float32": 1.15, "bf16": 1.3}),
    "94M": Shape("ladder_100m", 4, 256, 1, {"mtp_depth": 0}, {"float32": 1.0, "bf16": 1.15}),
}


def architecture(shape: Shape) -> ModelConfig:
    """Returns the model of a shape."""
    return replace(compose_run(["experiment=quickstart", f"model={shape.model}"]).model, **shape.sizes)


@dataclass(frozen=True, slots=True)
class Contender:
    """Implementation in one of its modes. `type` is the dtype of weights, or `autocast` for bf16 products."""

    name: Literal["ours", "transformers"]
    type: Literal["float32", "bf16", "autocast"]

    def __str__(self) -> str:
        return f"{self.name}, {self.type}"


@dataclass(frozen=True, slots=True)
class Sample:
    """Steps of a contender: median and minimum CPU seconds, peak memory, last loss."""

    cpu_seconds: float
    shortest: float
    peak_bytes: int
    loss: float


def contenders(shape: Shape) -> list[Contender]:
    """Returns the project in each precision, and transformers with its fastest experts and attention."""
    types: tuple[Literal["float32", "bf16"], ...] = ("float32", "bf16") if "bf16" in shape.targets else ("float32",)
    ours = [Contender("ours", kind) for kind in types]
    others = [Contender("transformers", kind) for kind in types]
    return [*ours, *others, *([Contender("transformers", "autocast")] if "bf16" in types else [])]


def measure_training(shape: Shape, num_rounds: int) -> dict[Contender, Sample]:
    """Runs steps of all contenders in turn, after two unmeasured ones."""
    serves = {contender: partial(_serve, shape, contender) for contender in contenders(shape)}
    samples = {}
    for contender, steps in steps_in_turns(2, num_rounds, serves).items():
        cpu, peaks, losses = zip(*steps, strict=True)
        samples[contender] = Sample(statistics.median(cpu), min(cpu), peaks[-1], losses[-1])
    return samples


def training_rows(shape: Shape, samples: dict[Contender, Sample]) -> list[dict[str, Any]]:
    """Returns the contenders with their speed over the fastest mode of transformers in their precision."""
    rows = []
    for contender, sample in samples.items():
        is_float32 = contender.type == "float32"
        others = [s for c, s in samples.items() if c.name != "ours" and (c.type == "float32") == is_float32]
        rows.append(
            {
                "contender": str(contender),
                "cpu_seconds": sample.cpu_seconds,
                "speed": min(other.cpu_seconds for other in others) / sample.cpu_seconds,
                "speed_of_shortest": min(other.shortest for other in others) / sample.shortest,
                "target": shape.targets["float32" if is_float32 else "bf16"] if contender.name == "ours" else None,
                "peak_bytes": sample.peak_bytes,
                "loss": sample.loss,
            }
        )
    return rows


def training_text(name: str, rows: list[dict[str, Any]]) -> str:
    """Formats a table of the contenders of a shape."""
    shape = SHAPES[name]
    return "\n".join(
        [
            f"A training step of {name}: {shape.sequences} x {shape.tokens} tokens, {shape.micro_batches} accumulated, "
            "one thread, interleaved; speed over transformers' fastest mode by medians and by minima of CPU seconds",
            f"{'':24}{'CPU s':>8}{'median':>8}{'least':>8}{'target':>8}{'peak MiB':>10}{'loss':>8}",
            *(
                f"{row['contender']:24}{row['cpu_seconds']:8.3f}{row['speed']:8.2f}{row['speed_of_shortest']:8.2f}"
                f"{row['target'] or '':>8}{row['peak_bytes'] / 2**20:10,.0f}{row['loss']:8.4f}"
                for row in rows
            ),
        ]
    )


def _serve(shape: Shape, contender: Contender, num_steps: int, pipe: Connection) -> None:
    """Runs steps in turn, and reports CPU seconds, peak memory and loss of each."""
    apply_rank_environment(compose_run(["experiment=quickstart"]).cluster)
    config = architecture(shape)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    size = (shape.micro_batches, shape.sequences, shape.tokens + 1)
    tokens = torch.randint(config.vocab_size, size, generator=generator)
    loss_of, model = _build(config, contender)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for _ in range(num_steps):
        pipe.recv()
        cpu = time.process_time()
        total = 0.0
        for batch_BT in tokens:
            with torch.autocast("cpu", torch.bfloat16, enabled=contender.type == "autocast"):
                loss = loss_of(batch_BT[:, :-1], batch_BT[:, 1:]) / len(tokens)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        cpu_seconds = time.process_time() - cpu
        pipe.send((cpu_seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, total))


def _build(config: ModelConfig, contender: Contender) -> tuple[Callable[[Tensor, Tensor], Tensor], torch.nn.Module]:
    dtype = torch.bfloat16 if contender.type == "bf16" else torch.float32
    if contender.name == "transformers":
        return _build_transformers(config, dtype)
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), dtype)
    initialize_weights(model, 0)

    def loss(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        objective = CrossEntropy(factors=(1 / targets_BT.numel(),), balance=0.0)
        batch = MicroBatch(inputs_BT=(inputs_BT,), targets_BT=(targets_BT,))
        return model.loss(batch, objective, LossSums(loss_names(0)))

    return loss, model


def _build_transformers(
    config: ModelConfig, dtype: torch.dtype
) -> tuple[Callable[[Tensor, Tensor], Tensor], torch.nn.Module]:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    keys = write_config(config, dtype="F32", fp8=False)
    theirs = DeepseekV3Config(**keys, attn_implementation="sdpa")
    theirs._experts_implementation = "grouped_mm"
    model = DeepseekV3ForCausalLM(theirs).to(dtype).train()

    def loss(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = model(input_ids=inputs_BT, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())

    return loss, model
