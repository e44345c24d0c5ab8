"""Tests of composition: overrides become plain values, and every error of Hydra is replaced by our message."""

import re

import pytest

from launch.config.compose import chosen_options, compose, compose_defaults, key_of
from launch.config.groups import default_groups, included_roots, options, own_keys
from launch.config.run_config import check, compose_run
from train.config.errors import ConfigError


def test_compose_gives_plain_values() -> None:
    values = compose("train", ["experiment=quickstart", "task.steps=7", "name=x"])
    assert values["task"]["steps"] == 7
    assert values["name"] == "x"
    assert values["parallelism"] == {"pipeline": 4, "data": 2, "expert": 2, "cut": "auto", "context": 1}
    assert type(values["parallelism"]) is dict


def test_compose_command_line_wins_over_the_experiment() -> None:
    values = compose("train", ["experiment=two_nodes", "parallelism=four_ranks", "cluster.ranks_per_node=1"])
    assert values["parallelism"]["pipeline"] == 2
    assert values["cluster"]["ranks_per_node"] == 1


def test_compose_resolves_interpolations() -> None:
    assert compose("train", ["name=run-${seed}", "seed=5"])["name"] == "run-5"


def test_compose_every_default_is_an_option() -> None:
    for command in ("train", "schedule", "submit"):
        for group, option in default_groups(command).items():
            assert option in options(group)
        assert compose_defaults(command)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.learing_rate=1", ["optim.learing_rate: unknown key", "did you mean optim.learning_rate"]),
        ("learning_rate=1", ["learning_rate: unknown key", "did you mean optim.learning_rate"]),
        ("stage.step=1", ["stage.step: unknown key", "did you mean task.steps"]),
        ("expermient=quickstart", ["expermient: unknown key", "did you mean experiment"]),
        ("data.paths=[a]", ["data.paths: unknown key", "data=files"]),
        ("optim.learning_rate.x=3", ["optim.learning_rate.x: unknown key"]),
        ("model=tinyy", ["model: no option tinyy", "did you mean tiny", "quickstart, tiny, v2_236b"]),
        ("model={hidden_size:1}", ["model: no option", "quickstart, tiny, v2_236b"]),
        ("model=null", ["model: no option null"]),
        ("model=tiny,quickstart", ["model: one run takes one value"]),
        ("seed=1,2", ["seed: one run takes one value", "1,2"]),
        ("seed=range(3)", ["seed: one run takes one value"]),
        ("~model", ["~model", "model=option"]),
        ("+model=tiny", ["+model=tiny", "model=option"]),
        ("model@other=tiny", ["model@other", "model=option"]),
        ("data=files", ["data.paths: a value is needed"]),
        ("task.steps=???", ["task.steps: a value is needed"]),
        ("name=${nope}", ["name: ", "nope"]),
        ("name=${oc.env:NOT_SET_ANYWHERE}", ["name: ", "NOT_SET_ANYWHERE"]),
        ("seed", ["seed: is not an override", "name=value"]),
        ("=3", ["=3: is not an override"]),
        ("seed=[1", ["seed=[1: is not an override", "quote"]),
        ("", ["is not an override"]),
        ("reward=exact reward.parts.path=x", ["reward.parts.path: reward.parts is a list", "reward.parts.0.weight"]),
        ("reward=exact +reward.parts.path=x", ["reward.parts.path: reward.parts is a list", "reward.parts.0.weight"]),
        ("reward=exact reward.parts.5.weight=x", ["reward.parts.5.weight: reward.parts is a list", "parts.0.weight"]),
        ("reward.parts.path=x", ["reward.parts.path: needs reward, which is null", "reward=exact"]),
        ("recompute.x=1", ["recompute.x: recompute is a list", "is x", "recompute.0"]),
        ("seed.0=1", ["seed.0: unknown key, as seed is one value", "nearest valid: seed="]),
        ("plan=[1]", ["plan: must hold keys and values, is [1]", "nearest valid: plan.check="]),
        ("~seed=5", ["~seed=5: must name", "is 5", "nearest valid: seed=0"]),
        ("~seed seed=1", ["seed: must be a key that exists, is none after the overrides before it"]),
        ("~data.paths data=files", ["~data.paths: must name", "nearest valid: data.paths=..."]),
        ("name='${seed'", ["name: must close what it opens with ${", "nearest valid: name=${name}"]),
        ("name=${name}", ["name: must refer to a value that exists, is itself"]),
        ("name=${out_dir} out_dir=${nope}", ["out_dir: must refer to a key that exists, is ${nope}"]),
        ("name=${foo:bar}", ["name: must refer to a value that exists, is ${foo:bar}"]),
        (
            "name=${rollout.samples}",
            ["rollout: must have values, because name is ${rollout.samples}, is null", "default"],
        ),
        ("task=distill data=files", ["data.paths and task.teacher: a value is needed; write data.paths=["]),
        ("hydra.run.dir=x", ["hydra.run.dir", "no effect"]),
        ("hydra/launcher=x", ["hydra/launcher", "no effect"]),
    ],
)
def test_compose_rejects_and_names_the_nearest(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        compose("train", override.split(" "))
    for part in parts:
        assert part in str(refused.value)
    assert not re.search("override |struct|raised|Interpolation|config\\.|Error", str(refused.value))
    assert "\n" not in str(refused.value)


def test_compose_submit_takes_over_training_with_its_own_cluster() -> None:
    ours = compose("submit", [])
    assert {key: ours[key] for key in ours if key not in own_keys("submit")} == compose("train", ["cluster=slurm"])
    assert set(own_keys("submit")) == {"dry_run", "slurm"}
    assert default_groups("submit") == {**default_groups("train"), "cluster": "slurm"}
    assert included_roots("submit") == ["train"]


def test_compose_key_of_an_override() -> None:
    assert [key_of(text) for text in ("a.b=[1,2]", "+c=1", "~d")] == ["a.b", "c", "d"]


def test_compose_rejects_a_group_of_another_command() -> None:
    with pytest.raises(ConfigError, match=r"^model: unknown key"):
        compose("schedule", ["model=tiny"])


def test_compose_a_task_brings_what_it_demands() -> None:
    values = compose("train", ["task=grpo"])
    assert values["rollout"]["max_new_tokens"] < values["batch"]["sequence_length_tokens"]
    for task in ("sft", "dpo", "reward_model", "grpo"):
        batch = compose("train", [f"task={task}"])["batch"]
        assert batch["document_mask"]
        assert chosen_options("train", [f"task={task}"])["batch"] == "samples"
    assert compose("train", ["task=sft", "batch=default"])["batch"]["document_mask"] is False


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["task=grpo"], ["reward", "data.kind", "init_from"]),
        (["task=grpo", "data=problems"], ["data.paths", "reward", "init_from"]),
        (["task=dpo"], ["data.kind", "init_from"]),
        (["task=distill", "name=a/b"], ["task.teacher", "name", "data.kind", "init_from"]),
        (["task=dpo", "name=a/b", "batch.global_sequences=7", "profile.steps=[0]", "task.steps=3"],
         ["name", "batch.global_sequences", "profile.steps", "data.kind", "init_from"]),
    ],
)  # fmt: skip
def test_one_message_names_all_that_a_run_lacks(overrides: list[str], keys: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        check(compose_run(overrides))
    parts = str(refused.value).split(". Also ")
    assert [part.partition(":")[0] for part in parts] == keys
    assert all("; " in part for part in parts)
