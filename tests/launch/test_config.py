"""Tests of the rules: shipped values pass, and every violated rule names key, value and the nearest valid value."""

import re
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from random import Random
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest
import yaml

import launch.config.rules
from base.ranges import Range
from base.refusal import ConfigError, divisors, multiples
from base.registry import Registry
from data.corpus import DataError
from launch.config.compose import default_groups, options, user_errors
from launch.config.rules import check_optim, check_rules
from launch.config.run import check, compose_run, read_config, write_config
from score.score import ScoringError
from tests.data.chat.conversations import chat_tokenizer
from tests.data.released_tokenizer import write_released
from tests.launch.checkpoints import write_stand_in
from tests.refusals import assert_refused
from train.checkpoint.manifest import CheckpointError
from train.config import TrainConfig
from train.predict.cut import ramp_notices

RAMP_OF_ODD = ("4 to 6", "10", "14")
RAMP = "{start_sequences:%d,end_tokens:1000,num_sizes:%d}"

# What an option cannot be chosen without.
NEEDS = {
    "parallelism=mlperf_256_ranks": ["model=v3_671b", "cluster=gb300", "batch.global_sequences=1024",
                                     "validation.sequences=1024", "cluster.memory_bytes=null",
                                     "dispatch.max_nodes=8"],
    "parallelism=v3_2048_ranks": ["model=v3_671b", "cluster=h800", "batch.global_sequences=8192",
                                  "validation.sequences=8192", "cluster.memory_bytes=null"],
    "parallelism=eight_ranks": ["batch.global_sequences=32"],
    "model=tiny": ["data.tokenizer_vocab_size=300"],
    "dispatch=deepep": ["cluster=h800", "precision=bf16", "model.hidden_size=256"],
    "data=files": ["data.paths=[pyproject.toml]"],
    "precision=float64": ["optim.sharding=replicated"],
    "model=arithmetic": ["data=arithmetic"],
    **{
        f"task={task}": [
            "data=arithmetic_preferences", "data.num_samples=2000", "init_from=random", "validation.sequences=0",
        ]
        for task in ("reward_model", "dpo")
    },
    "task=sft": ["data=arithmetic", "data.num_samples=2000", "validation.sequences=0"],
}  # fmt: skip
SCALED = ("model", "parallelism", "data")
"""Groups whose options change the size of the model, of the vocabulary or of the text."""
ROLLOUTS = [
    *NEEDS["task=sft"], "task=grpo", "rollout.max_new_tokens=16", "model=tiny", "model.vocab_size=32",
    "init_from=random",
]  # fmt: skip

JUDGE = ["experiment=arithmetic_self_reward", "init_from=random", "reward=judge", "reward.parts.0.max_new_tokens=16"]

CHATS = {
    "data=chat": '{"prompt": "a", "answer": "b"}\n',
    "data=preferences": '{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
    "data=problems": '{"prompt": "a", "answer": "b"}\n',
    "data=problem_mix": '{"prompt": "a", "answer": "b"}\n',
}


def build(*overrides: str) -> TrainConfig:
    return compose_run(overrides)


def write_chats(folder: Path, choice: str) -> list[str]:
    """Writes a file of conversations or pairs, and returns the override that names it."""
    path = folder / f"{choice.removeprefix('data=')}.jsonl"
    path.write_text(CHATS[choice], "utf-8")
    is_mix = choice == "data=problem_mix"
    return [f"data.sources=[{{name: a, weight: 1, paths: ['{path}']}}]" if is_mix else f"data.paths=['{path}']"]


def place_weights(folder: Path) -> str:
    """Creates converted weights of the default model, that define its architecture."""
    return str(write_stand_in(folder, build().model))


INDEPENDENT = ("cluster", "optim/schedule", "optim", "schedule", "guard", "track", "profile", "batch", "validation",
               "evaluation", "checkpointing", "samples", "cost")  # fmt: skip
"""Groups any options of which go together, so that one composition has an option of each."""


@pytest.mark.slow
@pytest.mark.parametrize("row", range(max(len(options(group)) for group in INDEPENDENT)))
def test_config_options_of_independent_groups_compose_and_pass(row: int) -> None:
    check(build(*(f"{group}={(names := options(group))[row % len(names)]}" for group in INDEPENDENT)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice",
    # Experiments are in tests/launch/test_recipes.py.
    [f"{group}={option}" for group in default_groups("train") if group not in (*INDEPENDENT, "experiment")
     for option in options(group)],
)  # fmt: skip
def test_config_every_shipped_option_composes_and_passes(choice: str, tmp_path: Path) -> None:
    needs = NEEDS.get(choice, [])
    if choice.startswith("data=files"):
        (tmp_path / "a.txt").write_text("some text")
        needs = [f"data.paths=['{tmp_path}']"]
    if choice == "data=mix":
        (tmp_path / "MIX.yaml").write_text("sources: [{name: a, paths: [a.txt], weight: 1}]")
        needs = [f"data.manifest={tmp_path / 'MIX.yaml'}"]
    if choice in CHATS:
        needs = write_chats(tmp_path, choice)
    if choice == "data=reasoning_gym":
        chat_tokenizer().save(tmp_path / "tokenizer.json")
        needs = ["data.dataset=chain_sum", f"data.tokenizer={tmp_path / 'tokenizer.json'}"]
    if choice == "data=files_and_tokenizer":
        needs += [f"data.tokenizer={write_released(tmp_path / 'tokenizer.json', ['some text'], highest_id=2000)}"]
    if choice == "task=distill":
        teacher = place_weights(tmp_path / "teacher")
        needs = [*NEEDS["task=sft"], f"task.teacher={teacher}", "init_from=random"]
    if choice.split("=")[0] in ("reward", "rollout") or choice == "task=grpo":
        needs = [*ROLLOUTS, "reward=exact"] if choice.split("=")[0] != "reward" else ROLLOUTS
    if choice in ("reward=none", "rollout=none"):
        needs = []
    if choice in ("reward=reward_model", "reward=by_domain"):
        part = 0 if choice == "reward=reward_model" else 2
        weights = place_weights(tmp_path / "weights")
        with pytest.raises(ConfigError, match="must be a reward model, which has a head for scores"):
            check(build(choice, *needs, f"reward.parts.{part}.ckpt={weights}"))
    elif choice == "model=of_checkpoint":
        # Its other half, weights that are whole, is in tests/train/test_init_from.py.
        config = build(choice, f"init_from={place_weights(tmp_path / 'weights')}")
        assert config.model == build().model
        check(replace(config, init_from=None))
    elif choice == "task=long_context":
        # Its other half, with weights, is in tests/train/tasks/test_sft.py.
        with pytest.raises(ConfigError, match="init_from: must name trained weights with task=long_context, is null"):
            check(build(choice))
    elif choice in ("reward=code", "reward=reasoning_gym"):
        with pytest.raises(ScoringError, match=rf"reward\.parts: kind {choice[7:]} must apply to a problem"):
            check(build(choice, *needs))
    elif choice == "data=reasoning_gym" and find_spec("reasoning_gym") is None:
        with pytest.raises(DataError, match="reasoning-gym, which cannot be imported"):
            check(build(choice, *needs))
    else:
        # Large models with the small default text, and small text for a run of the default length.
        accepted = ["accept=[small_tokenizer,repeated_corpus]"] if choice.split("=")[0] in SCALED else []
        check(build(choice, *needs, *accepted))


@pytest.mark.slow
@pytest.mark.parametrize("number", [12, pytest.param(60, marks=pytest.mark.exhaustive)])
def test_config_any_choice_of_options_passes_or_is_rejected_in_one_line(number: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    weights = place_weights(tmp_path / "weights")
    given = write_released(tmp_path / "tokenizer.json", ["some text"], highest_id=2000)
    needs = {"data=files": [f"data.paths=['{tmp_path / 'a.txt'}']"], "model=of_checkpoint": [f"init_from={weights}"]}
    (tmp_path / "MIX.yaml").write_text("sources: [{name: a, paths: [a.txt], weight: 1}]")
    needs["data=mix"] = [f"data.manifest={tmp_path / 'MIX.yaml'}"]
    needs |= {choice: write_chats(tmp_path, choice) for choice in CHATS}
    needs["data=files_and_tokenizer"] = [*needs["data=files"], f"data.tokenizer={given}"]
    recipes = set(options("experiment")) - {"none", "quickstart", "two_nodes", "four_nodes"}
    recipes -= {name for name in recipes if name.startswith("arithmetic")}
    needs |= {f"experiment={name}": needs["data=files_and_tokenizer"] for name in recipes}
    needs["experiment=v3_671b"] = [*needs["data=mix"], f"data.tokenizer={given}"]
    groups, random, passed, refusals = list(default_groups("train")), Random(0), 0, []
    for _ in range(number):
        chosen = [f"{group}={random.choice(options(group))}" for group in random.sample(groups, 4)]
        try:
            given_too = [need for choice in chosen for need in needs.get(choice, ())]
            check(build(*chosen, *given_too, "accept=[small_tokenizer,repeated_corpus]"))
            passed += 1
        except user_errors() as error:
            refusals.append(str(error))
    assert not [text for text in refusals if not re.fullmatch(r"[a-z_.0-9]+(( and |, )[a-z_.0-9]+)*: .+", text)]
    assert number / 6 < passed < number


@pytest.mark.parametrize("choice", ["experiment=quickstart", "optim=adamw_v3", "optim/schedule=wsd", "model=tiny"])
def test_config_read_inverts_write(choice: str) -> None:
    config = build(choice)
    assert read_config(write_config(config)) == config
    assert read_config(yaml.safe_load(yaml.safe_dump(write_config(config)))) == config


def test_config_source_is_written_as_it_is_given() -> None:
    config = build("data=files", "data.paths=[a.txt,b]")
    assert write_config(config)["data"]["paths"] == ["a.txt", "b"]
    assert write_config(config)["data"]["kind"] == "files"
    assert "source" not in write_config(config)["data"]


def numbers_without_range(hint: Any, place: str) -> Iterator[str]:
    """Yields the dotted keys of numbers for which the decoder has no range."""
    base, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    registry = next((mark for mark in marks if isinstance(mark, Registry)), None)
    if registry is not None and base is not str:
        members = [entry.config for _, entry in registry.items()]
    elif get_origin(base) in (Union, UnionType):
        members = list(get_args(base))
    elif is_dataclass(base) and not hasattr(base, "from_plain"):
        for name, inner in get_type_hints(base, include_extras=True).items():
            yield from numbers_without_range(inner, f"{place}.{name}" if place else name)
        return
    else:
        if base in (int, float) and not any(isinstance(mark, Range) for mark in marks):
            yield place
        return
    for member in members:
        yield from numbers_without_range(member, place)


def test_config_every_number_has_a_range_or_is_checked_where_it_belongs() -> None:
    found = set(numbers_without_range(TrainConfig, ""))
    checked = {key for key in found if key.startswith("costs.")}
    checked |= {"memory_cap", "data.tokenizer_vocab_size", "data.validation_fraction", "data.fim_rate"}
    assert found == checked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["task.steps=0"], ["task.steps", "above 0", "is 0", "least is 1"]),
        (["optim.beta2=1"], ["optim.beta2", "below 1", "1.0"]),
        (["seed=-1"], ["seed", "0 or above", "-1"]),
        (
            ["parallelism.data=4", "parallelism.expert=3", "batch.micro_sequences=1"],
            ["parallelism.expert", "parallelism.data=4", "is 3", "2 or 4"],
        ),
        (["parallelism.expert=2"], ["parallelism.expert", "parallelism.data=1", "is 2", "valid: 1"]),
        (
            ["parallelism=four_ranks", "cluster.ranks_per_node=3"],
            ["cluster.ranks_per_node", "4 ranks", "is 3", "2 or 4"],
        ),
        (["guard.spike_factor=0.5"], ["guard.spike_factor", "0, which is off, or above 1", "0.5"]),
        (["resume=auto"], ["resume", "auto", "out_dir", "is empty"]),
        (["cluster.backend=nccl"], ["cluster.backend", "cluster.device=cuda", "nccl", "gloo"]),
        (["parallelism=four_ranks", "dispatch=local"], ["dispatch", "parallelism.expert=2", "two_hop"]),
        (["dispatch=deepep"], ["dispatch", "cluster.device=cuda", "cluster.device=cpu", "dispatch=two_hop"]),
        (["dispatch=deepep", "cluster=one_gpu"], ["dispatch", "cluster.backend=nccl", "cluster.backend=gloo"]),
        (["cluster=a100", "precision=fp8"], ["precision", "cluster.has_fp8", "nearest valid: bf16"]),
        (["dispatch=deepep", "cluster=h800"], ["dispatch", "precision=bf16", "precision=float32", "two_hop"]),
        (["dispatch.node_cap=clipp"], ["dispatch.node_cap", "did you mean clip"]),
        (["dispatch=all_to_all", "dispatch.balance=node"], ["dispatch.balance", "expert > 1", "is node", "none"]),
        (
            ["experiment=four_nodes", "dispatch.balance=exact", "dispatch.node_cap=clip"],
            ["dispatch.balance", "node_cap=clip", "is exact", "nearest valid: node"],
        ),
        (
            ["experiment=four_nodes", "dispatch.balance=exact", "dispatch.balance_slots=99"],
            ["dispatch.balance_slots", "experts of other ranks", "is 99", "nearest valid"],
        ),
        (
            ["experiment=four_nodes", "dispatch.max_nodes=1"],
            ["dispatch.max_nodes", "2 nodes", "num_limited_groups=2", "is 1", "valid: 2", "dispatch.node_cap=clip"],
        ),
        (["model.qk_rope_head_dim=15"], ["model.qk_rope_head_dim", "even", "is 15", "14 or 16"]),
        (["model.num_dense_layers=5"], ["model.num_dense_layers", "model.num_layers=4", "is 5", "valid: 4"]),
        (["model=v3_671b", "model.rope_scaling.factor=0.5"], ["model.rope_scaling", "factor=0.5"]),
        (
            ["parallelism=four_ranks", "model.num_routed_experts=15"],
            ["model.num_routed_experts", "parallelism.expert=2", "is 15", "14 or 16", "parallelism.expert=1 or 3"],
        ),
        (["model.num_expert_groups=3"], ["model.num_expert_groups", "model.num_routed_experts=16", "is 3", "2 or 4"]),
        (["model.group_score_experts=5"], ["model.group_score_experts", "at most 4", "is 5", "valid: 4"]),
        (["model.num_limited_groups=5"], ["model.num_limited_groups", "num_expert_groups=4", "is 5", "valid: 4"]),
        (["model.num_experts_per_token=10"], ["model.num_experts_per_token", "at most 8", "is 10"]),
        (["model.num_experts_per_token=32"], ["model.num_experts_per_token", "at most 8", "is 32"]),
        (["batch.global_sequences=15"], ["batch.global_sequences", "= 2", "is 15", "14 or 16"]),
        (["batch.sequence_length_tokens=5000"], ["batch.sequence_length_tokens", "4096", "is 5000"]),
        (["batch.sequence_length_tokens=1"], ["batch.sequence_length_tokens", "model.mtp_depth=1", "valid: 2"]),
        (["validation.sequences=20"], ["validation.sequences", "=16", "is 20", "16 or 32"]),
        (["validation.sequences=0", "validation.target_loss=3.6"], ["validation.target_loss", "is 3.6", "valid: null"]),
        (["validation.every_steps=0", "validation.target_loss=3.6"], ["validation.target_loss", "valid: null"]),
        (["optim.schedule.final_ratio=1.5"], ["optim.schedule.final_ratio", "between 0 and 1", "is 1.5"]),
        (["optim=adamw_v3", "optim.schedule.final_learning_rate=1"],
            ["optim.schedule.final_learning_rate", "optim.learning_rate=0.00022", "is 1.0"]),
        (["optim=adamw_v3", "optim.schedule.last_learning_rate=1"], ["optim.schedule.last_learning_rate", "at most",
            "optim.schedule.final_learning_rate=2.2e-05", "is 1.0", "nearest valid: 2.2e-05"]),
        (["optim.schedule.decay_start=60 %", "optim.schedule.decay_end=50 %"],
            ["optim.schedule.decay_start", "optim.schedule.decay_end=50 %", "is 60 %", "nearest valid: 50 %"]),
        (["optim=adamw_v3", "optim.schedule.decay_end=1 tokens"],
            ["optim.schedule.decay_start", "decay_end=1 tokens", "is 10000000000000 tokens"]),
        (["optim.schedule.warmup=70 steps", "optim.schedule.decay_end=40 %"],
            ["optim.schedule.warmup", "optim.schedule.decay_end=40 %", "is 70 steps"]),
        (["optim.schedule.warmup=0.02"], ["optim.schedule.warmup", "5 %", "is 0.02", "nearest valid: 2 %"]),
        (["optim.schedule.warmup=2000"], ["optim.schedule.warmup", "is 2000", "nearest valid: 2000 steps"]),
        (["optim.schedule.warmup=-3"], ["optim.schedule.warmup", "is -3"]),
        (["optim.schedule.warmup=120 %"], ["optim.schedule.warmup", "at most 100 %", "is '120 %'"]),
        (["optim.schedule.warmup=2.5 steps"], ["optim.schedule.warmup", "whole number of steps", "is '2.5 steps'"]),
        (["optim.schedule.warmup=2 epochs"], ["optim.schedule.warmup", "is '2 epochs'"]),
        (["optim.schedule.warmup=null"], ["optim.schedule.warmup", "is None"]),
        (["optim.schedule=wsd"], ["optim.schedule: is a group of keys; write optim/schedule=wsd"]),
        (["optim/schedule=wsdd"], ["optim/schedule: no option wsdd", "did you mean wsd"]),
        (["optim/schedule=wsd", "optim.schedule.decay_end=50 %"],
            ["optim.schedule.decay_end: unknown key here", "optim/schedule=cosine"]),
        (["optim/schedule=wsd", "optim.schedule.decay_shape=sqrt"], ["optim.schedule.decay_shape", "one_minus_sqrt"]),
        (["task.mtp_loss_weight=-1"], ["task.mtp_loss_weight", "0 or above", "is -1"]),
        (["task.mtp_loss_weight=much"], ["task.mtp_loss_weight", "a number, or a list", "is 'much'"]),
        (["task.bias_update_rate=[]"], ["task.bias_update_rate", "from_tokens: 0", "is []"]),
        (["task.bias_update_rate=[{from_tokens:5,value:1}]"], ["task.bias_update_rate", "from_tokens: 0"]),
        (["task.bias_update_rate=[{from_tokens:0,value:1},{from_tokens:0,value:2}]"],
            ["task.bias_update_rate", "must increase", "are 0, 0"]),
        (["task.bias_update_rate=[{from_tokens:0,value:1},{from_tokens:1.5,value:2}]"],
            ["task.bias_update_rate", "whole number", "is 1.5"]),
        (["task.bias_update_rate=[{from_tokens:0,valu:1}]"], ["task.bias_update_rate", "value", "valu"]),
        ([f"batch.ramp={RAMP % (4, 1)}"], ["batch.ramp.num_sizes", "at least 2", "is 1", "null"]),
        ([f"batch.ramp={RAMP % (4, 17)}"], ["batch.ramp.num_sizes", "at most", "is 17", "valid: 16"]),
        ([f"batch.ramp={RAMP % (16, 2)}"], ["batch.ramp.start_sequences", "below", "is 16"]),
        ([f"batch.ramp={RAMP % (0, 2)}"], ["batch.ramp.start_sequences", "above 0", "is 0"]),
        ([f"batch.ramp={RAMP % (3, 2)}"], ["batch.ramp", "= 2", "one is 3", "start_sequences=2 or 4"]),
        ([f"batch.ramp={RAMP % (4, 6)}"], ["batch.ramp", "= 2", "num_sizes"]),
        (["profile.steps=[3,101]"], ["profile.steps", "1 to 100", "one is 101", "nearest valid: 100"]),
        (["profile.steps=[0]"], ["profile.steps", "one is 0", "nearest valid: 1"]),
        (["profile.steps=[3,3]"], ["profile.steps", "at most once", "[3,3]", "nearest valid: [3]"]),
        (["profile=steps", "profile.ranks=[2]"], ["profile.ranks", "0 to 1", "one is 2", "nearest valid: 1"]),
        (["precision=float64"], ["optim.sharding", "precision=float64", "is zero1", "replicated"]),
        (["precision=bf16", "optim.sharding=replicated"], ["optim.sharding", "bf16", "is replicated", "zero1"]),
        (["data.tokenizer_vocab_size=5000"], ["data.tokenizer_vocab_size", "model.vocab_size=2048", "is 5000"]),
        (["name=a/b"], ["name", "'a/b'"]),
        (["name="], ["name", "''"]),
        (["~optim.eps"], ["optim.eps: missing"]),
        (["+optim.epps=1"], ["optim.epps: unknown key", "did you mean optim.eps"]),
        (["+foo=1"], ["foo: unknown key"]),
        (["+data.paths=[a]"], ["data.paths: unknown key", "kind files"]),
        (["data=files", "data.paths=a.txt"], ["data.paths: must be a list", "data.paths=[a.txt]"]),
        (["seed=1.5"], ["seed", "whole number", "1.5"]),
        (["schedule.kind=dualpip"], ["schedule.kind", "did you mean dualpipe"]),
        (["name=2024"], ["name", "quote"]),
        (["optim.learning_rate=nan"], ["optim.learning_rate", "finite"]),
        (["precision=fp8", "recompute=[norm]"], ["recompute: must name all parts with precision=fp8", "is [norm]"]),
        (["recompute=[norm,norm]"], ["recompute", "at most once", "is [norm,norm]", "nearest valid: [norm]"]),
        (["optim.moments=bf16", "optim.beta2=0.99"], ["optim.beta2", "at most 0.984375", "is 0.99"]),
        (["optim.moments=half"], ["optim.moments: must be one of auto, float32, bf16, is 'half'"]),
        (["attention=flex"], ["attention: flex needs cluster.device=cuda", "is flex", "nearest valid: auto"]),
        (["init_from=no/such/run"], ["init_from", "no/such/run"]),
        (["parallelism.context=3", "batch.sequence_length_tokens=256"],
            ["batch.sequence_length_tokens", "2 x parallelism.context = 6", "is 256", "252 or 258"]),
        (["parallelism=four_ranks", "parallelism.context=2", "parallelism.expert=3"],
            ["parallelism.expert", "parallelism.data x parallelism.context = 4", "is 3", "2 or 4"]),
        (["parallelism.context=2", "cluster=one_gpu", "attention=flex"],
            ["attention", "logarithms", "parallelism.context above 1", "is flex", "nearest valid: auto or sdpa"]),
        (["parallelism.context=2", "task=dpo", *NEEDS["task=dpo"]],
            ["parallelism.context", "must be 1 with task=dpo", "is 2", "nearest valid: 1", "pretrain"]),
        ([*JUDGE, "reward.parts.0.weights=reference"],
            ["reward.parts, kind judge: weights must be policy if the run has no reference, is reference"]),
        ([*JUDGE, "reward.parts.0.max_new_tokens=4096"],
            ["reward.parts, kind judge: max_new_tokens must be below model.max_position_tokens="]),
        ([*JUDGE, "reward.parts.0.thinking=true"],
            ["reward.parts, kind judge: thinking must be false with data.template=v3, which has no thoughts"]),
        ([*JUDGE[:2], "rollout.engine=local", "rollout.keep_routing=true"],
            ["rollout.keep_routing: must be false with rollout.engine=local"]),
        (["parallelism.pipeline=3", "schedule=dualpipe"],
            ["parallelism.pipeline: ", "even", "has 3", "2 or 4", "schedule=dualpipe_split"],
        ),
        (["costs.offload=1"], ["costs.offload: ", "without memory_cap", "is 1", "nearest valid: null"]),
        (["memory_cap=0.9"], ["memory_cap: ", "at least 1", "the cap is 0.9", "nearest: 1"]),
        (["memory_cap=2.5", "schedule=dualpipe"], ["memory_cap: ", "keeps 3", "is 2.5", "nearest: 3"]),
        (["costs.forward=-1"], ["costs.forward", "-1"]),
        (["schedule=zb_v", "parallelism.pipeline=4"], ["model.num_layers", "8", "parallelism.pipeline=2"]),
        (["batch.global_sequences=2", "validation.sequences=2", "schedule=dualpipe"],
            ["batch.global_sequences: ", "at least 4", "has 1", "nearest: 4", "= 2 sequences"],
        ),
        (["parallelism.pipeline=8", "batch.global_sequences=32"], ["model.num_layers", "8"]),
        (["data=files", "data.paths=[no/such/place]"], ["data.paths", "no/such/place"]),
        (["data.validation_fraction=1"], ["data.validation_fraction", "1.0"]),
        (["data.fim_rate=2"], ["data.fim_rate", "2.0"]),
        (["data.tokenizer_vocab_size=10"], ["data.tokenizer_vocab_size", "10"]),
        (["resume=no/such/run"], ["resume", "no/such/run"]),
    ],
)  # fmt: skip
def test_config_rejects_what_no_run_can_follow(overrides: list[str], parts: list[str]) -> None:
    assert_refused(user_errors(), parts, lambda: check(build(*overrides)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_sizes", "overrides", "lines"),
    [
        (4, ["schedule=dualpipe_split"], []),
        (4, ["schedule=auto"], []),
        (4, ["schedule=dualpipe", "batch.micro_sequences=1"], []),
        (4, ["schedule=dualpipe"], ["of 4 sequences use schedule dualpipe_split"]),
        (7, ["schedule=dualpipe"], [f"of {sizes} sequences use schedule dualpipe_split" for sizes in RAMP_OF_ODD]),
        (7, ["schedule=dualpipe_v"], ["of 4 to 6 sequences use schedule zb_v"]),
    ],
)
def test_config_says_which_sizes_of_a_ramp_use_another_schedule(
    num_sizes: int, overrides: list[str], lines: list[str]
) -> None:
    """Two ranks need 4 micro-batches, for dualpipe an even number; the first size has 2, each of 2 sequences."""
    ramp = f"{{start_sequences:4,end_tokens:1000000,num_sizes:{num_sizes}}}"
    config = build(f"batch.ramp={ramp}", *overrides)
    check(config)
    notices = list(ramp_notices(config))
    assert len(notices) == len(lines)
    for notice, line in zip(notices, lines, strict=True):
        assert line in notice


def test_multiples_and_divisors_enclose_the_value_and_are_valid() -> None:
    for of in range(1, 13):
        for value in range(1, 40):
            found = [int(text) for text in multiples(value, of).split(" or ")]
            assert all(number % of == 0 and number > 0 and abs(number - value) < max(of, 2) for number in found)
            found = [int(text) for text in divisors(of, value).split(" or ")]
            assert all(of % number == 0 for number in found)
            between = range(min(found) + 1, max(found))
            assert not any(of % number == 0 for number in between)


def test_a_judge_may_be_the_reference_of_the_divergence() -> None:
    divergence = ("task.loss.kl=forward", "task.loss.kl_weight=0.04")
    check_rules(build(*JUDGE, *divergence, "reward.parts.0.weights=reference"))
    check_rules(build(*JUDGE, "rollout.limits.kl=0.2", "reward.parts.0.weights=reference"))


def test_files_of_a_reward_are_checked_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ScoringError, match="constitution_path must be a text file"):
        check(build(*JUDGE, f"reward.parts.0.constitution_path={tmp_path / 'none.txt'}"))
    scored = [*JUDGE[:2], "reward=reward_model"]
    with pytest.raises(CheckpointError, match="kind reward_model: ckpt"):
        check(build(*scored, f"reward.parts.0.ckpt={tmp_path / 'none'}"))
    weights = place_weights(tmp_path / "weights")
    with pytest.raises(ConfigError, match="must be a reward model, which has a head for scores"):
        check(build(*scored, f"reward.parts.0.ckpt={weights}"))


def test_context_multiplies_ranks_and_divides_a_rank_s_tokens() -> None:
    config = build("parallelism=four_ranks", "parallelism.context=2", "parallelism.expert=4")
    assert config.parallelism.world_size == 8
    assert config.rank_sequence_tokens == config.batch.sequence_length_tokens // 2
    assert config.dispatch_site.tokens.max_tokens == config.batch.micro_sequences * config.rank_sequence_tokens
    assert config.num_micro_batches == build("parallelism=four_ranks").num_micro_batches


@pytest.mark.parametrize(("precision", "nearest"), [("float32", "optim.sharding=replicated, or "), ("bf16", "")])
def test_zero1_without_deepspeed_is_rejected_before_any_rank_starts(
    precision: str, nearest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.config.rules, "find_spec", lambda name: name != "deepspeed" or None)
    rule = "optim.sharding: zero1 needs the package deepspeed, which is not installed; nearest valid: "
    assert_refused(ConfigError, [f"{rule}{nearest}pip install ."], lambda: check_optim(build(f"precision={precision}")))
    check_optim(build("precision=float32", "optim.sharding=replicated"))
