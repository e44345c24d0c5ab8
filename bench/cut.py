"""Times DeepSeek-V3's step under the even and the balanced cut: `python -m bench.cut`.

Arguments are the kind of schedule, the number of micro-batches, and the chunks of a rank for one direction.

Stages take the times of the public trace of DeepSeek-V3's training (github.com/deepseek-ai/profile-data: H800, 4,096
tokens, balanced routing). A dense layer takes 0.8 of a MoE layer's MLP and no exchange. A head takes 7.59 TFLOP each
for F, I and W at 650 TFLOP/s. MTP is a MoE layer with a projection, and a head. A link takes 0.5 ms.
"""

import sys
import time

from dualpipe.builder import build_schedule
from dualpipe.simulation import simulate
from launch.config.run import compose_run
from train.config import TrainConfig
from train.predict.cut import run_cut, run_placement
from train.predict.layer_times import LayerTimes, PartTimes, model_work, stage_costs, stage_works, times_of_ranks

_ATTENTION = (4.37e-3, 9.34e-3, 2.39e-3)
_MLP = (4.60e-3, 5.31e-3, 5.07e-3)
_EXCHANGE = (10.34e-3, 9.77e-3)
_HEAD_SECONDS = 7.59 / 650
_PROJECTION_SECONDS = 1.3e-3
_DENSE_MLP = 0.8
V3 = (
    "model=v3_671b",
    "cluster=h800",
    "parallelism=v3_2048_ranks",
    "precision=fp8",
    "batch.micro_sequences=1",
    "batch.sequence_length_tokens=4096",
)


def trace_times() -> LayerTimes:
    """Returns the seconds of one micro-batch in each part of DeepSeek-V3."""
    moe = PartTimes(
        **_named(*(attention + mlp for attention, mlp in zip(_ATTENTION, _MLP, strict=True))),
        forward_exchange=_EXCHANGE[0],
        backward_exchange=_EXCHANGE[1],
    )
    head = PartTimes(**_named(*[_HEAD_SECONDS] * 3))
    return LayerTimes(
        dense=PartTimes(**_named(*(a + _DENSE_MLP * mlp for a, mlp in zip(_ATTENTION, _MLP, strict=True)))),
        moe=moe,
        embedding=PartTimes(),
        head=head,
        mtp=moe + PartTimes(**_named(*[_PROJECTION_SECONDS] * 3)) + head,
        latency_seconds=0.5e-3,
    )


def _named(forward: float, backward_input: float, backward_weight: float) -> dict[str, float]:
    return {"forward": forward, "backward_input": backward_input, "backward_weight": backward_weight}


def measure(config: TrainConfig, kind: str, num_micro_batches: int) -> str:
    """Returns a row: the cut, the heaviest mirror pair relative to the mean, and the seconds of a step."""
    times, placement = trace_times(), run_placement(config, kind)
    cut = run_cut(config, placement, times)
    sizes = [len(layers) for layers in cut]
    work = times_of_ranks(stage_works(sizes, model_work(times, config)), placement)
    costs = stage_costs(times, config, cut)
    begin = time.perf_counter()
    schedule = build_schedule(kind, config.parallelism.pipeline, num_micro_batches, costs)
    simulation = simulate(schedule, costs)
    return (
        f"{config.parallelism.cut.to_plain()!s:>5}  {max(work) * len(work) / sum(work):.4f}  "
        f"{simulation.makespan:8.2f} s  {max(simulation.peaks):6.2f}  {time.perf_counter() - begin:6.1f} s  {sizes}"
    )


def main() -> None:
    """Prints a row for each cut."""
    kind, num_micro_batches, chunks = (*sys.argv[1:], *("dualpipe_split", "120", "1")[len(sys.argv) - 1 :])[:3]
    print("  cut  pair / mean  step  peak  built in  layers of the stages")
    for cut in ("even", "auto"):
        config = compose_run([*V3, f"schedule={kind}", f"schedule.chunks={chunks}", f"parallelism.cut={cut}"])
        print(measure(config, kind, int(num_micro_batches)), flush=True)


if __name__ == "__main__":
    main()
