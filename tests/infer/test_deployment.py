"""Deployments of DeepSeek-V3: what fits, and bounds that the published speeds do not exceed."""

import json
from dataclasses import replace

import pytest

from base.refusal import ConfigError, RuleError
from comm.config import ClusterConfig
from infer.deployment import Deployment, DeploymentConfig, GpuSet
from launch.plan import main
from launch.plan_request import read_request
from model.config import ModelConfig
from model.hf.checkpoint import ITEM_BYTES
from model.hf.names import copied_from, stored_tensors
from tests.refusals import assert_refused

GIB = 2**30
WANTED = DeploymentConfig(cached_tokens=1_000_000)


@pytest.fixture(scope="module")
def v3() -> tuple[ModelConfig, ClusterConfig]:
    config = read_request(["experiment=v3_671b"]).config
    return config.model, config.cluster


def sets_of(
    v3: tuple[ModelConfig, ClusterConfig], config: DeploymentConfig = WANTED, **changes: float
) -> dict[str, GpuSet]:
    cluster = replace(v3[1], **changes)  # type: ignore[arg-type]
    return {f"{found.role} {found.name}": found for found in Deployment(v3[0], cluster, "fp8", config).sets()}


@pytest.mark.parametrize(("memory", "gpus"), [(141, 8), (80, 16)])
def test_smallest_set_holds_v3_and_the_cache(v3: tuple[ModelConfig, ClusterConfig], memory: int, gpus: int) -> None:
    smallest = sets_of(v3, memory_bytes=memory * GIB)["decoding smallest"]
    assert smallest.gpus == gpus
    assert smallest.cached_tokens >= WANTED.cached_tokens
    # Weights and cache are within the share of the memory that is used.
    tokens = smallest.cached_tokens * smallest.attention / gpus
    assert smallest.weight_bytes + tokens * 2 * 576 * 62 <= WANTED.memory_share * memory * GIB


def test_one_gpu_holds_every_tensor_once(v3: tuple[ModelConfig, ClusterConfig]) -> None:
    found = sets_of(v3, memory_bytes=1000 * GIB)["decoding smallest"]
    stored = stored_tensors(v3[0], dtype="BF16", fp8=True)
    once = sum(item.num_elements * ITEM_BYTES[item.dtype] for name, item in stored.items() if copied_from(name) is None)
    assert (found.gpus, found.weight_bytes) == (1, pytest.approx(once))


def test_more_tokens_or_less_memory_need_no_fewer_gpus(v3: tuple[ModelConfig, ClusterConfig]) -> None:
    sizes = [
        sets_of(v3, DeploymentConfig(cached_tokens=tokens))["decoding smallest"].gpus
        for tokens in (1, 4 * 10**6, 10**8)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_bounds_are_above_the_published_speeds_and_follow_the_devices(v3: tuple[ModelConfig, ClusterConfig]) -> None:
    """DeepSeek reports 73.7k and 14.8k tokens/s a node of 8 H800, prompts of 4,989 tokens (open-infra-index, day 6)."""
    config = DeploymentConfig(context_tokens=4989)
    published = {"prefill as DeepSeek-V3": 73_700 / 8, "decoding as DeepSeek-V3": 14_800 / 8}
    found = sets_of(v3, config)
    for name, speed in published.items():
        assert speed < found[name].tokens_per_second / found[name].gpus < 1.5 * speed, name
    for rate in ("memory_bytes_per_second", "inter_node_bytes_per_second", "peak_flops"):
        slower = sets_of(v3, config, **{rate: getattr(v3[1], rate) / 20})
        limits = {name: slower[name].limit for name in found}
        assert set(limits.values()) & {
            rate.split("_", maxsplit=1)[0].replace("inter", "links").replace("peak", "compute")
        }
        assert all(slower[name].tokens_per_second <= found[name].tokens_per_second for name in found)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["deployment={cached: 1}"], ["deployment.cached", "did you mean deployment.cached_tokens"]),
        (["deployment={memory_share: 2}"], ["deployment.memory_share", "at most 1", "is 2"]),
        (["deployment={}", "search=true"], ["search", "deployment"]),
        (["deployment={}", "format=html"], ["format", "text or json"]),
        (["deployment={}", "cluster=h20"], ["cluster.inter_node_bytes_per_second", "is null", "cluster=h800"]),
    ],
)
def test_impossible_deployment_is_refused(overrides: list[str], parts: list[str]) -> None:
    assert_refused((ConfigError, RuleError), parts, lambda: main(["experiment=v3_671b", *overrides]))


def test_plan_prints_the_deployment(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["experiment=v3_671b", "cluster=h200", "deployment={cached_tokens: 2000000}"]
    assert main([*command, "format=json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 110
    for found in values["sets"]:
        assert f"{found['cached_tokens']:,}" in printed
    assert values["too_few"]["gpus"] == 4
    # Section 3.4: 8 experts and a redundant one in prefill; 64 ranks of redundant and shared experts in decoding.
    experts = {(found["role"], found["name"]): (found["experts"], found["copies"]) for found in values["sets"]}
    assert (experts["prefill", "as DeepSeek-V3"], experts["decoding", "as DeepSeek-V3"]) == ((9, 32), (1, 64))
    assert "320 GPUs, 64 of them redundant or shared" in printed


def test_sequence_that_no_gpu_holds_is_the_reason(v3: tuple[ModelConfig, ClusterConfig]) -> None:
    refused = Deployment(*v3, "fp8", DeploymentConfig(context_tokens=10**6)).refused()
    assert refused is not None
    assert refused[1].startswith("weights and one sequence need 77.7 GB of 76.4")
