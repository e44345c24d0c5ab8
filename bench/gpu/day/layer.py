"""Times a dense and an expert layer of V3 by phases: `python -m bench.gpu.day.layer PRECISION [--out FOLDER]`.

4,096 tokens, the 32 experts that are here, one rank; writes `layer_<precision>.json`, and on a GPU a trace. Without a
GPU it runs the smallest model, to show that the code works.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from comm.dispatch.local import LocalDispatcher
from launch.config.run import compose_run
from model.config import ModelConfig
from model.linear import GradientStore
from model.objective import CrossEntropy, LossSums, MicroBatch, loss_names
from model.size import attention_maps
from model.stage import Stage
from model.transformer import Part, Transformer, initialize_weights
from train.config import TrainConfig
from train.core.world import weight_dtype

PHASES = ("embedding", "dense layer", "attend", "dispatch", "experts", "combine", "head")
EXPERT_LAYER = ("attend", "dispatch", "experts", "combine")
PEAK_FLOPS = 989e12  # dense bf16 of an H100
NUM_TIMED = 5
CHOICES = ("parallelism=one_rank", "schedule=1f1b", "dispatch=local", "model.mtp_depth=0")
SIZES = {
    "cuda": ("model=v3_671b", "model.num_routed_experts=32", "model.vocab_size=16384"),
    "cpu": ("model=tiny",),
}
LAYERS = ("model.num_layers=2", "model.num_dense_layers=1")


@dataclass(kw_only=True, slots=True)
class Bench:
    """A model of two layers, one micro-batch, and the times of its phases.

    Attributes:
        laps: seconds of each phase by name: with the device waited for, and of the host alone.
    """

    config: ModelConfig
    device: torch.device
    model: Transformer
    stage: Stage
    store: GradientStore
    batch: MicroBatch
    laps: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # host sync

    def run(self, *, is_timed: bool) -> None:
        """Runs forward, backward and weights of one micro-batch, phase after phase."""
        num_tokens = self.batch.targets_BT[0].numel()
        objective = CrossEntropy(factors=(1 / num_tokens,), balance=0.0)
        run = self.stage.start(self.batch, objective, LossSums(loss_names(0)), self.store)

        def lap(way: str, phase: int, call: Callable[[int], None]) -> None:
            if not is_timed:
                call(phase)
                return
            self.synchronize()
            begun = time.perf_counter()
            call(phase)
            host = time.perf_counter() - begun
            self.synchronize()
            self.laps.setdefault(f"{PHASES[phase]} {way}", []).append((time.perf_counter() - begun, host))

        def awaited(call: Callable[[int], None]) -> Callable[[int], None]:
            return lambda phase: (call(phase), run.wait() if self.stage.lanes[phase] == "comm" else None)[0]

        for phase in range(len(self.stage.lanes)):
            lap("forward", phase, awaited(run.forward))
        for phase in reversed(range(len(self.stage.lanes))):
            lap("backward", phase, awaited(run.backward))
            if self.stage.lanes[phase] == "compute":
                lap("weight", phase, run.weight)


def read_choices(precision: str, device: torch.device) -> TrainConfig:
    """Returns the configuration of the layers that are timed."""
    return compose_run([*CHOICES, *SIZES[device.type], *LAYERS, f"precision={precision}"])


def make_bench(config: TrainConfig, device: torch.device, num_tokens: int) -> Bench:
    """Builds the model on the device, with random weights, and one micro-batch."""
    shape = config.model
    experts = range(shape.num_routed_experts)
    part = Part(layers=(0, 1), experts=experts, embedding=True, head=True)
    dispatcher = LocalDispatcher(shape.num_routed_experts)
    model = Transformer(shape, dispatcher, weight_dtype(config.precision), part, config.computing)
    if device.type == "cuda":  # there in a second; on the host in a minute, though the same under every layout
        model = model.to(device)
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(0, shape.initializer_range) if weight.ndim > 1 else weight.fill_(1)
    else:
        initialize_weights(model, 0)
    tokens = [torch.randint(shape.vocab_size, (1, num_tokens), device=device) for _ in range(2)]
    return Bench(
        config=shape,
        device=device,
        model=model,
        stage=Stage(model, range(2), first=True, last=True),
        store=GradientStore(model.parameters()),
        batch=MicroBatch(inputs_BT=(tokens[0],), targets_BT=(tokens[1],), documents=None),
    )


def expert_layer_operations(config: ModelConfig, num_tokens: int) -> float:
    """Returns multiplications and additions of an expert layer, forward and backward."""
    hidden, num_heads = config.hidden_size, config.num_heads
    attention = sum(rows * columns for rows, columns in attention_maps(config))
    num_experts = config.num_experts_per_token + config.num_shared_experts
    experts = 3 * hidden * config.expert_intermediate_size * num_experts + hidden * config.num_routed_experts
    # Causal attention: a token sees half of all others on average.
    pairs = num_heads * (config.qk_head_dim + config.value_head_dim) * num_tokens / 2
    return 6 * num_tokens * (attention + experts + pairs)


def whole_pass(bench: Bench) -> tuple[float, float]:
    """Returns seconds of a micro-batch without waiting between phases, and those of the host among them."""
    bench.synchronize()
    begun = time.perf_counter()
    for _ in range(NUM_TIMED):
        bench.run(is_timed=False)
    host = (time.perf_counter() - begun) / NUM_TIMED
    bench.synchronize()
    return (time.perf_counter() - begun) / NUM_TIMED, host


def trace(bench: Bench, path: Path) -> None:
    """Writes a trace of one micro-batch, and prints its longest kernels and the peak of memory."""
    torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile() as profile:
        bench.run(is_timed=False)
        bench.synchronize()
    profile.export_chrome_trace(str(path))
    kernels = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in kernels[:25]:
        print(f"  {event.self_device_time_total / 1e3:8.3f} ms {event.count:4d} x {event.key[:90]}")
    print("kernels launched:", sum(event.count for event in kernels if event.self_device_time_total > 0))
    print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def main() -> None:
    """Times the layers, and prints and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.day.layer", description=__doc__)
    parser.add_argument("precision", choices=["bf16", "fp8"])
    parser.add_argument("--out", type=Path, default=Path("."), metavar="FOLDER")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_tokens = 4096 if device.type == "cuda" else 32
    bench = make_bench(read_choices(arguments.precision, device), device, num_tokens)
    with bench.model.weights_unchanged():
        for is_timed in (False, False, *[True] * NUM_TIMED):
            bench.run(is_timed=is_timed)
        whole, host = whole_pass(bench)
        if device.type == "cuda":
            trace(bench, arguments.out / f"layer_{arguments.precision}.json.gz")
    medians = {name: [statistics.median(each) for each in zip(*laps, strict=True)] for name, laps in bench.laps.items()}
    for name, (both, alone) in medians.items():
        print(f"  {name:24s} {1e3 * both:8.3f} ms, host {1e3 * alone:7.3f} ms")
    seconds = sum(both for name, (both, _) in medians.items() if name.split()[0] in EXPERT_LAYER)
    operations = expert_layer_operations(bench.config, num_tokens)
    print(
        f"expert layer: {operations / 1e12:.2f} TFLOP in {1e3 * seconds:.2f} ms, {operations / seconds / 1e12:.0f} "
        f"TFLOP/s, {operations / seconds / PEAK_FLOPS:.1%} of 989; whole {1e3 * whole:.2f} ms, host {1e3 * host:.2f} ms"
    )
    found = {"seconds": medians, "expert_layer": seconds, "whole": whole, "host": host}
    (arguments.out / f"layer_{arguments.precision}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
