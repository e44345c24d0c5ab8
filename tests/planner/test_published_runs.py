"""Published runs of other frameworks against their plans. docs/plan.md explains each difference."""

from math import exp, log, sqrt

import pytest

from launch.plan import plan_what_if
from launch.plan_request import changed_run
from planner.job_plan import plan_job, require_time
from planner.scaling import KernelRates
from tests.planner.planned import plan_of, request_of

COMMON = ("task.steps=100", "validation.sequences=0", "samples.prompt=", "samples.tokens=0", "plan.check=false",
          "efficiency.unexplained=1")  # fmt: skip
SNOWBALL = ("model=v2_lite_16b", "cluster=h100", "precision=bf16", "model.hidden_size=2560", "model.num_layers=26",
            "model.num_dense_layers=0", "model.num_heads=20", "model.num_routed_experts=256",
            "model.num_experts_per_token=4", "model.num_shared_experts=2", "model.expert_intermediate_size=1280",
            "model.vocab_size=128256", "model.max_position_tokens=8192", "parallelism.pipeline=8",
            "parallelism.data=8", "parallelism.expert=8", "schedule=dualpipe_v", "dispatch=all_to_all",
            "batch.sequence_length_tokens=8192", "batch.global_sequences=256", "batch.micro_sequences=1",
            "recompute=[layer]")  # fmt: skip
"""marin-community/marin, issue 7024 and experiments/grug/moe_pipeline/README.md: PP 8 x EP 8, all recomputed."""
TITAN = ("model=v3_671b", "model.mtp_depth=0", "cluster=b200", "parallelism.pipeline=1", "parallelism.data=256",
         "parallelism.expert=64", "schedule=1f1b", "dispatch=deepep", "batch.sequence_length_tokens=4096",
         "batch.global_sequences=2048", "batch.micro_sequences=8")  # fmt: skip
"""NVIDIA/dgxc-benchmarking, deepseek_v3/pretrain/torchtitan: 671B on 256 B200, DP 256, EP 64, 8 sequences a GPU."""
VERL = ("experiment=v3_grpo", "cluster=h20", "precision=bf16", "model.mtp_depth=0", "parallelism.pipeline=12",
        "parallelism.data=8", "parallelism.expert=8", "parallelism.cut=auto", "schedule=1f1b", "dispatch=all_to_all",
        "memory_cap=null", "recompute=[layer]", "rollout.prompts=96", "rollout.samples=8", "rollout.updates=3",
        "rollout.max_new_tokens=9632", "rollout.length_penalty_tokens=4096", "rollout.max_draws=1",
        "batch.sequence_length_tokens=11680", "batch.global_sequences=64")  # fmt: skip
"""verl, examples/grpo_trainer/run_deepseek671b_math_megatron_96gb.sh with PP 12, TP 8 (here data), EP 8."""
VERL_MEAN_TOKENS = 1960


@pytest.mark.parametrize(
    ("run", "published", "most"),
    [
        (SNOWBALL, 603_327 / 64, 1.3),
        ((*TITAN, "precision=bf16", "recompute=[layer]"), 859, 1.7),
    ],
    ids=["marin", "torchtitan"],
)
def test_published_speed_is_that_of_the_plan_or_lower(run: tuple[str, ...], published: float, most: float) -> None:
    """Rates are those of DeepSeek's kernels, so a plan bounds a run with others from above."""
    planned = require_time(plan_of(*run, *COMMON)).time.tokens_per_second_per_gpu
    assert 0.9 < planned / published < most


def test_products_of_the_experts_in_fp8_gain_as_much_as_published() -> None:
    """Of torchtitan's products, only those are in FP8: 918 in place of 859 tokens per second and GPU."""
    request = request_of(*TITAN, "precision=bf16", "recompute=[layer]", *COMMON)
    rates = request.planner.rates
    assert isinstance(rates, KernelRates)
    passes = ("forward", "backward_input", "backward_weight")
    seconds = {name: getattr(rates.experts, name).products / rates.bf16_over_fp8 for name in passes}
    faster = changed_run(request, " ".join(f"rates.experts.{name}.products={seconds[name]}" for name in passes))
    gain = plan_what_if(request, plan_job(request.config, request.planner), faster)["speedup"]
    assert gain == pytest.approx(918 / 859, rel=0.02)


def test_published_rollouts_take_the_planned_time_or_longer() -> None:
    """verl, docs/perf/dpsk.md: 1,050 s of 1,700 s a step are rollouts, with 1,960 tokens an answer in the mean."""
    sigma = sqrt(2 * log(VERL_MEAN_TOKENS / 1500))
    lengths = f"plan.answer_tokens={{median: 1500, sigma: {sigma:.4f}}}"
    plan = plan_of(*VERL, *COMMON, lengths)
    assert plan.rollouts is not None
    assert plan.rollouts.mean_tokens == pytest.approx(1500 * exp(sigma**2 / 2), rel=0.05)
    assert plan.rollouts.sampling_seconds is not None
    assert 0.3 < plan.rollouts.sampling_seconds / 1050 < 1.1
    assert 0.4 < 3 * require_time(plan).time.step / 1700 < 1.1
